#include "evaluator.h"

#include "engine_log.h"
#include "scores.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace imatrix {

void Predictions::resize(size_t n, bool with_reference) {
    nll.assign(n, 0.0);
    top.assign(n, -1);
    reference_nll.assign(with_reference ? n : 0, 0.0);
    reference_top.assign(with_reference ? n : 0, -1);
    kl.assign(with_reference ? n : 0, 0.0);
}

Evaluator::Evaluator(const Model & model, const Model * head, const Model * reference,
                     const Model * reference_head)
    : model_(model), reference_model_(reference), contexts_(model, head, cancelled_) {
    if (reference != nullptr) {
        reference_ = std::make_unique<Contexts>(*reference, reference_head, cancelled_);
    }
}

std::vector<Contexts *> Evaluator::both() {
    std::vector<Contexts *> out{&contexts_};
    if (reference_ != nullptr) {
        out.push_back(reference_.get());
    }
    return out;
}

Status Evaluator::open(const EvaluatorParams & params) {
    kept_.clear();
    for (Contexts * each : both()) {
        each->close();
    }
    if (params.depth < 1 || params.depth > INT8_MAX || params.n_batch < params.depth) {
        return Status::failed(Code::bad_argument, "depth must be 1 to 127, and at most n_batch");
    }
    if (reference_model_ != nullptr && reference_model_->n_vocab() != model_.n_vocab()) {
        return Status::failed(Code::bad_argument, "the reference has " +
                                                      std::to_string(reference_model_->n_vocab()) +
                                                      " tokens in its vocabulary, the model has " +
                                                      std::to_string(model_.n_vocab()));
    }
    params_ = params;
    threads_.set_threads(static_cast<size_t>(std::max(1, params.n_threads)));
    ContextsParams needs; // one chunk at a time, as a head takes it
    needs.n_ctx     = params.n_ctx;
    needs.n_batch   = params.n_batch;
    needs.n_ubatch  = params.n_ubatch;
    needs.n_threads = params.n_threads;
    needs.mtp       = params.mtp;
    // the second half of a chunk is scored
    needs.n_outputs       = std::min(params.n_batch, (params.n_ctx + 1) / 2);
    needs.n_head_outputs  = needs.n_outputs;
    needs.branch_cells    = params.depth - 1; // see draft_step
    needs.reads_head_rows = true;
    for (Contexts * each : both()) {
        Status status = each->open(needs);
        if (status.ok() && !each->causal() && !each->plan(/*head=*/false).gives_logits) {
            // those that make embeddings have none (src/models/bert.cpp, modern-bert.cpp)
            status = Status::failed(Code::bad_model, "this architecture gives no logits, so that "
                                                     "there is nothing to evaluate");
        }
        if (status.ok() && each->sharing() != contexts_.sharing()) {
            status = Status::failed(Code::bad_argument,
                                    "the heads of the model and the reference are of two kinds");
        }
        if (!status.ok()) {
            contexts_.close();
            return status;
        }
    }
    return {};
}

// Scores rows of the last decode: row k of the engine's batch predicts targets[index].
Status Evaluator::score(bool head, const int32_t * targets, const std::vector<Scored> & rows,
                        Predictions & out) {
    std::vector<const float *> logits(rows.size());
    std::vector<const float *> reference(reference_ != nullptr ? rows.size() : 0);
    for (size_t k = 0; k < rows.size(); ++k) {
        logits[k] = contexts_.logits(head, rows[k].row);
        if (reference_ != nullptr) {
            reference[k] = reference_->logits(head, rows[k].row);
        }
        if (logits[k] == nullptr || (reference_ != nullptr && reference[k] == nullptr)) {
            return engine_error(Code::engine_failed, "the engine gave no logits");
        }
    }
    const int32_t n_vocab = model_.n_vocab();
    threads_.run(rows.size(), [&](size_t k) {
        const size_t  i       = static_cast<size_t>(rows[k].index);
        const Softmax softmax = softmax_of(logits[k], n_vocab);
        out.nll[i]            = nll_of(logits[k], softmax, targets[i]);
        out.top[i]            = softmax.top;
        if (!reference.empty()) {
            const Softmax theirs = softmax_of(reference[k], n_vocab);
            out.reference_nll[i] = nll_of(reference[k], theirs, targets[i]);
            out.reference_top[i] = theirs.top;
            out.kl[i]            = kl_of(reference[k], theirs, logits[k], softmax, n_vocab);
        }
    });
    for (const Scored & row : rows) {
        const size_t i      = static_cast<size_t>(row.index);
        bool         finite = std::isfinite(out.nll[i]);
        if (!reference.empty()) {
            finite = finite && std::isfinite(out.reference_nll[i]) && std::isfinite(out.kl[i]);
        }
        if (!finite) {
            Status status =
                Status::failed(Code::non_finite, std::string("NaN or infinite logits of the ") +
                                                     (head ? "head" : "trunk"));
            status.weight = head ? "head" : "trunk";
            return status;
        }
    }
    return {};
}

