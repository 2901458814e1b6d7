// Bytes that a model and its contexts take, by kind of memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace imatrix {

class Contexts;

// Bytes in one kind of memory. Of a model that was loaded with no_alloc, what it would take.
struct MemoryUse {
    std::string device;         // the engine's name, "CPU", "CUDA0", ...
    bool        host    = true; // the system's own memory
    bool        plain   = true; // the CPU's own kind: weights lie in the file's pages if mapped
    int64_t     model   = 0;    // weights
    int64_t     context = 0;    // keys, values and states
    int64_t     compute = 0;    // a graph's activations, logits, rows for the head
};

// Empty if the contexts are not open.
std::vector<MemoryUse> memory_use(const Contexts & contexts);

} // namespace imatrix
