// Which tensors the engine wants for an architecture, learned from key-values alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace imatrix::testing {

struct TensorShape {
    std::string          name;
    std::vector<int64_t> ne; // ggml's order: the row length first
    std::string          type;
};

// Reads the keys of a GGUF file (with or without tensors) and lets the engine make a model of
// them, optional tensors included. Throws std::runtime_error with the engine's log. The engine
// may also end the process: its assertions do not unwind.
std::vector<TensorShape> tensor_shapes(const std::string & path);

} // namespace imatrix::testing
