// How well a model and its MTP head predict a text, and how far each strays from a reference.
#pragma once

#include "context.h"
#include "live.h"
#include "parallel.h"
#include "session.h"
#include "status.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace imatrix {

struct EvaluatorParams {
    int32_t n_ctx     = 512; // tokens a chunk
    int32_t n_batch   = 512; // tokens a decode
    int32_t n_ubatch  = 512; // tokens a graph
    int32_t n_threads = 1;
    int32_t depth     = 3; // tokens the head drafts
    bool    mtp       = false;
};

// One entry a scored position: p = n/2 .. n-2 of a chunk of n tokens, where x_{p+1} is predicted
// (tools/perplexity/perplexity.cpp scores the same).
struct Predictions {
    std::vector<double>  nll; // -log p(x_{p+1}), nats
    std::vector<int32_t> top; // the likeliest token, the first of equals
    // empty without a reference
    std::vector<double>  reference_nll;
    std::vector<int32_t> reference_top;
    std::vector<double>  kl; // KL(reference || model), nats, over the whole vocabulary

    void resize(size_t n, bool with_reference);
};

struct ChunkEvaluation {
    Predictions trunk;
    Predictions head; // empty without one; slot p holds x_p and the trunk's row p-1
    // Per scored slot, how deep a draft that begins there can be judged by the text, and how
    // many of its tokens the trunk would accept: see Evaluator::draft.
    std::vector<int8_t> known;
    std::vector<int8_t> accepted;
};

// A model's contexts: the trunk's and, where wanted, the head's.
class Runner {
public:
    Runner(const Model & trunk, const Model * head, std::atomic<bool> & cancelled)
        : model_(trunk), head_model_(head), cancelled_(cancelled) {}

    struct Row {
        int32_t       token;
        int32_t       pos;
        int32_t       seq;
        const float * state;  // [n_embd], NULL for the trunk
        bool          output; // logits wanted; and the hidden row, of a head
    };

    Status open(const EvaluatorParams & params);
    Status begin(int32_t n_tokens);

    // Positions [first, first + count) of the chunk; logits from position `scored` on.
    Status decode_trunk(const int32_t * tokens, int32_t first, int32_t count, int32_t scored);
    // The rows of the head, at most n_batch of them.
    Status decode_head(const std::vector<Row> & rows);

    // Of the last decode, by row; valid until the next one. NULL where none was asked for.
    const float * trunk_logits(int32_t row) const;
    const float * head_logits(int32_t row) const;
    const float * head_hidden(int32_t row) const;

    Row slot(const int32_t * tokens, int32_t p, int32_t seq, bool output) const;
    // Sequence seq gets those cells of sequence 0 that are below position end. Without parts() they
    // must be all that there are.
    void share_cells(int32_t seq, int32_t end) const;
    bool parts() const { return parts_; } // whether a part of a sequence can be shared
    void drop_sequences(int32_t n) const; // 1 .. n
    // Makes head k the one that decodes, with keys and values from the trunk's rows of the
    // slots below `end`.
    Status select_head(int32_t k, const int32_t * tokens, int32_t end);
    // The first head over slots [first, end), with the trunk's rows; from slot 0 on it forgets what
    // it had before.
    Status feed_text(const int32_t * tokens, int32_t first, int32_t end);

    int32_t n_embd() const { return n_embd_; }
    int32_t n_heads() const { return n_heads_; }
    bool    sharing() const { return sharing_; }
    int32_t together() const; // slots that run side by side in sequences of their own

private:
    Status make_context(bool head, ContextPtr & out);
    Status crops_rows(llama_context * ctx, bool & out) const;
    Status gives_logits(llama_context * ctx, bool & out) const;
    Status decode(llama_context * ctx, llama_batch_ext * batch, const std::vector<Row> & rows,
                  const char * which);

    const Model &       model_;
    const Model *       head_model_;
    std::atomic<bool> & cancelled_;
    EvaluatorParams     params_;
    ContextPtr          trunk_;
    ContextPtr          head_; // freed before the trunk, which it refers to
    BatchPtr            trunk_batch_;
    BatchPtr            head_batch_;
    int32_t             n_embd_      = 0;
    int32_t             n_heads_     = 0;
    bool                sharing_     = false;
    bool                parts_       = true;
    bool                all_outputs_ = false;
    std::vector<float>  states_; // row p is the state of slot p: zeros, then the trunk's rows
};

class Evaluator : public Counted<Evaluator> {
public:
    // The reference's models are NULL without one; heads are NULL where none is evaluated. All
    // must outlive the evaluator.
    Evaluator(const Model & model, const Model * head, const Model * reference,
              const Model * reference_head);

    Status open(const EvaluatorParams & params);

    // One chunk of 1 to n_ctx tokens, a memory of its own. A failed chunk leaves nothing behind.
    Status step(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);

    // From any thread: ends the running step() early with Code::cancelled.
    void cancel() { cancelled_ = true; }
    void clear_cancel() { cancelled_ = false; }

private:
    // A scored position and the row of the last decode that predicts it.
    struct Scored {
        int32_t index; // position - n/2
        int32_t row;
    };

    Status evaluate(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);
    Status run_trunk(const int32_t * tokens, int32_t n_tokens, Predictions & out);
    Status run_head(const int32_t * tokens, int32_t n_tokens, Predictions & out);
    Status draft(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);
    Status draft_step(const int32_t * tokens, int32_t scored, int32_t k,
                      const std::vector<int32_t> & slots, std::vector<int32_t> & drafted);
    Status score(bool head, const int32_t * targets, const std::vector<Scored> & rows,
                 Predictions & out);

    const Model &           model_;
    const Model *           reference_model_;
    std::atomic<bool>       cancelled_{false};
    EvaluatorParams         params_;
    Parallel                threads_; // that score rows
    std::unique_ptr<Runner> runner_;
    std::unique_ptr<Runner> reference_; // NULL without one
    // hidden_[k] row i: what the head gave at depth k+1 of the draft that begins at scored slot i
    std::vector<std::vector<float>> hidden_;
};

} // namespace imatrix
