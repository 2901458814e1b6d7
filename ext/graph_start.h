// Runs graphs from a block on: what the blocks before it gave is kept, and the nodes that only
// lead up to it are left out.
//
// The engine has no way to begin a graph in its midst. The eval callback sees each node before
// it is computed, though (ggml-backend.cpp, compute_splits): a node whose operation is made
// GGML_OP_NONE there is passed over by every backend, as views are. The rows of the block before go
// where the graph would have put them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;

namespace imatrix {

// How a graph can begin at a block.
struct GraphStart {
    int64_t              n_nodes = 0; // of the graph, as the callback sees them
    int64_t              cut = -1;    // number of the node that gives the rows; negative: it cannot
    std::string          cut_name;
    std::vector<uint8_t> left_out; // by node, up to the cut: nothing behind the cut needs it
    std::vector<char>    rows;     // what the node gave
};

// One decode is one graph.
class GraphStarter {
public:
    // Matches ggml_backend_sched_eval_callback; user_data is the GraphStarter.
    static bool callback(ggml_tensor * node, bool ask, void * user_data) noexcept;

    // Before a decode: its graph begins at `from` (NULL: it runs whole). `kept` (or NULL) is filled
    // with how the same graph can begin at `block`; its `cut` is negative if the graph has no rows
    // that the engine names as those of the block before.
    void begin(const GraphStart * from, GraphStart * kept, int32_t block);
    // After it, once nothing runs any more. False: the graph was another one than `from` was made
    // of, and what it gave is worth nothing. May throw bad_alloc.
    bool end();

private:
    struct Node {
        ggml_tensor * tensor;
        int           op; // before this changed it
    };

    bool ask(ggml_tensor * node);
    void computed(ggml_tensor * node);
    void find_left_out();

    const GraphStart *       from_ = nullptr;
    GraphStart *             kept_ = nullptr;
    std::vector<std::string> keep_; // names of the rows that are kept
    std::vector<Node>        nodes_;
    bool                     other_  = false; // another graph than from_ is of
    bool                     failed_ = false; // out of memory
};

} // namespace imatrix
