// A model with its trunk context and, where wanted, its MTP context; text chunks go through
// both and their squared activations into the sums.
#pragma once

#include "context.h"
#include "eval_hook.h"
#include "live.h"
#include "placement.h"
#include "status.h"
#include "sums.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_model;

namespace imatrix {

// A failure of the engine. It says why in its log only: its first error line goes into `what`.
Status engine_error(Code code, const std::string & what);

struct ModelParams {
    std::string path;
    bool        mtp           = false; // load the head's tensors too
    int32_t     n_gpu_layers  = -1;    // all
    bool        use_mmap      = true;
    bool        check_tensors = false;
    bool        no_alloc      = false; // shapes only: graphs can be built, nothing can run
    Placement   placement;             // of what is put on devices
};

// The weights and the tokenizer. Outlives every Session made from it.
class Model {
public:
    Status load(const ModelParams & params);

    llama_model * get() const { return model_.get(); }
    int32_t       n_nextn() const;
    int32_t       n_trunk() const;
    int32_t       n_vocab() const;
    int32_t       n_ctx_train() const;
    bool          has_tokenizer() const;
    bool          has_decoder() const;
    bool          has_encoder() const;
    bool          copies_whole_sequences() const; // llama_memory_seq_cp takes no part of one
    bool          shares_memory() const;          // a head that reads its trunk's keys and values
    bool          add_bos() const;
    int32_t       bos() const;
    std::string   description() const;
    std::string   token_text(int32_t token) const; // "" for a token that there is not

    // Whether a token sees only those before it, as a context of the engine says.
    Status causal(bool & out) const;

    // Keys that begin with `prefix` and their values as text, arrays left out.
    std::vector<std::pair<std::string, std::string>> metadata(const std::string & prefix) const;

    Status tokenize(const std::string & text, bool add_special, bool parse_special,
                    std::vector<int32_t> & out) const;

private:
    struct Free {
        void operator()(llama_model * model) const;
    };
    bool   is_architecture(const char * name) const;
    Status tokenize_here(const std::string & text, bool add_special, bool parse_special,
                         std::vector<int32_t> & out) const;

    std::unique_ptr<llama_model, Free> model_;
};

// Put before the weights of a head that is a model of its own kind (gemma4-assistant): its
// blocks are numbered from 0 like the trunk's.
inline constexpr const char * kForeignHead = "mtp:";

// What becomes of slot 0 of a head: the chunk's first token beside a state of zeros. The engine's
// driver puts it into the head's cache, where every draft attends to it, and begins no draft there
// (common/speculative.cpp, process() and draft() of draft-mtp). Only `cached` is what drafting
// does; the other two are for comparisons.
enum class FirstSlot : int32_t {
    cached,  // in the cache, its rows are not counted
    counted, // in the cache, its rows are counted
    absent,  // left out, as llama-imatrix --nextn leaves it out
};

struct SessionParams {
    int32_t n_ctx            = 512; // tokens a chunk
    int32_t n_batch          = 512; // tokens a decode
    int32_t n_ubatch         = 512; // tokens a graph
    int32_t n_seq            = 1;   // chunks a decode
    int32_t n_threads        = 1;
    bool    mtp              = false;
    bool    process_output   = false; // what the LM head reads as well (trunk only)
    bool    perplexity       = false;
    bool    signed_sums      = true; // keep sums of the activations beside those of squares
    bool    device_sums      = true; // sum rows on the device that holds them, where it can
    bool    leave_out_logits = true; // where they are asked for and nobody reads them
    bool    computes         = true; // false: for try_decode() only

    FirstSlot first_slot = FirstSlot::cached; // of a head with keys and values of its own
};

// Negative log-likelihood of the second half of a chunk, as llama-imatrix scores it:
// positions n/2 .. n-2, each predicting its next token.
struct ChunkScore {
    double  nll      = 0;
    double  nll_sq   = 0; // sum of squares, for the standard error
    int64_t n_scored = 0;
};

// What a context's graph does with the wanted weights, read off the graph before anything
// runs: which it multiplies, how many rows a token feeds each, and whether it keeps rows
// only where an output is requested.
struct GraphPlan {
    std::vector<PlannedWeight> weights; // rows a token; 0 where rows do not follow the tokens
    bool                       needs_outputs = false;
    GraphEnd                   end; // with outputs for all rows
};

// Bytes that a session takes in one kind of memory. From a model loaded with no_alloc, what it
// would take.
struct MemoryUse {
    std::string device;         // the engine's name, "CPU", "CUDA0", ...
    bool        host    = true; // the system's own memory
    bool        plain   = true; // the CPU's own kind: weights lie in the file's pages if mapped
    int64_t     model   = 0;    // weights
    int64_t     context = 0;    // keys, values and states
    int64_t     compute = 0;    // a graph's activations, logits, rows for the head
};

class Session : public Counted<Session> {
public:
    // `head` is the model that holds the head: the same one, or a file of its own. Both must
    // outlive the session. NULL where no head will be asked for.
    Session(const Model & trunk, const Model * head) : model_(trunk), head_model_(head) {}
    Session(const Session &)             = delete;
    Session & operator=(const Session &) = delete;

