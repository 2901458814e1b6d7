// A trunk whose weights are changed (weights.h) over the same chunks again and again: how far it
// strays from what it gave at first.
#pragma once

#include "contexts.h"
#include "evaluator.h"
#include "graph_start.h"
#include "live.h"
#include "model.h"
#include "parallel.h"
#include "scores.h"
#include "status.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace imatrix {

struct TrialsParams {
    int32_t n_ctx     = 512; // tokens a chunk, and a decode, and a graph
    int32_t n_threads = 1;
    // Logits that are kept of a row: the likeliest ones, 0 for all. Of the rest only the sum of
    // their probabilities is known then, so that the divergences found are lower bounds.
    int32_t top = 0;
};

class Trials : public Counted<Trials> {
public:
    explicit Trials(const Model & model); // which must outlive it

    Status open(const TrialsParams & params);

    // Runs a chunk of 1 to n_ctx tokens as the weights are now, and keeps what it gives.
    Status keep(const int32_t * tokens, int32_t n_tokens, Predictions & out);

    // Later runs begin at this block, as far as the graphs can. All weights of the blocks before
    // must be what they were when the chunks were kept, now and from then on. `begins_at` becomes
    // the block at which runs begin.
    Status start(int32_t block, int32_t & begins_at);

    // Runs a kept chunk as the weights are now. `kl` is from what was kept, as Evaluator gives it.
    Status run(int32_t chunk, Predictions & out);

    int32_t count() const { return static_cast<int32_t>(chunks_.size()); }
    // Bytes that keeping chunks has taken.
    int64_t kept_bytes() const;

    // From any thread: ends the running call early with Code::cancelled.
    void cancel() { cancelled_ = true; }
    void clear_cancel() { cancelled_ = false; }

private:
    // A row of logits as they were at first.
    struct KeptRow {
        Softmax softmax;
        float   top_logit = 0.0f;
        double  rest      = 0.0; // probability of all tokens that are not kept
    };
    struct Chunk {
        std::vector<int32_t>    tokens;
        std::vector<KeptRow>    rows;
        std::vector<float>      logits; // [rows, n_vocab], or [rows, top]
        std::vector<int32_t>    ids;    // [rows, top]; empty if all are kept
        std::vector<GraphStart> starts; // by decode; empty: its runs are whole
    };
    using Look = void (Trials::*)(Chunk & chunk, size_t row, const float * logits,
                                  Predictions & out);

    Status pass(Chunk & chunk, int32_t block, std::vector<GraphStart> * kept, Look look,
                Predictions & out);
    void   keep_row(Chunk & chunk, size_t row, const float * logits, Predictions & out);
    void   compare_row(Chunk & chunk, size_t row, const float * logits, Predictions & out);
    double divergence(const Chunk & chunk, size_t row, const float * logits,
                      const Softmax & softmax) const;
    Status check_start(int32_t chunk);

    const Model &      model_;
    std::atomic<bool>  cancelled_{false};
    TrialsParams       params_;
    Parallel           threads_;
    GraphStarter       starter_;
    Contexts           contexts_;
    std::vector<Chunk> chunks_;
    int32_t            begins_at_ = 0;
};

} // namespace imatrix
