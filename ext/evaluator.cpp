#include "evaluator.h"

#include "engine_log.h"

#include "ggml.h"
#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace imatrix {
namespace {

struct Softmax {
    int32_t top;     // the first of the largest
    double  log_sum; // of exp(x - x[top])
};

int32_t top_of(const float * x, int32_t n) {
    return static_cast<int32_t>(std::max_element(x, x + n) - x);
}

// As tools/perplexity/perplexity.cpp computes it: exp in float32, the sum in float64.
Softmax softmax_of(const float * x, int32_t n) {
    const int32_t top = top_of(x, n);
    double        sum = 0.0;
    for (int32_t v = 0; v < n; ++v) {
        sum += std::exp(x[v] - x[top]);
    }
    return {top, std::log(sum)};
}

double nll_of(const float * x, const Softmax & softmax, int32_t token) {
    return softmax.log_sum - static_cast<double>(x[token] - x[softmax.top]);
}

// sum over v of q_v (log q_v - log p_v), where q is the reference's distribution, p the model's
double kl_of(const float * q, const Softmax & q_softmax, const float * p, const Softmax & p_softmax,
             int32_t n) {
    const float  q_top  = q[q_softmax.top];
    const double q_base = static_cast<double>(q_top) + q_softmax.log_sum;
    const double p_base = static_cast<double>(p[p_softmax.top]) + p_softmax.log_sum;
    double       sum    = 0.0;
    for (int32_t v = 0; v < n; ++v) {
        const float weight = std::exp(q[v] - q_top);
        if (weight > 0.0f) {
            sum += weight *
                   ((static_cast<double>(q[v]) - q_base) - (static_cast<double>(p[v]) - p_base));
        }
    }
    return sum / std::exp(q_softmax.log_sum);
}

} // namespace

void Predictions::resize(size_t n, bool with_reference) {
    nll.assign(n, 0.0);
    top.assign(n, -1);
    reference_nll.assign(with_reference ? n : 0, 0.0);
    reference_top.assign(with_reference ? n : 0, -1);
    kl.assign(with_reference ? n : 0, 0.0);
}

// --- Runner ----------------------------------------------------------------

int32_t Runner::together() const { return std::min(kSlotsTogether, params_.n_batch); }

Status Runner::make_context(bool head, ContextPtr & out) {
    ContextParams params;
    params.n_ctx     = params_.n_ctx;
    params.n_batch   = params_.n_batch;
    params.n_ubatch  = params_.n_ubatch;
    params.n_threads = params_.n_threads;
    params.n_whole   = params_.n_ctx;
    params.cancelled = &cancelled_;
    params.trunk     = head ? trunk_.get() : nullptr;
    // the second half of a chunk is scored
    const int32_t scored = std::min(params_.n_batch, (params_.n_ctx + 1) / 2);
    params.n_outputs     = !head && all_outputs_ ? params_.n_batch : scored;
    if (head || sharing_) { // drafts branch off, see share_cells
        params.branch_cells = sharing_ ? 0 : kSlotsTogether * (params_.depth - 1);
    }
    const Status status = imatrix::make_context(head ? *head_model_ : model_, params, out);
    if (!status.ok()) {
        return status;
    }
    // every token's row, of the trunk for the head and of the head for its next draft
    llama_set_embeddings_nextn(out.get(), head || params_.mtp, /*masked=*/false);
    return {};
}

// Whether a context's graph crops the rows that it gives to the output positions.
Status Runner::crops_rows(llama_context * ctx, bool & out) const {
    ggml_cgraph * graph = llama_graph_reserve(ctx, kProbeTokens, 1, 1);
    if (graph == nullptr) {
        return engine_error(Code::engine_failed, "the engine could not reserve a graph");
    }
    out = false;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (std::strcmp(node->name, "h_nextn") == 0 && node->ne[1] != kProbeTokens) {
            out = true;
        }
    }
    return {};
}

Status Runner::gives_logits(llama_context * ctx, bool & out) const {
    ggml_cgraph * graph = llama_graph_reserve(ctx, kProbeTokens, 1, kProbeTokens);
    if (graph == nullptr) {
        return engine_error(Code::engine_failed, "the engine could not reserve a graph");
    }
    out = ggml_graph_get_tensor(graph, "result_output") != nullptr;
    return {};
}

