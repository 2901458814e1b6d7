#include "trials.h"

#include "engine_log.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace imatrix {
namespace {

// Passes that begin at a block give the same logits as whole ones, to the bit, where a backend
// computes each node by itself. Where it fuses nodes across the border, they may differ by
// rounding: this much, in nats a token, is far below the divergence that any type causes.
constexpr double kSamePass = 1e-6;

} // namespace

Trials::Trials(const Model & model) : model_(model), contexts_(model, nullptr, cancelled_) {}

Status Trials::open(const TrialsParams & params) {
    contexts_.close();
    chunks_.clear();
    begins_at_ = 0;
    params_    = params;
    if (params.top < 0 || params.top > model_.n_vocab()) {
        return Status::failed(Code::bad_argument,
                              "top must be 0 to the " + std::to_string(model_.n_vocab()) +
                                  " tokens of the vocabulary, got " + std::to_string(params.top));
    }
    threads_.set_threads(static_cast<size_t>(std::max(1, params.n_threads)));
    ContextsParams needs;
    needs.n_ctx     = params.n_ctx;
    needs.n_batch   = params.n_ctx; // one decode, one graph: what is kept of a graph is of a chunk
    needs.n_ubatch  = params.n_ctx;
    needs.n_threads = params.n_threads;
    needs.n_outputs = (params.n_ctx + 1) / 2; // the second half of a chunk is scored
    needs.on_node   = {GraphStarter::callback, &starter_};
    Status status   = contexts_.open(needs);
    if (status.ok() && !contexts_.plan(/*head=*/false).gives_logits) {
        contexts_.close();
        status = Status::failed(Code::bad_model, "this architecture gives no logits to compare");
    }
    return status;
}

int64_t Trials::kept_bytes() const {
    size_t bytes = 0;
    for (const Chunk & chunk : chunks_) {
        bytes += chunk.logits.size() * sizeof(float) + chunk.ids.size() * sizeof(int32_t);
        for (const GraphStart & start : chunk.starts) {
            bytes += start.rows.size() + start.left_out.size();
        }
    }
    return static_cast<int64_t>(bytes);
}

// One pass over a chunk, from where its passes begin. `kept` (or NULL) is filled with how they can
// begin at `block`. `look` is called of each scored row, on any thread.
Status Trials::pass(Chunk & chunk, int32_t block, std::vector<GraphStart> * kept, Look look,
                    Predictions & out) {
    clear_error();
    const auto    n_tokens = static_cast<int32_t>(chunk.tokens.size());
    const int32_t begin    = first_scored(n_tokens);
    const bool    whole    = chunk.starts.empty();
    const auto    decodes  = contexts_.trunk_decodes({chunk.tokens.data(), &n_tokens, 1});
    if (kept != nullptr) {
        kept->assign(decodes.size(), {});
    }
    for (size_t d = 0; d < decodes.size(); ++d) {
        TrunkDecode decode = decodes[d];
        for (Row & row : decode.rows) {
            row.output = row.pos >= begin;
        }
        starter_.begin(whole ? nullptr : &chunk.starts[d], kept == nullptr ? nullptr : &(*kept)[d],
                       block);
        Status status = contexts_.decode_trunk(decode);
        contexts_.synchronize();
        const bool same = starter_.end();
        if (status.ok() && !same) {
            status = Status::failed(Code::engine_failed,
                                    "the engine built another graph of the same chunk");
        }
        if (!status.ok()) {
            return status;
        }
        std::vector<std::pair<size_t, const float *>> rows;
        for (size_t k = 0; k < decode.rows.size(); ++k) {
            if (is_scored(decode.rows[k].pos, n_tokens)) {
                const float * logits = contexts_.logits(/*head=*/false, static_cast<int32_t>(k));
                if (logits == nullptr) {
                    return engine_error(Code::engine_failed, "the engine gave no logits");
                }
                rows.emplace_back(static_cast<size_t>(decode.rows[k].pos - begin), logits);
            }
        }
        threads_.run(rows.size(),
                     [&](size_t k) { (this->*look)(chunk, rows[k].first, rows[k].second, out); });
    }
    const bool finite =
        std::all_of(out.nll.begin(), out.nll.end(), [](double v) { return std::isfinite(v); }) &&
        std::all_of(out.kl.begin(), out.kl.end(), [](double v) { return std::isfinite(v); });
    if (!finite) {
        Status status = Status::failed(Code::non_finite, "NaN or infinite logits of the trunk");
        status.weight = "trunk";
        return status;
    }
    return {};
}

