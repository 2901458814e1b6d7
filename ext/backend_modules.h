// Loads the engine's backends. In a portable build they are modules in the folder of the engine's
// library, the CPU's in a variant for each set of instructions; otherwise they are linked in.
#pragma once

#include "status.h"

#include <string>
#include <vector>

namespace imatrix {

struct BackendModule {
    std::string file;    // its name in the engine's folder, "libggml-cuda.so"
    std::string problem; // why it cannot be used here, "" if it can; a variant that this processor
                         // does not run while it runs another is no problem
};

// Loads them, once in a process; later calls answer as the first did. Failed if there is no backend
// for the CPU, without which no model can be loaded. A module that cannot be loaded is a warning in
// the log.
Status load_backends();

// The modules in the engine's folder, by name. Each is opened to see whether it can be.
std::vector<BackendModule> backend_modules();

// Which variant of the CPU's backend was loaded, such as "haswell"; "" if it is linked in.
std::string cpu_variant();

} // namespace imatrix
