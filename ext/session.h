// Collects: text chunks go through a model's trunk and, if it is wanted, its MTP head, and the
// activations that reach a weight go into the sums.
#pragma once

#include "contexts.h"
#include "eval_hook.h"
#include "live.h"
#include "memory_use.h"
#include "model.h"
#include "scores.h"
#include "status.h"
#include "sums.h"

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace imatrix {

// What becomes of slot 0 of a head: the chunk's first token beside a state of zeros. The engine's
// driver puts it into the head's cache, where every draft attends to it, and begins no draft there
// (common/speculative.cpp, process() and draft() of draft-mtp). Only `cached` is what drafting
// does; the other two are for comparisons.
enum class FirstSlot : int32_t {
    cached,  // it is in the cache, its rows are not counted
    counted, // it is in the cache, its rows are counted
    absent,  // it is left out, as llama-imatrix --nextn leaves it out
};

struct SessionParams {
    int32_t n_ctx            = 512; // tokens a chunk
    int32_t n_batch          = 512; // tokens a decode
    int32_t n_ubatch         = 512; // tokens a graph
    int32_t n_seq            = 1;   // chunks a decode; 1 with mtp
    int32_t n_threads        = 1;
    bool    mtp              = false;
    bool    process_output   = false; // what the LM head reads as well (trunk only)
    bool    perplexity       = false;
    bool    signed_sums      = true; // keep sums of the activations beside those of squares
    bool    device_sums      = true; // sum rows on the device that holds them, if it can
    bool    leave_out_logits = true; // if they are asked for and nobody reads them
    bool    computes         = true; // false: for try_decode() only

    FirstSlot first_slot = FirstSlot::cached; // of a head with keys and values of its own
};

class Session : public Counted<Session> {
public:
    // `head` is the model that holds the head: the same one, or a file of its own; NULL if no head
    // will be asked for. The models must outlive the session.
    Session(const Model & trunk, const Model * head);
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
    // gives its head. The model must be loaded with no_alloc and the session opened with computes =
    // false; afterwards the session is of no use.
    Status try_decode();

    // Puts back what an earlier session had committed for weights that shared their activation;
    // before the first step(). If they do not share it here, the first chunk finds out.
    // `signed_sums`: NULL if there are none.
    Status restore(const std::vector<std::string> & names, const Shape & shape, const double * sums,
                   const int64_t * counts, const double * signed_sums);

    // Back to zero; contexts and all else stay. Between two steps.
    void clear_sums() { sums_.clear(); }

    // From any thread: ends the running step() early with Code::cancelled.
    void cancel() { cancelled_ = true; }
    void clear_cancel() { cancelled_ = false; }

    // Off: the same graphs run and nobody looks at them (benchmarks).
    void set_hook_enabled(bool enabled) { hook_.set_enabled(enabled); }

    const Sums &         sums() const { return sums_; }
    const HookCounters & counters() const { return hook_.counters(); }
    const GraphPlan &    trunk_plan() const { return contexts_.plan(/*head=*/false); }
    const GraphPlan &    head_plan() const { return contexts_.plan(/*head=*/true); }
    const char *         kernel() const;

    // Empty before open().
    std::vector<MemoryUse> memory() const { return memory_use(contexts_); }

private:
    bool   may_end_early() const;
    Status collect(const Chunks & chunks);
    Status decode_trunk(const Chunks & chunks, TrunkDecode & part);
    Status score(const Chunks & chunks, const TrunkDecode & part);
    Status run_heads(const int32_t * tokens, int32_t n_tokens);
    Status run_later_head(int32_t head, const int32_t * tokens, int32_t n_tokens);
    Status run_sharing_head(const int32_t * tokens, int32_t n_tokens);
    Status feed_head(const std::vector<Row> & rows, bool observed, std::vector<float> * given);
    Status after_decode(Status decoded) const;
    Status check_rows(int64_t n_tokens) const;

    int64_t slots_before(const std::string & weight) const;

    const Model *           head_model_;
    SessionParams           params_;
    Sums                    sums_;
    EvalHook                hook_{sums_};
    std::atomic<bool>       cancelled_{false};
    Contexts                contexts_;
    std::vector<ChunkScore> scores_; // of the running step
    // given_[d] row p is the state of slot p at depth d+1: the row that head d gave for slot p-1.
    std::vector<std::vector<float>> given_;
};

} // namespace imatrix
