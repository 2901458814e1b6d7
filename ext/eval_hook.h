// The ggml eval callback: it sees every matrix multiplication of a graph as it runs, and adds the
// rows that reach a wanted weight, and their squares, to the sums.
#pragma once

#include "add_rows.h"
#include "device_sums.h"
#include "parallel.h"
#include "staged_rows.h"
#include "sums.h"
#include "wanted_nodes.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;

namespace imatrix {

enum class Failure {
    none,
    non_finite,    // a NaN or Inf reached a weight
    bad_expert,    // an expert id outside the weight
    bad_layout,    // rows that are not contiguous, or a shape this store cannot hold
    shape_changed, // the same weight with another shape than before
    regroup,       // weights that shared an activation no longer do: redo without sharing
    device_failed, // a device that was summing its rows
    out_of_memory,
};

// The first thing that went wrong since begin_chunk().
struct HookError {
    Failure     kind = Failure::none;
    std::string weight;
    int64_t     mat     = -1; // matrix or expert id, -1 if it has no meaning
    int64_t     channel = -1; // input channel, likewise
};

// What the hook did, for tests and benchmarks.
struct HookCounters {
    int64_t stops            = 0; // nodes that the scheduler had to stop after
    int64_t fetched_bytes    = 0; // bytes copied from buffers that the host cannot read
    int64_t squared_elements = 0;
    int64_t ended            = 0; // graphs that were left before their end
};

class EvalHook {
public:
    explicit EvalHook(Sums & sums) : sums_(sums) {}

    // Matches ggml_backend_sched_eval_callback; user_data is the EvalHook.
    static bool callback(ggml_tensor * node, bool ask, void * user_data) noexcept;

    void begin_chunk(); // forgets the last chunk's error
    // Waits until all rows that were copied to the host are added. What is wrong with them is in
    // error() then, and the sums may be dropped.
    void settle();
    // After the last decode of a chunk: settles, and what the devices hold goes to the pending
    // sums. Throws bad_alloc only.
    void finish_chunk();
    // Before every llama_process: a new graph comes. `prefix` keeps the weights of a model of
    // its own, whose block numbers start again at 0, apart from the trunk's.
    void begin_decode(Wanted wanted, const std::string & prefix = {});
    void set_enabled(bool enabled) { enabled_ = enabled; }
    bool enabled() const { return enabled_; }
    // Off for graphs that only prepare keys and values.
    void set_observing(bool observing) { observing_ = observing; }
    // Off: rows in a device's memory are copied to the host and summed there.
    void set_device_sums(bool on) { device_sums_ = on; }
    // Leaves every graph there; {} runs them to their end. Nobody may read what a graph computes
    // after that: of several splits the scheduler leaves the one that the last node is in, and runs
    // those after it on what was never computed (ggml-backend.cpp, compute_splits).
    void end_after(GraphEnd end) { end_ = end; }
    void set_threads(size_t n) {
        threads_.set_threads(n);
        staged_.set_threads(n);
    }
    // For other work between two decodes.
    Parallel & threads() { return threads_; }
    bool       grouping() const { return grouping_; }
    void       stop_grouping() { grouping_ = false; }

    // With sharing, weights of one slot must all have seen the rows that went into it.
    bool groups_agree() const;

    const HookError &    error() const { return error_; }
    const HookCounters & counters() const { return counters_; }

private:
    struct Activation { // one that was fetched in this graph already
        const ggml_tensor * rows;
        const ggml_tensor * ids;
        Shape               shape;
        size_t              slot;
    };

    bool ask(ggml_tensor * node);
    void start_graph() { run_ = {}; }
    bool is_new(ggml_tensor * node, int64_t rows);
    void collect(ggml_tensor * node);
    bool visit(ggml_tensor * node);
    void forget(const ggml_tensor * computed);
    void fail(Failure kind, const std::string & weight, int64_t mat = -1, int64_t channel = -1);
    bool take_slot(size_t weight, const Shape & shape, size_t shared);
    const char * host_bytes(const ggml_tensor * tensor, std::vector<char> & staging);
    bool add_sums(size_t weight, size_t slot, int64_t mat, const float * partial, bool both);
    void collect_dense(size_t weight, const ggml_tensor * node);
    void collect_experts(size_t weight, const ggml_tensor * node);
    void add_routed_rows(size_t weight, const ggml_tensor * x);
    void list_rows(size_t slot, const ggml_tensor * x, const char * data,
                   std::vector<const float *> & rows, std::vector<RowBlock> & blocks,
                   std::vector<int64_t> & mats);
    void fail_non_finite(size_t weight, size_t slot, int64_t mat, int64_t channel);
    void read_ids(const ggml_tensor * ids);
    bool summed_there(size_t weight, DeviceSums::Outcome outcome, int64_t n_rows);

    Sums &       sums_;
    HookError    error_;
    HookCounters counters_;
    bool         enabled_   = true;
    bool         observing_ = true;
    bool         grouping_  = true;
    Wanted       wanted_;
    std::string  prefix_;

    GraphEnd end_;                // of every graph
    GraphEnd run_;                // of this graph so far
    bool     ending_     = false; // the node to be computed now is the last one
    bool     collecting_ = false; // its rows are to be collected

    uint64_t                   graph_ = 0;    // which graph execution this is
    std::vector<uint64_t>      seen_in_;      // per weight: the graph it was last seen in
    std::vector<uint64_t>      slot_made_in_; // per slot: the graph it was made in
    std::vector<uint64_t>      slot_fed_in_;  // per slot: the graph it was last fed in
    std::vector<Activation>    activations_;  // of this graph
    bool                       device_sums_ = true;
    DeviceSums                 devices_;
    StagedRows                 staged_; // rows copied from devices
    std::vector<char>          staging_ids_;
    std::vector<int32_t>       ids_;     // [n_tokens, n_used]
    RowNumbers                 rows_of_; // of the node that is collected
    std::vector<const float *> rows_;
    std::vector<RowBlock>      blocks_;
    std::vector<int64_t>       block_mats_;
    Parallel                   threads_;
};

} // namespace imatrix
