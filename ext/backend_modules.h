// Loads the engine's backends. In a portable build they are modules in the folder of the engine's
// library, the CPU's in a variant for each set of instructions; otherwise they are linked in. Other
// distributions bring more of them in folders of their own (imatrix-cuda).
#pragma once

#include "status.h"

#include <string>
#include <vector>

namespace imatrix {

struct BackendModule {
    std::string file;    // its name without the folder, "libggml-cuda.so"
    std::string problem; // why it cannot be used here, "" if it can; a variant that this processor
                         // does not run while it runs another is no problem
};

// A folder of another distribution, whose modules are loaded after the engine's own; a backend that
// the engine has already is left alone. What is added once load_backends() was called comes too
// late. With a problem its modules are not opened, and the problem is told for each.
void add_module_folder(const std::string & folder, const std::string & problem);

// Loads them, once in a process; later calls answer as the first did. Failed if there is no backend
// for the CPU, without which no model can be loaded. A module that cannot be loaded is a warning in
// the log.
Status load_backends();

// The modules in the engine's folder and in those added, by name. Each is opened to see whether it
// can be.
std::vector<BackendModule> backend_modules();

// Which variant of the CPU's backend was loaded, such as "haswell"; "" if it is linked in.
std::string cpu_variant();

} // namespace imatrix