Status Runner::open(const EvaluatorParams & params) {
    params_      = params;
    all_outputs_ = false;
    if (params.mtp) {
        sharing_ = head_model_->shares_memory();
        parts_   = !head_model_->copies_whole_sequences();
        n_heads_ = sharing_ ? 1 : head_model_->n_nextn();
        n_embd_  = llama_model_n_embd_out(model_.get());
    }
    Status status = make_context(false, trunk_);
    all_outputs_  = status.ok() && llama_get_memory(trunk_.get()) == nullptr; // see make_context
    if (status.ok() && !is_causal(trunk_.get())) {
        // those that make embeddings have none (src/models/bert.cpp, modern-bert.cpp)
        bool         logits = false;
        const Status found  = gives_logits(trunk_.get(), logits);
        if (!found.ok() || !logits) {
            return !found.ok() ? found
                               : Status::failed(Code::bad_model,
                                                "this architecture gives no logits, so that there "
                                                "is nothing to evaluate");
        }
    }
    if (status.ok() && params.mtp) {
        status = crops_rows(trunk_.get(), all_outputs_);
        if (status.ok() && all_outputs_) {
            trunk_.reset();
            status = make_context(false, trunk_);
        }
        if (status.ok()) {
            status = make_context(true, head_);
        }
        // Where the graph crops (src/models/step35.cpp, mimo2.cpp), more rows would be read than
        // there are, unless masked. Where it does not (qwen35.cpp, glm4-moe.cpp, hy-v3.cpp),
        // masked takes the first rows of a graph for those of its outputs (llama-context.cpp,
        // extract nextn embeddings), which differ in a batch that has other rows before them.
        bool masked = false;
        if (status.ok()) {
            status = crops_rows(head_.get(), masked);
        }
        if (status.ok() && masked) {
            llama_set_embeddings_nextn(head_.get(), true, true);
        }
    }
    if (status.ok()) {
        trunk_batch_.reset(llama_batch_ext_init(trunk_.get()));
        if (head_ != nullptr) {
            head_batch_.reset(llama_batch_ext_init(head_.get()));
        }
    }
    return status;
}

Status Runner::begin(int32_t n_tokens) {
    llama_memory_clear(llama_get_memory(trunk_.get()), true);
    if (head_ != nullptr) {
        states_.assign(static_cast<size_t>(n_tokens + 1) * static_cast<size_t>(n_embd_), 0.0f);
        if (!sharing_) {
            llama_memory_clear(llama_get_memory(head_.get()), true);
            llama_set_nextn_layer_offset(head_.get(), 0);
        }
    }
    return {};
}

Status Runner::decode(llama_context * ctx, llama_batch_ext * batch, const std::vector<Row> & rows,
                      const char * which) {
    llama_batch_ext_clear(batch);
    for (const Row & row : rows) {
        const int32_t index = llama_batch_ext_add_token(batch, row.seq, row.token);
        if (index < 0) {
            return Status::failed(Code::bad_argument, "token id " + std::to_string(row.token) +
                                                          " is not in the vocabulary (" +
                                                          std::to_string(model_.n_vocab()) +
                                                          " tokens)");
        }
        // a head's graph asserts that there is a state (llm_graph_input_embd_h::set_input)
        const bool fed = llama_batch_ext_set_pos(batch, index, &row.pos) &&
                         (row.state == nullptr ||
                          llama_batch_ext_set_embd_state(
                              batch, index, {row.state, 1, static_cast<size_t>(n_embd_)}));
        if (!fed) {
            return Status::failed(Code::engine_failed, "the engine refused a row");
        }
        llama_batch_ext_set_output_logits(batch, index, row.output);
    }
    const int32_t rc = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch);
    if (cancelled_) {
        return Status::failed(Code::cancelled, "cancelled");
    }
    if (rc != 0) { // llama.h, llama_decode
        return engine_error(rc == 1 || rc == -2 ? Code::out_of_memory : Code::engine_failed,
                            std::string("the engine could not decode the ") + which + " (status " +
                                std::to_string(rc) + ")");
    }
    return {};
}

