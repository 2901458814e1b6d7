// How well a row of logits predicts a token, and how far it is from another row.
#pragma once

#include <cstdint>

namespace imatrix {

// Positions n/2 .. n-2 of a chunk of n tokens are scored, each by how it predicts the next token,
// as llama-imatrix and llama-perplexity do it.
inline int32_t first_scored(int32_t n_tokens) { return n_tokens / 2; }
inline bool    is_scored(int32_t position, int32_t n_tokens) {
    return position >= first_scored(n_tokens) && position + 1 < n_tokens;
}

struct Softmax {
    int32_t top;     // the likeliest token, the first of equals
    double  log_sum; // of exp(x - x[top])
};

int32_t top_of(const float * logits, int32_t n_vocab);
Softmax softmax_of(const float * logits, int32_t n_vocab);

// -log p(token), in nats
double nll_of(const float * logits, const Softmax & softmax, int32_t token);

// KL(Q || P) in nats: the sum over the vocabulary of q (log q - log p), where q are the
// probabilities that the logits `q` stand for, and p those of `p`.
double kl_of(const float * q, const Softmax & q_softmax, const float * p, const Softmax & p_softmax,
             int32_t n_vocab);

// Negative log-likelihood of the scored positions of a chunk, in nats.
struct ChunkScore {
    double  nll      = 0;
    double  nll_sq   = 0; // sum of squares, for the standard error
    int64_t n_scored = 0;

    void add(double value);
};

} // namespace imatrix
