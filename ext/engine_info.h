// What was built in, and which devices this machine has for it.
#pragma once

#include "status.h"

#include <cstdint>
#include <string>
#include <vector>

namespace imatrix {

struct Device {
    std::string backend;     // "CPU", "CUDA", "Metal", "Vulkan", "RPC", ...
    std::string name;        // "CPU", "CUDA0"
    std::string description; // the processor's or card's own name
    std::string buffer_type; // of its memory, as overrides name it: "CPU", "CUDA0"
    bool        gpu         = false;
    uint64_t    memory_free = 0; // bytes
    uint64_t    memory_all  = 0; // bytes
};

std::vector<std::string> backend_names(); // registered backends, with or without a device
std::vector<Device>      devices();
// Makes the devices of an RPC server ("host:port") known, for models loaded from now on. The
// engine ends the process if it cannot connect, so look first whether a server listens there.
Status      add_rpc_server(const std::string & endpoint);
std::string engine_version(); // llama.cpp's own, such as "0.6.0"
std::string engine_build();   // "build 11549" or a commit, as pinned; "unknown" of other sources
std::string system_info();    // instruction sets and build options, the engine's words

} // namespace imatrix
