// Small graphs of matrix multiplications under the eval hook, for tests.
#pragma once

#include "eval_hook.h"
#include "sums.h"

#include "ggml-backend.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace imatrix::testing {

// An activation: a view of a flat array of floats. Strides and offset count floats.
struct Rows {
    const float *          data = nullptr;
    size_t                 size = 0; // of data
    std::array<int64_t, 4> ne{1, 1, 1, 1};
    std::array<int64_t, 4> stride{1, 1, 1, 1};
    int64_t                offset = 0;
};

// Which experts each token uses: a view of a flat array, as the engine's top-k gives it.
struct Ids {
    const int32_t * data   = nullptr;
    size_t          size   = 0;
    int64_t         n_used = 1;
    int64_t         n_rows = 1;
    int64_t         stride = 1; // from a token's ids to the next one's
    int64_t         offset = 0;
};

// One MUL_MAT, or with ids one MUL_MAT_ID, in the order of the graph. Without n_out the rows are
// copied into memory that outlives the graph instead, as keys, values and states are.
struct Product {
    std::string weight;
    int64_t     n_out = 1;
    int64_t     ne2   = 1; // the weight's; with ids the number of experts
    int64_t     ne3   = 1;
    size_t      rows  = 0;  // which activation
    int         ids   = -1; // which ids, -1 for none
};

enum class Where {
    host,    // everything on the CPU backend
    device,  // everything in memory that the host cannot read
    offload, // weights on the host, computed by the device: the scheduler copies and renames them
};

class Harness {
public:
    // `device`: one of the engine's by name, "Vulkan0"; by default that of far_device.h.
    explicit Harness(Where where, const std::string & device = {});
    ~Harness();
    Harness(const Harness &)             = delete;
    Harness & operator=(const Harness &) = delete;

    // Runs one graph with the hook as eval callback. With `replay` nothing is computed: the
    // callback is walked over the nodes as the scheduler would, so that graphs which ggml itself
    // refuses can be shown to it. Tensors lie at the same addresses in every call, as the
    // tensors of successive ubatches do. Returns "" or what ggml reported.
    std::string run(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                    const std::vector<Product> & products, bool replay);

    // planned_weights() of the graph that run() would run
    std::vector<PlannedWeight> plan(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                                    const std::vector<Product> & products, bool output_weight);
    // end_of() that graph
    GraphEnd end(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                 const std::vector<Product> & products);

    // What the copies of the last run() hold, in their order.
    std::vector<std::vector<float>> copied;

    Sums     sums;
    EvalHook hook{sums};

private:
    struct Graph;
    std::unique_ptr<Graph> build(const std::vector<Rows> & rows, const std::vector<Ids> & ids,
                                 const std::vector<Product> & products);

    Where                         where_;
    std::vector<ggml_backend_t>   backends_; // the CPU last, as the scheduler wants it
    ggml_backend_sched_t          scheduler_ = nullptr;
    std::vector<std::max_align_t> memory_[4]; // of the ggml contexts
};

} // namespace imatrix::testing