Status Evaluator::run_trunk(const int32_t * tokens, int32_t n_tokens, Predictions & out) {
    const int32_t begin = first_scored(n_tokens);
    for (TrunkDecode & part : contexts_.trunk_decodes({tokens, &n_tokens, 1})) {
        for (Row & row : part.rows) {
            row.output = row.pos >= begin;
        }
        for (Contexts * each : both()) {
            const Status status = each->decode_trunk(part);
            if (!status.ok()) {
                return status;
            }
        }
        std::vector<Scored> rows;
        for (size_t k = 0; k < part.rows.size(); ++k) {
            if (is_scored(part.rows[k].pos, n_tokens)) {
                rows.push_back({part.rows[k].pos - begin, static_cast<int32_t>(k)});
            }
        }
        const Status status = score(/*head=*/false, tokens + begin + 1, rows, out);
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

// The first head over the text, every slot with the trunk's row: depth 1 of a draft.
Status Evaluator::run_head(const int32_t * tokens, int32_t n_tokens, Predictions & out) {
    const int32_t begin   = first_scored(n_tokens);
    const bool    sharing = contexts_.sharing();
    // A head that shares the trunk's memory drafts at a position that the trunk has not seen yet
    // (common/speculative.cpp, is_mem_shared), so that slot p reads the cells before p: each slot
    // is a sequence of its own, and those that are not scored leave nothing behind.
    const int32_t step = sharing ? contexts_.together() : params_.n_batch;
    for (Contexts * each : both()) {
        if (!sharing) {
            each->select_head(0);
        }
    }
    for (int32_t first = sharing ? begin : 0; first < n_tokens - 1; first += step) {
        const int32_t end = std::min(first + step, n_tokens - 1);
        for (Contexts * each : both()) {
            std::vector<Row> slots;
            for (int32_t p = first; p < end; ++p) {
                const int32_t seq = sharing ? 1 + p - first : 0;
                if (sharing) {
                    each->share_cells(seq, p);
                }
                slots.push_back(each->slot(tokens, p, seq, p >= begin));
            }
            const Status status = each->decode_head(slots.data(), slots.size());
            if (sharing) {
                each->drop_branches(end - first);
            }
            if (!status.ok()) {
                return status;
            }
        }
        std::vector<Scored> rows;
        for (int32_t p = std::max(first, begin); p < end; ++p) {
            rows.push_back({p - begin, p - first});
        }
        const Status status = score(/*head=*/true, tokens + begin + 1, rows, out);
        if (!status.ok()) {
            return status;
        }
        for (size_t k = 0; k < rows.size() && params_.depth > 1; ++k) {
            const float * row = contexts_.head_row(rows[k].row);
            if (row == nullptr) {
                return Status::failed(Code::engine_failed,
                                      "the head of this architecture gives no rows to draft on");
            }
            std::copy_n(row, contexts_.n_embd(), hidden(1, rows[k].index));
        }
    }
    return {};
}

float * Evaluator::hidden(int32_t depth, int32_t scored) {
    return hidden_[static_cast<size_t>(depth - 1)].data() +
           static_cast<ptrdiff_t>(scored) * contexts_.n_embd();
}

// Drafts as the engine does (common/speculative.cpp, common_speculative_impl_draft_mtp::draft),
// from every scored slot: token d_1 for x_{p+1}, from it and the head's own row d_2, and so on.
// Greedy speculative decoding accepts d_k if d_1 .. d_{k-1} were accepted and d_k is what the
// trunk then says. What the trunk says after d_1 .. d_{k-1} is at hand only if these are the
// text's own tokens; otherwise depth k is not known, and nothing is concluded from the slot.
Status Evaluator::draft(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    const int32_t        scored   = first_scored(n_tokens);
    const int32_t        n_scored = static_cast<int32_t>(out.head.top.size());
    std::vector<int32_t> drafted  = out.head.top;
    for (int32_t i = 0; i < n_scored; ++i) {
        out.known[i]    = 1;
        out.accepted[i] = drafted[i] == out.trunk.top[i] ? 1 : 0;
    }
    // a chain of heads has one for each depth (common/speculative.cpp, n_max)
    const bool    chain = contexts_.n_heads() > 1;
    const int32_t depth = chain ? std::min(params_.depth, contexts_.n_heads()) : params_.depth;
    for (int32_t k = 2; k <= depth; ++k) {
        std::vector<int32_t> slots;
        for (int32_t i = 0; i + k - 1 < n_scored; ++i) {
            if (out.accepted[i] == k - 1 && drafted[i] == tokens[scored + i + k - 1]) {
                slots.push_back(i);
            }
        }
        if (slots.empty()) {
            break;
        }
        Status status;
        if (chain && contexts_.shares_parts()) { // otherwise draft_step feeds the text
            contexts_.select_head(k - 1);
            status = contexts_.feed_text(tokens, 0, n_tokens - 1);
        }
        if (status.ok()) {
            status = draft_step(tokens, scored, k, slots, drafted);
        }
        if (!status.ok()) {
            return status;
        }
        for (const int32_t i : slots) {
            out.known[i] = static_cast<int8_t>(k);
            out.accepted[i] += drafted[i] == out.trunk.top[i + k - 1] ? 1 : 0;
        }
    }
    return {};
}

// Token k of the drafts that begin at some scored slots. Each is a branch that shares the cells of
// the text up to slot p, where the head saw the trunk's rows; the slots after it hold the head's
// own rows. One head would find them in its cache from the step before, a chain of heads decodes
// them again under each next head: here both do. If the head's memory cannot share a part of a
// sequence, the text is fed anew, one slot after the other, and each branch shares all of it.
Status Evaluator::draft_step(const int32_t * tokens, int32_t scored, int32_t k,
                             const std::vector<int32_t> & slots, std::vector<int32_t> & drafted) {
    const bool    sharing = contexts_.sharing();
    const bool    anew    = !contexts_.shares_parts();
    const int32_t each    = sharing ? 1 : k - 1; // rows a slot
    const size_t  group   = anew ? 1
                                 : static_cast<size_t>(std::max(
                                       1, std::min(contexts_.together(), params_.n_batch / each)));
    const int32_t n_vocab = model_.n_vocab();
    int32_t       fed     = 0; // slots of the text in sequence 0, if it is fed anew
    if (anew) {
        contexts_.select_head(contexts_.n_heads() > 1 ? k - 1 : 0);
    }
    for (size_t first = 0; first < slots.size(); first += group) {
        const size_t     end = std::min(first + group, slots.size());
        std::vector<Row> rows;
        Status           status;
        if (anew) {
            status = contexts_.feed_text(tokens, fed, scored + slots[first] + 1);
            fed    = scored + slots[first] + 1;
        }
        if (!status.ok()) {
            return status;
        }
        for (size_t s = first; s < end; ++s) {
            const int32_t i   = slots[s];
            const int32_t p   = scored + i;
            const int32_t seq = static_cast<int32_t>(1 + s - first);
            if (sharing) { // all at the position of the first (draft(), is_mem_shared)
                contexts_.share_cells(seq, p);
                rows.push_back({drafted[i], p, seq, hidden(k - 1, i), true});
                continue;
            }
            contexts_.share_cells(seq, p + 1);
            for (int32_t j = 1; j < k; ++j) {
                rows.push_back({tokens[p + j], p + j, seq, hidden(j, i), j == k - 1});
            }
        }
        status = contexts_.decode_head(rows.data(), rows.size());
        contexts_.drop_branches(static_cast<int32_t>(end - first));
        if (!status.ok()) {
            return status;
        }
        for (size_t s = first; s < end; ++s) {
            const int32_t row    = static_cast<int32_t>((s - first + 1) * each - 1);
            const float * logits = contexts_.logits(/*head=*/true, row);
            const float * given  = contexts_.head_row(row);
            if (logits == nullptr || given == nullptr) {
                return engine_error(Code::engine_failed, "the head gave nothing to draft on");
            }
            drafted[slots[s]] = top_of(logits, n_vocab);
            std::copy_n(given, contexts_.n_embd(), hidden(k, slots[s]));
        }
    }
    return {};
}

void Evaluator::start(int32_t n_tokens, ChunkEvaluation & out) {
    clear_error();
    const size_t n_scored = static_cast<size_t>(std::max(0, n_tokens - 1 - first_scored(n_tokens)));
    const bool   compared = reference_ != nullptr;
    out.trunk.resize(n_scored, compared);
    out.head.resize(params_.mtp ? n_scored : 0, compared && params_.mtp);
    out.known.assign(params_.mtp ? n_scored : 0, 0);
    out.accepted.assign(params_.mtp ? n_scored : 0, 0);
    for (Contexts * each : both()) {
        each->forget_rows(n_tokens);
    }
}

// After the trunk.
Status Evaluator::evaluate_head(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    hidden_.resize(static_cast<size_t>(params_.depth));
    for (std::vector<float> & rows : hidden_) {
        rows.assign(out.head.nll.size() * static_cast<size_t>(contexts_.n_embd()), 0.0f);
    }
    const Status status = run_head(tokens, n_tokens, out.head);
    return status.ok() ? draft(tokens, n_tokens, out) : status;
}

Status Evaluator::evaluate(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    start(n_tokens, out);
    const Status status = run_trunk(tokens, n_tokens, out.trunk);
    return status.ok() && params_.mtp ? evaluate_head(tokens, n_tokens, out) : status;
}

Status Evaluator::check_chunk(int32_t n_tokens) const {
    if (!contexts_.is_open()) {
        return Status::failed(Code::bad_argument, "the evaluator is not open");
    }
    if (n_tokens < 1 || n_tokens > params_.n_ctx) {
        return Status::failed(Code::bad_argument, "1 to n_ctx tokens a chunk");
    }
    return {};
}

Status Evaluator::step(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    const Status status = check_chunk(n_tokens);
    return status.ok() ? guarded("in a chunk", [&] { return evaluate(tokens, n_tokens, out); })
                       : status;
}

Status Evaluator::keep(const int32_t * tokens, int32_t n_tokens) {
    Status status = check_chunk(n_tokens);
    if (status.ok() && (!params_.mtp || reference_ != nullptr)) {
        status = Status::failed(Code::bad_argument,
                                "chunks are kept for a head, and not beside a reference");
    }
    if (!status.ok()) {
        return status;
    }
    return guarded("while keeping a chunk's rows", [&] {
        Kept            kept;
        ChunkEvaluation out;
        start(n_tokens, out);
        const Status ran = run_trunk(tokens, n_tokens, out.trunk);
        if (ran.ok()) {
            kept.tokens.assign(tokens, tokens + n_tokens);
            kept.trunk = std::move(out.trunk);
            if (!contexts_.sharing()) {
                kept.rows = contexts_.rows_for_head();
            }
            kept_.push_back(std::move(kept));
        }
        return ran;
    });
}

Status Evaluator::step_kept(int32_t chunk, ChunkEvaluation & out) {
    if (chunk < 0 || chunk >= n_kept()) {
        return Status::failed(Code::bad_argument, "chunk " + std::to_string(chunk) +
                                                      " is none of the " +
                                                      std::to_string(n_kept()) + " that were kept");
    }
    return guarded("in a chunk", [&] {
        const Kept & kept     = kept_[static_cast<size_t>(chunk)];
        const auto   n_tokens = static_cast<int32_t>(kept.tokens.size());
        if (contexts_.sharing()) { // it reads what the trunk's pass leaves in its memory
            return evaluate(kept.tokens.data(), n_tokens, out);
        }
        start(n_tokens, out);
        out.trunk = kept.trunk;
        contexts_.put_rows_for_head(kept.rows);
        return evaluate_head(kept.tokens.data(), n_tokens, out);
    });
}

} // namespace imatrix
