// One product of the engine: a matrix of some type times rows of float32, as a graph of a model on
// the CPU has it, to see how long this processor takes for it.
#pragma once

#include "status.h"

#include <cstdint>
#include <memory>
#include <string>

namespace imatrix {

struct ProductParams {
    std::string type;          // the matrix's, ggml's name: "f16"
    int64_t     n_in      = 0; // values of a row
    int64_t     n_out     = 0; // rows of a matrix, values of a result
    int64_t     n_rows    = 0;
    int64_t     n_mat     = 1; // more than one: experts; the rows go to them in turn
    int32_t     n_threads = 1;
};

class Product {
public:
    Product();
    ~Product();
    Product(const Product &)             = delete;
    Product & operator=(const Product &) = delete;

    // The matrix lies in the buffer type that the engine's loader would choose for a weight of this
    // type and operation without a GPU (make_cpu_buft_list and weight_buft_supported in its
    // sources), so that the same kernel multiplies.
    Status open(const ProductParams & params);

    // Multiplies once. `seconds`: how long that took.
    Status run(double & seconds);

    // The name of the buffer type: "CPU", "CPU_REPACK", "AMX".
    std::string buffer_type() const;

private:
    struct Engine;
    std::unique_ptr<Engine> engine_;
};

} // namespace imatrix