    // Makes the contexts. The sums of an earlier open() stay: settings may change between.
    Status open(const SessionParams & params);

    // Collects `n_chunks` chunks (at most n_seq) in one go: chunk i has lengths[i] tokens, at
    // most n_ctx; they follow each other in `tokens`. All count, or none does.
    Status step(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                ChunkScore * scores);

    // Decodes a chunk up to where the engine would begin to compute, and a few rows of the head:
    // batches, memory and inputs are as they are in a run, graphs too but for the rows that a trunk
    // gives its head. Of a model loaded with no_alloc, on a session opened with computes = false,
    // which is of no use afterwards.
    Status try_decode();

    // Puts back what an earlier session had committed for weights that shared their activation;
    // before the first step(). Should they not share it here, the first chunk finds out.
    // `signed_sums`: NULL if there are none.
    Status restore(const std::vector<std::string> & names, const Shape & shape, const double * sums,
                   const int64_t * counts, const double * signed_sums);

    // Back to zero, contexts and all else stay. Between two steps.
    void clear_sums() { sums_.clear(); }

    // From any thread: ends the running step() early with Code::cancelled.
    void cancel() { cancelled_ = true; }
    void clear_cancel() { cancelled_ = false; }

    // Runs the same graphs without looking at them (benchmarks).
    void set_hook_enabled(bool enabled);

    const Sums &         sums() const { return sums_; }
    const HookCounters & counters() const { return hook_.counters(); }
    const GraphPlan &    trunk_plan() const { return trunk_plan_; }
    const GraphPlan &    head_plan() const { return head_plan_; }
    const char *         kernel() const;

    // Empty before open().
    std::vector<MemoryUse> memory() const;

private:
    struct HeadRow { // one row for the MTP context
        int32_t       token;
        int32_t       pos;
        int32_t       seq;
        const float * state; // [n_embd_h_]
    };

    Status make_context(bool head, bool all_outputs, ContextPtr & out);
    Status open_context(bool head, bool all_outputs, ContextPtr & ctx, GraphPlan & plan);
    bool   may_end_early() const;
    Status probe(llama_context * ctx, bool head, GraphPlan & plan);
    Status decode_whole(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks);
    Status collect(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                   ChunkScore * scores);
    Status decode_trunk(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                        int32_t first, std::vector<double> * nll);
    Status keep_rows(int32_t first, int32_t n_tokens);
    Status run_heads(const int32_t * tokens, int32_t n_tokens);
    Status run_later_head(int32_t head, const int32_t * tokens, int32_t n_tokens);
    Status feed_head(const std::vector<HeadRow> & rows, bool observed, std::vector<float> * out);
    Status after_decode(int32_t rc, const char * which);
    Status run_sharing_head(const int32_t * tokens, int32_t n_tokens);
    Status check_rows(int64_t n_tokens) const;
    void   score(const int32_t * tokens, const std::vector<int32_t> & positions,
                 const std::vector<int32_t> & batch_index, std::vector<double> & nll);

    int64_t slots_before(const std::string & weight) const;

    const Model & model_;
    const Model * head_model_;
    SessionParams params_;
    Sums          sums_;
    EvalHook      hook_{sums_};
    ContextPtr    trunk_;
    ContextPtr    head_; // freed before the trunk, which it refers to
    BatchPtr      trunk_batch_;
    BatchPtr      head_batch_;
    GraphPlan     trunk_plan_;
    GraphPlan     head_plan_;
    int32_t       n_heads_  = 0;     // graphs of the head, one after the other
    bool          causal_   = true;  // a token sees only those before it
    bool          sharing_  = false; // the head shares the trunk's memory
    int32_t       n_embd_h_ = 0;     // width of the rows that go from the trunk to the head
    // states_[d] row p is the state of slot p at depth d: zeros for slot 0; then at depth 0 the
    // trunk's row of slot p-1, at depth d the row that head d-1 gave for slot p-1.
    std::vector<std::vector<float>>  states_;
    std::atomic<bool>                cancelled_{false};
    std::vector<std::vector<double>> nll_; // per chunk, in the order of positions
};

} // namespace imatrix