void Trials::keep_row(Chunk & chunk, size_t row, const float * logits, Predictions & out) {
    const int32_t n_vocab = model_.n_vocab();
    const auto    target  = chunk.tokens.size() / 2 + row + 1;
    KeptRow &     kept    = chunk.rows[row];
    kept.softmax          = softmax_of(logits, n_vocab);
    kept.top_logit        = logits[kept.softmax.top];
    out.nll[row]          = nll_of(logits, kept.softmax, chunk.tokens[target]);
    out.top[row]          = kept.softmax.top;
    const auto top        = static_cast<size_t>(params_.top);
    if (top == 0) {
        std::copy_n(logits, n_vocab, chunk.logits.begin() + static_cast<ptrdiff_t>(row) * n_vocab);
        return;
    }
    std::vector<int32_t> ids(static_cast<size_t>(n_vocab));
    std::iota(ids.begin(), ids.end(), 0);
    const auto likelier = [logits](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    std::partial_sort(ids.begin(), ids.begin() + params_.top, ids.end(), likelier);
    const double base  = static_cast<double>(kept.top_logit) + kept.softmax.log_sum;
    double       known = 0.0;
    for (size_t k = 0; k < top; ++k) {
        chunk.ids[row * top + k]    = ids[k];
        chunk.logits[row * top + k] = logits[ids[k]];
        known += std::exp(static_cast<double>(logits[ids[k]]) - base);
    }
    kept.rest = std::max(0.0, 1.0 - known);
}

double Trials::divergence(const Chunk & chunk, size_t row, const float * logits,
                          const Softmax & softmax) const {
    const KeptRow & kept = chunk.rows[row];
    const auto      top  = static_cast<size_t>(params_.top);
    if (top == 0) {
        const int32_t n_vocab = model_.n_vocab();
        return kl_of(chunk.logits.data() + row * static_cast<size_t>(n_vocab), kept.softmax, logits,
                     softmax, n_vocab);
    }
    const double q_base = static_cast<double>(kept.top_logit) + kept.softmax.log_sum;
    const double p_base = static_cast<double>(logits[softmax.top]) + softmax.log_sum;
    double       sum    = 0.0;
    double       known  = 0.0;
    for (size_t k = 0; k < top; ++k) {
        const double q = static_cast<double>(chunk.logits[row * top + k]) - q_base;
        const double p = static_cast<double>(logits[chunk.ids[row * top + k]]) - p_base;
        sum += std::exp(q) * (q - p);
        known += std::exp(p);
    }
    // all other tokens as one: no more than what they would give one by one (the log-sum
    // inequality)
    if (kept.rest > 0.0) {
        sum += kept.rest * std::log(kept.rest / std::max(1.0 - known, 1e-12));
    }
    return sum;
}

void Trials::compare_row(Chunk & chunk, size_t row, const float * logits, Predictions & out) {
    const Softmax softmax = softmax_of(logits, model_.n_vocab());
    const auto    target  = chunk.tokens.size() / 2 + row + 1;
    out.nll[row]          = nll_of(logits, softmax, chunk.tokens[target]);
    out.top[row]          = softmax.top;
    out.kl[row]           = divergence(chunk, row, logits, softmax);
}

Status Trials::keep(const int32_t * tokens, int32_t n_tokens, Predictions & out) {
    if (!contexts_.is_open()) {
        return Status::failed(Code::bad_argument, "the trials are not open");
    }
    if (n_tokens < 1 || n_tokens > params_.n_ctx) {
        return Status::failed(Code::bad_argument, "1 to n_ctx tokens a chunk");
    }
    if (begins_at_ != 0) {
        return Status::failed(Code::bad_argument, "chunks are kept before runs begin at a block");
    }
    return guarded("while keeping a chunk's logits", [&]() -> Status {
        const auto n_scored =
            static_cast<size_t>(std::max(0, n_tokens - 1 - first_scored(n_tokens)));
        const auto each = static_cast<size_t>(params_.top > 0 ? params_.top : model_.n_vocab());
        Chunk      chunk;
        chunk.tokens.assign(tokens, tokens + n_tokens);
        chunk.rows.resize(n_scored);
        chunk.logits.resize(n_scored * each);
        chunk.ids.resize(params_.top > 0 ? n_scored * each : 0);
        out.resize(n_scored, /*with_reference=*/false);
        Status status = pass(chunk, 0, nullptr, &Trials::keep_row, out);
        if (status.ok()) {
            chunks_.push_back(std::move(chunk));
        }
        return status;
    });
}

Status Trials::run(int32_t chunk, Predictions & out) {
    if (chunk < 0 || chunk >= count()) {
        return Status::failed(Code::bad_argument, "chunk " + std::to_string(chunk) +
                                                      " is none of the " + std::to_string(count()) +
                                                      " that were kept");
    }
    return guarded("in a chunk", [&]() -> Status {
        Chunk & kept = chunks_[static_cast<size_t>(chunk)];
        out.resize(kept.rows.size(), /*with_reference=*/false);
        out.kl.assign(kept.rows.size(), 0.0);
        return pass(kept, 0, nullptr, &Trials::compare_row, out);
    });
}

// That a run of the unchanged weights gives what was kept.
Status Trials::check_start(int32_t chunk) {
    Predictions  found;
    const Status status = run(chunk, found);
    if (!status.ok() || found.kl.empty()) {
        return status;
    }
    const double mean = std::accumulate(found.kl.begin(), found.kl.end(), 0.0) /
                        static_cast<double>(found.kl.size());
    if (std::fabs(mean) > kSamePass) {
        return Status::failed(Code::engine_failed, "a pass that begins at a block strays by " +
                                                       std::to_string(mean) + " nats");
    }
    return {};
}

Status Trials::start(int32_t block, int32_t & begins_at) {
    begins_at = begins_at_;
    if (block < 0) {
        return Status::failed(Code::bad_argument,
                              "no block has the number " + std::to_string(block));
    }
    return guarded("while keeping the rows of a block", [&]() -> Status {
        if (block < begins_at_ || block == 0) {
            for (Chunk & chunk : chunks_) {
                chunk.starts.clear();
            }
            begins_at_ = 0;
        }
        begins_at = begins_at_;
        if (block == begins_at_ || chunks_.empty()) {
            return {};
        }
        std::vector<std::vector<GraphStart>> starts(chunks_.size());
        for (size_t i = 0; i < chunks_.size(); ++i) {
            Chunk &     chunk = chunks_[i];
            Predictions unused;
            unused.resize(chunk.rows.size(), /*with_reference=*/false);
            unused.kl.assign(chunk.rows.size(), 0.0);
            const Status status = pass(chunk, block, &starts[i], &Trials::compare_row, unused);
            if (!status.ok()) {
                return status;
            }
            const bool can = std::all_of(starts[i].begin(), starts[i].end(),
                                         [](const GraphStart & start) { return start.cut >= 0; });
            if (!can) {
                return {}; // its graphs have no such rows
            }
        }
        for (size_t i = 0; i < chunks_.size(); ++i) {
            chunks_[i].starts.swap(starts[i]);
        }
        // the first one: another chunk was the last to fill the memory, so that a pass that reads
        // what it does not write would stray
        const Status status = check_start(0);
        if (status.code == Code::cancelled || status.code == Code::out_of_memory || status.ok()) {
            if (!status.ok()) {
                for (size_t i = 0; i < chunks_.size(); ++i) {
                    chunks_[i].starts.swap(starts[i]);
                }
                return status;
            }
            begins_at = begins_at_ = block;
            return {};
        }
        log_line(3, "passes cannot begin at block " + std::to_string(block) + ": " +
                        status.message + "; they begin at block " + std::to_string(begins_at_));
        for (size_t i = 0; i < chunks_.size(); ++i) {
            chunks_[i].starts.swap(starts[i]);
        }
        return {};
    });
}

} // namespace imatrix