Status Runner::decode_trunk(const int32_t * tokens, int32_t first, int32_t count, int32_t scored) {
    std::vector<Row> rows;
    for (int32_t p = first; p < first + count; ++p) {
        rows.push_back({tokens[p], p, 0, nullptr, all_outputs_ || p >= scored});
    }
    const Status status = decode(trunk_.get(), trunk_batch_.get(), rows, "trunk");
    if (!status.ok() || head_ == nullptr) {
        return status;
    }
    // slot p gets x_p and the trunk's row p-1 (common/speculative.cpp,
    // common_speculative_impl_draft_mtp::process)
    const float * h    = llama_get_embeddings_nextn(trunk_.get());
    const size_t  n    = static_cast<size_t>(n_embd_);
    const float * last = h + static_cast<size_t>(count - 1) * n;
    if (h == nullptr || std::all_of(last, last + n, [](float v) { return v == 0.0f; })) {
        return Status::failed(Code::engine_failed,
                              "the trunk of this architecture gives no rows for the head");
    }
    std::copy_n(h, static_cast<size_t>(count) * n,
                states_.begin() + static_cast<ptrdiff_t>(first + 1) * n_embd_);
    return status;
}

Status Runner::decode_head(const std::vector<Row> & rows) {
    return decode(head_.get(), head_batch_.get(), rows, "head");
}

const float * Runner::trunk_logits(int32_t row) const {
    return llama_get_logits_ith(trunk_.get(), row);
}
const float * Runner::head_logits(int32_t row) const {
    return llama_get_logits_ith(head_.get(), row);
}
const float * Runner::head_hidden(int32_t row) const {
    return llama_get_embeddings_nextn_ith(head_.get(), row);
}

Runner::Row Runner::slot(const int32_t * tokens, int32_t p, int32_t seq, bool output) const {
    return {tokens[p], p, seq, states_.data() + static_cast<ptrdiff_t>(p) * n_embd_, output};
}

void Runner::share_cells(int32_t seq, int32_t end) const {
    llama_context * owner = sharing_ ? trunk_.get() : head_.get();
    if (end > 0) {
        llama_memory_seq_cp(llama_get_memory(owner), 0, seq, parts_ ? 0 : -1, parts_ ? end : -1);
    }
}

void Runner::drop_sequences(int32_t n) const {
    llama_context * owner = sharing_ ? trunk_.get() : head_.get();
    for (int32_t seq = 1; seq <= n; ++seq) {
        llama_memory_seq_rm(llama_get_memory(owner), seq, -1, -1);
    }
}

Status Runner::select_head(int32_t k, const int32_t * tokens, int32_t end) {
    llama_set_nextn_layer_offset(head_.get(), k);
    return feed_text(tokens, 0, end);
}

Status Runner::feed_text(const int32_t * tokens, int32_t first, int32_t end) {
    if (first == 0) {
        // the cache holds one set of positions for all head layers: each starts anew
        llama_memory_clear(llama_get_memory(head_.get()), true);
    }
    Status status;
    for (; first < end && status.ok(); first += params_.n_batch) {
        std::vector<Row> rows;
        for (int32_t p = first; p < std::min(end, first + params_.n_batch); ++p) {
            rows.push_back(slot(tokens, p, 0, false));
        }
        status = decode_head(rows);
    }
    return status;
}

// --- Evaluator -------------------------------------------------------------

Evaluator::Evaluator(const Model & model, const Model * head, const Model * reference,
                     const Model * reference_head)
    : model_(model), reference_model_(reference),
      runner_(std::make_unique<Runner>(model, head, cancelled_)) {
    if (reference != nullptr) {
        reference_ = std::make_unique<Runner>(*reference, reference_head, cancelled_);
    }
}

Status Evaluator::open(const EvaluatorParams & params) {
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
    Status status;
    try {
        status = runner_->open(params);
        if (status.ok() && reference_ != nullptr) {
            status = reference_->open(params);
        }
    } catch (const std::bad_alloc &) {
        status = Status::failed(Code::out_of_memory, "out of memory while making the contexts");
    } catch (const std::exception & error) {
        status = Status::failed(Code::engine_failed, error.what());
    }
    return status;
}

