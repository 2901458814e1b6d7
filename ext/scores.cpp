#include "scores.h"

#include <algorithm>
#include <cmath>

namespace imatrix {

int32_t top_of(const float * logits, int32_t n_vocab) {
    return static_cast<int32_t>(std::max_element(logits, logits + n_vocab) - logits);
}

// As tools/perplexity/perplexity.cpp computes it: exp in float32, the sum in float64.
Softmax softmax_of(const float * logits, int32_t n_vocab) {
    const int32_t top = top_of(logits, n_vocab);
    double        sum = 0.0;
    for (int32_t v = 0; v < n_vocab; ++v) {
        sum += std::exp(logits[v] - logits[top]);
    }
    return {top, std::log(sum)};
}

double nll_of(const float * logits, const Softmax & softmax, int32_t token) {
    return softmax.log_sum - static_cast<double>(logits[token] - logits[softmax.top]);
}

double kl_of(const float * q, const Softmax & q_softmax, const float * p, const Softmax & p_softmax,
             int32_t n_vocab) {
    const float  q_top  = q[q_softmax.top];
    const double q_base = static_cast<double>(q_top) + q_softmax.log_sum;
    const double p_base = static_cast<double>(p[p_softmax.top]) + p_softmax.log_sum;
    double       sum    = 0.0;
    for (int32_t v = 0; v < n_vocab; ++v) {
        const float weight = std::exp(q[v] - q_top);
        if (weight > 0.0f) {
            sum += weight *
                   ((static_cast<double>(q[v]) - q_base) - (static_cast<double>(p[v]) - p_base));
        }
    }
    return sum / std::exp(q_softmax.log_sum);
}

void ChunkScore::add(double value) {
    nll += value;
    nll_sq += value * value;
    ++n_scored;
}

} // namespace imatrix
