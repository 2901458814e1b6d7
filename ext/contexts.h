// A model's two contexts, the trunk's and its MTP head's: they are opened together, and the rows
// that the trunk gives become the states of the head's slots. A slot holds a token of the text and
// a state. Both a session, which collects, and an evaluator, which scores, run on it.
#pragma once

#include "engine_context.h"
#include "graph_plan.h"
#include "model.h"
#include "status.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace imatrix {

struct ContextsParams {
    int32_t n_ctx     = 512; // tokens a chunk
    int32_t n_batch   = 512; // tokens a decode
    int32_t n_ubatch  = 512; // tokens a graph
    int32_t n_seq     = 1;   // chunks a decode
    int32_t n_threads = 1;
    bool    mtp       = false; // a head is there too; it takes one chunk at a time
    bool    computes  = true;  // see EngineContextParams

    // Rows of a decode whose logits are asked for, at most.
    int32_t n_outputs      = 1; // of the trunk
    int32_t n_head_outputs = 1;
    // Cells of its own that each branch of the head's text needs, see share_cells(); negative: the
    // head's memory has no branches. If a head shares the trunk's memory, that one has branches
    // without cells in any case.
    int32_t branch_cells = -1;
    // The rows that the head gives are read: the next head, or the next step of a draft, gets them.
    bool reads_head_rows = false;
    // Every row of a decode must reach every wanted weight. If some weights see only rows whose
    // logits are asked for, the logits of all rows are.
    bool all_rows      = false;
    bool output_weight = false; // the trunk's LM head is wanted too

    EvalCallback on_node; // sees every node of both contexts
};

// Chunks of tokens, which follow each other in `tokens`.
struct Chunks {
    const int32_t * tokens;
    const int32_t * lengths;
    int32_t         count;

    int32_t         longest() const { return *std::max_element(lengths, lengths + count); }
    int64_t         total() const { return std::accumulate(lengths, lengths + count, int64_t{0}); }
    const int32_t * text(int32_t chunk) const {
        return std::accumulate(lengths, lengths + chunk, tokens);
    }
};

// One row of a decode.
struct Row {
    int32_t       token;
    int32_t       pos;
    int32_t       seq;
    const float * state;          // [n_embd], of a head; NULL for the trunk
    bool          output = false; // its logits are wanted
};

// The rows of one decode of the trunk. Sequence s of it holds the chunk first_chunk + s.
struct TrunkDecode {
    int32_t          first_chunk;
    std::vector<Row> rows;
};

class Contexts {
public:
    // `head` is the model that holds the head: the same one, or a file of its own; NULL if no head
    // will be asked for. The models must outlive the contexts. `cancelled` ends decodes early.
    Contexts(const Model & trunk, const Model * head, std::atomic<bool> & cancelled)
        : model_(trunk), head_model_(head), cancelled_(cancelled) {}

    // Makes the contexts anew. After a failure none is open.
    Status open(const ContextsParams & params);
    void   close();
    bool   is_open() const { return trunk_.ctx != nullptr; }

    bool    has_head() const { return head_.ctx != nullptr; }
    int32_t n_heads() const { return n_heads_; } // graphs of the head, one after the other
    int32_t n_embd() const { return n_embd_; }   // width of the rows that a head gets
    bool    sharing() const { return sharing_; } // the head reads the trunk's keys and values
    bool    causal() const { return causal_; }   // a token sees only those before it
    // A sequence can share a part of the text, not only all of it.
    bool    shares_parts() const { return !head_model_->copies_whole_sequences(); }
    int32_t together() const; // slots that run side by side, each in a branch of its own

    const Model &          model(bool head) const { return head ? *head_model_ : model_; }
    const llama_context *  context(bool head) const { return side(head).ctx.get(); }
    const GraphPlan &      plan(bool head) const { return side(head).plan; }
    int32_t                n_outputs(bool head) const { return side(head).n_outputs; }
    const ContextsParams & params() const { return params_; }

    // --- decodes of the trunk

    // The decodes that take chunks through the trunk: parts of n_batch tokens, or whole chunks if
    // tokens see those after them. The logits of no row are wanted yet.
    std::vector<TrunkDecode> trunk_decodes(const Chunks & chunks) const;

    // To be called before chunks of at most n_tokens: forgets the rows of the last ones.
    void forget_rows(int32_t n_tokens);

    // What is kept of the trunk for the head's slots, and the same put back in place of a pass of
    // the trunk. Of no use to a head that shares the trunk's memory.
    const std::vector<float> & rows_for_head() const { return states_; }
    void put_rows_for_head(const std::vector<float> & rows) { states_ = rows; }

    // Empties the memory first if the chunks begin with this decode. If there is a head, the rows
    // that the trunk gives are kept for its slots.
    Status decode_trunk(const TrunkDecode & decode);

    // Waits for what still runs.
    void synchronize();

    // --- decodes of the head

    // Slot p holds token x_p, and as its state the trunk's row of p-1, or zeros if p is 0.
    Row slot(const int32_t * tokens, int32_t p, int32_t seq, bool output = false) const;

    // Makes `head` the one that decodes, and empties its memory, which all heads use. Not of a head
    // that shares the trunk's memory.
    void select_head(int32_t head);

    // At most n_batch rows.
    Status decode_head(const Row * rows, size_t count);

    // Slots [first, end) of the text, as sequence 0.
    Status feed_text(const int32_t * tokens, int32_t first, int32_t end);

    // Makes sequence `seq` a branch of the text: it shares those cells of sequence 0 that are below
    // position `end`. Without shares_parts() these must be all that there are.
    void share_cells(int32_t seq, int32_t end) const;
    void drop_branches(int32_t n) const; // sequences 1 .. n

    // --- what a decode gave, by row; valid until the next one

    const float * logits(bool head, int32_t row) const; // NULL if they were not asked for
    const float * head_row(int32_t row) const;          // NULL if the head gives none

private:
    // One of the two, and what was found out about its graph.
    struct Side {
        ContextPtr ctx;
        BatchPtr   batch;
        GraphPlan  plan;
        bool       all_outputs = false; // the logits of every row are asked for
        int32_t    n_outputs   = 0;     // rows whose logits there is room for
    };

    Side &       side(bool head) { return head ? head_ : trunk_; }
    const Side & side(bool head) const { return head ? head_ : trunk_; }

    Status open_both();
    Status open_side(bool head);
    Status make(bool head);
    Status check_head_runs() const;
    Status decode(bool head, const Row * rows, size_t count);
    Status keep_rows(const std::vector<Row> & rows);

    const Model &       model_;
    const Model *       head_model_;
    std::atomic<bool> & cancelled_;
    ContextsParams      params_;
    Side                trunk_;
    Side                head_; // freed before the trunk, which it refers to
    int32_t             n_heads_ = 0;
    int32_t             n_embd_  = 0;
    bool                sharing_ = false;
    bool                causal_  = true;
    std::vector<float>  states_; // [n_tokens + 1, n_embd], row p is the state of slot p
};

} // namespace imatrix
