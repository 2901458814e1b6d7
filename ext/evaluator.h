// How well a model and its MTP head predict a text, and how far each strays from a reference.
#pragma once

#include "contexts.h"
#include "live.h"
#include "model.h"
#include "parallel.h"
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

// One entry a scored position p of a chunk (scores.h), at which x_{p+1} is predicted.
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
    Predictions head; // empty without one
    // Per scored slot, how deep a draft that begins there can be judged by the text, and how
    // many of its tokens the trunk would accept: see Evaluator::draft.
    std::vector<int8_t> known;
    std::vector<int8_t> accepted;
};

class Evaluator : public Counted<Evaluator> {
public:
    // Without a reference its models are NULL; without a head to evaluate, the heads are. All must
    // outlive the evaluator.
    Evaluator(const Model & model, const Model * head, const Model * reference,
              const Model * reference_head);

    Status open(const EvaluatorParams & params);

    // One chunk of 1 to n_ctx tokens, a memory of its own. A failed chunk leaves nothing behind.
    Status step(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);

    // Runs the trunk over a chunk and keeps what it gives, so that step_kept() can run the head
    // over it again and again, with other weights of the head. Of one with a head and without a
    // reference.
    Status  keep(const int32_t * tokens, int32_t n_tokens);
    int32_t n_kept() const { return static_cast<int32_t>(kept_.size()); }
    // As step() of that chunk, counted from 0, if the trunk is as it was.
    Status step_kept(int32_t chunk, ChunkEvaluation & out);

    // From any thread: ends the running step() early with Code::cancelled.
    void cancel() { cancelled_ = true; }
    void clear_cancel() { cancelled_ = false; }

private:
    // A scored position and the row of the last decode that predicts it.
    struct Scored {
        int32_t index; // position - first_scored()
        int32_t row;
    };

    struct Kept {
        std::vector<int32_t> tokens;
        std::vector<float>   rows; // for the head's slots; empty if it shares the trunk's memory
        Predictions          trunk;
    };

    std::vector<Contexts *> both(); // the reference's too, if there is one
    Status evaluate(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);
    Status evaluate_head(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);
    void   start(int32_t n_tokens, ChunkEvaluation & out);
    Status check_chunk(int32_t n_tokens) const;
    Status run_trunk(const int32_t * tokens, int32_t n_tokens, Predictions & out);
    Status run_head(const int32_t * tokens, int32_t n_tokens, Predictions & out);
    Status draft(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out);
    Status draft_step(const int32_t * tokens, int32_t scored, int32_t k,
                      const std::vector<int32_t> & slots, std::vector<int32_t> & drafted);
    Status score(bool head, const int32_t * targets, const std::vector<Scored> & rows,
                 Predictions & out);

    // What the head gave at `depth` of the draft that begins at a scored slot, [n_embd].
    float * hidden(int32_t depth, int32_t scored);

    const Model &                   model_;
    const Model *                   reference_model_;
    std::atomic<bool>               cancelled_{false};
    EvaluatorParams                 params_;
    Parallel                        threads_; // they score rows
    Contexts                        contexts_;
    std::unique_ptr<Contexts>       reference_; // NULL without one
    std::vector<std::vector<float>> hidden_;    // see hidden()
    std::vector<Kept>               kept_;
};

} // namespace imatrix