// Scores rows of the last decode: row k of the engine's batch predicts targets[index].
Status Evaluator::score(bool head, const int32_t * targets, const std::vector<Scored> & rows,
                        Predictions & out) {
    std::vector<const float *> logits(rows.size());
    std::vector<const float *> reference(reference_ != nullptr ? rows.size() : 0);
    for (size_t k = 0; k < rows.size(); ++k) {
        const auto of = [&](const Runner & runner) {
            return head ? runner.head_logits(rows[k].row) : runner.trunk_logits(rows[k].row);
        };
        logits[k] = of(*runner_);
        if (reference_ != nullptr) {
            reference[k] = of(*reference_);
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
    const int32_t scored = n_tokens / 2;
    for (int32_t first = 0; first < n_tokens; first += params_.n_batch) {
        const int32_t count  = std::min(params_.n_batch, n_tokens - first);
        Status        status = runner_->decode_trunk(tokens, first, count, scored);
        if (status.ok() && reference_ != nullptr) {
            status = reference_->decode_trunk(tokens, first, count, scored);
        }
        std::vector<Scored> rows;
        for (int32_t p = std::max(first, scored); p < std::min(first + count, n_tokens - 1); ++p) {
            rows.push_back({p - scored, p - first});
        }
        if (status.ok()) {
            status = score(false, tokens + scored + 1, rows, out);
        }
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

// The first head over the text, every slot with the trunk's row: depth 1 of a draft.
Status Evaluator::run_head(const int32_t * tokens, int32_t n_tokens, Predictions & out) {
    const int32_t scored  = n_tokens / 2;
    const bool    sharing = runner_->sharing();
    // A head that shares the trunk's memory drafts at a position that the trunk has not seen yet
    // (common/speculative.cpp, is_mem_shared), so that slot p reads the cells before p: each slot
    // is a sequence of its own, and those that are not scored leave nothing behind.
    const int32_t step = sharing ? runner_->together() : params_.n_batch;
    const size_t  n    = static_cast<size_t>(runner_->n_embd());
    for (int32_t first = sharing ? scored : 0; first < n_tokens - 1; first += step) {
        const int32_t       end = std::min(first + step, n_tokens - 1);
        std::vector<Scored> rows;
        Status              status;
        for (Runner * runner : {runner_.get(), reference_.get()}) {
            if (runner == nullptr || !status.ok()) {
                continue;
            }
            std::vector<Runner::Row> slots;
            for (int32_t p = first; p < end; ++p) {
                const int32_t seq = sharing ? 1 + p - first : 0;
                if (sharing) {
                    runner->share_cells(seq, p);
                }
                slots.push_back(runner->slot(tokens, p, seq, p >= scored));
            }
            status = runner->decode_head(slots);
            if (sharing) {
                runner->drop_sequences(end - first);
            }
        }
        for (int32_t p = std::max(first, scored); p < end; ++p) {
            rows.push_back({p - scored, p - first});
        }
        if (status.ok()) {
            status = score(true, tokens + scored + 1, rows, out);
        }
        if (!status.ok()) {
            return status;
        }
        for (size_t k = 0; k < rows.size() && params_.depth > 1; ++k) {
            const float * row = runner_->head_hidden(rows[k].row);
            if (row == nullptr) {
                return Status::failed(Code::engine_failed,
                                      "the head of this architecture gives no rows to draft on");
            }
            std::copy_n(row, n, hidden_[0].begin() + static_cast<ptrdiff_t>(rows[k].index * n));
        }
    }
    return {};
}

// Drafts as the engine does (common/speculative.cpp, common_speculative_impl_draft_mtp::draft),
// from every scored slot: token d_1 for x_{p+1}, from it and the head's own row d_2, and so on.
// Greedy speculative decoding accepts d_k if d_1 .. d_{k-1} were accepted and d_k is what the
// trunk then says. What the trunk says after d_1 .. d_{k-1} is at hand only where these are the
// text's own tokens; elsewhere depth k is not known, and nothing is concluded from the slot.
Status Evaluator::draft(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    const int32_t        scored   = n_tokens / 2;
    const int32_t        n_scored = static_cast<int32_t>(out.head.top.size());
    std::vector<int32_t> drafted  = out.head.top;
    for (int32_t i = 0; i < n_scored; ++i) {
        out.known[i]    = 1;
        out.accepted[i] = drafted[i] == out.trunk.top[i] ? 1 : 0;
    }
    // a chain of heads has one for each depth (common/speculative.cpp, n_max)
    const bool    chain = runner_->n_heads() > 1;
    const int32_t depth = chain ? std::min(params_.depth, runner_->n_heads()) : params_.depth;
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
        if (chain) {
            const Status status = runner_->select_head(k - 1, tokens, n_tokens - 1);
            if (!status.ok()) {
                return status;
            }
        }
        const Status status = draft_step(tokens, scored, k, slots, drafted);
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

// Token k of the drafts that begin at some scored slots. Each is a sequence of its own that shares
// the cells of the text up to slot p, where the head saw the trunk's rows; the slots after it hold
// the head's own rows. One head would find them in its cache from the step before, a chain of
// heads decodes them again under each next head: here both do. If the head's memory cannot share a
// part of a sequence, the text is fed anew, one slot after the other, and each shares all of it.
Status Evaluator::draft_step(const int32_t * tokens, int32_t scored, int32_t k,
                             const std::vector<int32_t> & slots, std::vector<int32_t> & drafted) {
    const size_t n       = static_cast<size_t>(runner_->n_embd());
    const bool   sharing = runner_->sharing();
    const int    each    = sharing ? 1 : k - 1; // rows a slot
    const size_t group =
        runner_->parts() ? static_cast<size_t>(
                               std::max(1, std::min(runner_->together(), params_.n_batch / each)))
                         : 1;
    int32_t       fed     = 0; // slots of the text in sequence 0, if it is fed anew
    const int32_t n_vocab = model_.n_vocab();
    const auto    state   = [&](int32_t depth, int32_t i) {
        return hidden_[static_cast<size_t>(depth - 1)].data() + static_cast<size_t>(i) * n;
    };
    for (size_t first = 0; first < slots.size(); first += group) {
        const size_t             end = std::min(first + group, slots.size());
        std::vector<Runner::Row> rows;
        Status                   status;
        if (!runner_->parts()) {
            status = runner_->feed_text(tokens, fed, scored + slots[first] + 1);
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
                runner_->share_cells(seq, p);
                rows.push_back({drafted[i], p, seq, state(k - 1, i), true});
                continue;
            }
            runner_->share_cells(seq, p + 1);
            for (int32_t j = 1; j < k; ++j) {
                rows.push_back({tokens[p + j], p + j, seq, state(j, i), j == k - 1});
            }
        }
        status = runner_->decode_head(rows);
        runner_->drop_sequences(static_cast<int32_t>(end - first));
        if (!status.ok()) {
            return status;
        }
        for (size_t s = first; s < end; ++s) {
            const int32_t row    = static_cast<int32_t>((s - first + 1) * each - 1);
            const float * logits = runner_->head_logits(row);
            const float * hidden = runner_->head_hidden(row);
            if (logits == nullptr || hidden == nullptr) {
                return engine_error(Code::engine_failed, "the head gave nothing to draft on");
            }
            drafted[slots[s]] = top_of(logits, n_vocab);
            std::copy_n(hidden, n,
                        hidden_[static_cast<size_t>(k - 1)].begin() +
                            static_cast<ptrdiff_t>(slots[s]) * runner_->n_embd());
        }
    }
    return {};
}

Status Evaluator::evaluate(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    clear_error();
    const size_t n_scored = static_cast<size_t>(std::max(0, n_tokens - 1 - n_tokens / 2));
    const bool   compared = reference_ != nullptr;
    out.trunk.resize(n_scored, compared);
    out.head.resize(params_.mtp ? n_scored : 0, compared && params_.mtp);
    out.known.assign(params_.mtp ? n_scored : 0, 0);
    out.accepted.assign(params_.mtp ? n_scored : 0, 0);
    Status status = runner_->begin(n_tokens);
    if (status.ok() && compared) {
        status = reference_->begin(n_tokens);
    }
    if (status.ok()) {
        status = run_trunk(tokens, n_tokens, out.trunk);
    }
    if (!status.ok() || !params_.mtp) {
        return status;
    }
    hidden_.resize(static_cast<size_t>(params_.depth));
    for (std::vector<float> & rows : hidden_) {
        rows.assign(n_scored * static_cast<size_t>(runner_->n_embd()), 0.0f);
    }
    status = run_head(tokens, n_tokens, out.head);
    return status.ok() ? draft(tokens, n_tokens, out) : status;
}

Status Evaluator::step(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out) {
    if (n_tokens < 1 || n_tokens > params_.n_ctx) {
        return Status::failed(Code::bad_argument, "1 to n_ctx tokens a chunk");
    }
    try {
        return evaluate(tokens, n_tokens, out);
    } catch (const std::bad_alloc &) {
        return Status::failed(Code::out_of_memory, "out of memory in a chunk");
    } catch (const std::exception & error) {
        return engine_error(Code::engine_failed, error.what());
    }
}

} // namespace imatrix
