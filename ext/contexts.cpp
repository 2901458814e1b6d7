#include "contexts.h"

#include "engine_log.h"

#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <string>

namespace imatrix {

// --- opening ---------------------------------------------------------------

void Contexts::close() {
    for (Side * each : {&head_, &trunk_}) { // the head refers to the trunk
        each->batch.reset();
        each->ctx.reset();
        *each = {};
    }
}

Status Contexts::open(const ContextsParams & params) {
    close();
    params_       = params;
    n_heads_      = 0;
    n_embd_       = 0;
    sharing_      = false;
    causal_       = true;
    Status status = guarded("while making the contexts", [&] { return open_both(); });
    if (!status.ok()) {
        close();
    }
    return status;
}

Status Contexts::open_both() {
    if (params_.mtp && (head_model_ == nullptr || head_model_->n_heads() == 0)) {
        return Status::failed(Code::bad_argument, "no model with a head was given");
    }
    if (params_.mtp && params_.n_seq != 1) {
        // a head's slots are of one text: keep_rows() would give them the rows of another chunk
        return Status::failed(Code::bad_argument,
                              "a head takes one chunk at a time: n_seq must be 1, got " +
                                  std::to_string(params_.n_seq));
    }
    if (params_.mtp) {
        sharing_ = head_model_->shares_memory();
        n_heads_ = head_model_->n_heads();
        n_embd_  = llama_model_n_embd_out(model_.get());
    }
    Status status = open_side(/*head=*/false);
    if (!status.ok()) {
        return status;
    }
    causal_ = is_causal(trunk_.ctx.get());
    if (!params_.mtp) {
        return {};
    }
    if (!causal_) {
        return Status::failed(Code::bad_argument,
                              "a head has nothing to predict after a trunk whose tokens see those "
                              "after them");
    }
    status = open_side(/*head=*/true);
    return status.ok() ? check_head_runs() : status;
}

Status Contexts::make(bool head) {
    Side & out = side(head);
    out.batch.reset();
    out.ctx.reset();
    EngineContextParams params;
    // each sequence gets n_ctx tokens, rounded up as the engine would round the whole
    // (llama-context.cpp), because it rounds a sequence down
    const int32_t padded = params_.n_seq > 1 ? (params_.n_ctx + 255) / 256 * 256 : params_.n_ctx;
    params.n_ctx         = padded * params_.n_seq;
    params.n_batch       = params_.n_batch;
    params.n_ubatch      = params_.n_ubatch;
    params.n_seq         = params_.n_seq;
    params.n_outputs     = out.n_outputs;
    params.n_threads     = params_.n_threads;
    params.n_whole       = params_.n_ctx * params_.n_seq;
    params.computes      = params_.computes;
    params.on_node       = params_.on_node;
    params.cancelled     = &cancelled_;
    params.trunk         = head ? trunk_.ctx.get() : nullptr;
    if (sharing_) {
        params.branch_cells = 0; // in the trunk's memory, and a head writes no cells there
    } else if (head && params_.branch_cells >= 0) {
        params.branch_cells = kSlotsTogether * params_.branch_cells;
    }
    Status status = make_engine_context(model(head).get(), params, out.ctx);
    if (status.ok()) {
        out.batch.reset(llama_batch_ext_init(out.ctx.get()));
    }
    return status;
}

Status Contexts::open_side(bool head) {
    Side & out    = side(head);
    out.n_outputs = head ? params_.n_head_outputs : params_.n_outputs;
    // Rows for the next head, of every token. Several architectures then also run their last layer
    // on every token without being asked for logits (e.g. src/models/qwen35.cpp, glm4-moe.cpp),
    // which spares the LM head, or the half of it that no score needs.
    const bool reads_rows = head ? params_.reads_head_rows : params_.mtp || params_.all_rows;
    const auto read_rows  = [&](bool on, bool masked) {
        if (params_.computes) {
            // otherwise the engine would plan the buffers once more, at the next decode, and again
            // take none (llama_context::sched_reserve)
            llama_set_embeddings_nextn(out.ctx.get(), on, masked);
        }
    };

    ProbeParams look;
    look.n_seq      = params_.n_seq;
    look.n_heads    = head ? n_heads_ : 0;
    look.wanted     = {!head && params_.output_weight, head};
    look.prefix     = head ? head_model_->head_prefix() : "";
    look.reads_rows = reads_rows;
    look.computes   = params_.computes;

    Status status = make(head);
    if (status.ok()) {
        read_rows(reads_rows, /*masked=*/false);
        status = probe(out.ctx.get(), look, out.plan);
    }
    if (!status.ok()) {
        return status;
    }
    // The trunk's rows are wanted of every token; of the head's, those of outputs will do.
    out.all_outputs =
        params_.all_rows ? out.plan.needs_outputs : !head && reads_rows && out.plan.crops_rows;
    if (out.all_outputs && out.n_outputs < params_.n_batch) {
        out.n_outputs = params_.n_batch;
        status        = make(head);
        if (status.ok()) {
            read_rows(reads_rows, /*masked=*/false);
        }
        if (status.ok() && !params_.computes) {
            status = probe(out.ctx.get(), look, out.plan); // its weights need addresses too
        }
        if (!status.ok()) {
            return status;
        }
    }
    if (head && reads_rows && out.plan.crops_rows) {
        // If the graph crops the rows (src/models/step35.cpp, mimo2.cpp), more would be read than
        // there are, unless masked. If it does not (qwen35.cpp, glm4-moe.cpp, hy-v3.cpp), masked
        // takes the first rows of a graph for those of its outputs (llama-context.cpp, extract
        // nextn embeddings), which differ in a batch that has other rows before them.
        read_rows(true, /*masked=*/true);
    } else if (!head && !params_.mtp && out.all_outputs) {
        read_rows(false, false); // nobody wants them, and they spare nothing
    }
    // without a memory all are outputs, and the engine complains of tokens that are not marked so
    if (llama_get_memory(out.ctx.get()) == nullptr) {
        out.all_outputs = true;
        out.n_outputs   = params_.n_batch;
    }
    if (!head) {
        out.plan.needs_outputs |= params_.output_weight;
    }
    return {};
}

Status Contexts::check_head_runs() const {
    for (int32_t i = 0; i < n_heads_; ++i) {
        const std::string block = head_model_->head_block(i);
        const bool        runs  = std::any_of(head_.plan.weights.begin(), head_.plan.weights.end(),
                                              [&](const PlannedWeight & weight) {
                                          return weight.name.compare(0, block.size(), block) == 0;
                                              });
        if (!runs) {
            return Status::failed(Code::engine_failed,
                                  "the engine's MTP graph multiplies no weight of " + block + "*");
        }
    }
    return {};
}

// --- decodes ---------------------------------------------------------------

Status Contexts::decode(bool head, const Row * rows, size_t count) {
    Side &            to    = side(head);
    llama_batch_ext * batch = to.batch.get();
    llama_batch_ext_clear(batch);
    for (const Row * row = rows; row != rows + count; ++row) {
        const int32_t index = llama_batch_ext_add_token(batch, row->seq, row->token);
        if (index < 0) {
            return Status::failed(Code::bad_argument, "token id " + std::to_string(row->token) +
                                                          " is not in the vocabulary (" +
                                                          std::to_string(model_.n_vocab()) +
                                                          " tokens)");
        }
        // the graph of a head asserts that there is a state (src/llama-graph.cpp,
        // llm_graph_input_embd_h::set_input)
        const bool fed = llama_batch_ext_set_pos(batch, index, &row->pos) &&
                         (row->state == nullptr ||
                          llama_batch_ext_set_embd_state(
                              batch, index, {row->state, 1, static_cast<size_t>(n_embd_)}));
        if (!fed) {
            return Status::failed(Code::engine_failed, "the engine refused a row");
        }
        llama_batch_ext_set_output_logits(batch, index, to.all_outputs || row->output);
    }
    const int32_t rc = llama_process(to.ctx.get(), LLAMA_PROCESS_TYPE_DECODE, batch);
    if (cancelled_) {
        return Status::failed(Code::cancelled, "cancelled");
    }
    if (rc != 0) { // llama.h, llama_decode
        return engine_error(rc == 1 || rc == -2 ? Code::out_of_memory : Code::engine_failed,
                            std::string("the engine could not decode the ") +
                                (head ? "head" : "trunk") + " (status " + std::to_string(rc) + ")");
    }
    return {};
}

// If tokens see those after them, a memory takes of chunks that differ in length what all have into
// a first graph and the rest into others (llama-kv-cache.cpp, init_batch): they go one by one.
std::vector<TrunkDecode> Contexts::trunk_decodes(const Chunks & chunks) const {
    const int32_t * lengths = chunks.lengths;
    const int32_t   longest = chunks.longest();
    const bool      equal =
        std::all_of(lengths, lengths + chunks.count, [&](int32_t n) { return n == longest; });
    const int32_t            beside = causal_ || equal ? chunks.count : 1; // chunks a decode
    const int32_t            each   = causal_ ? std::max(1, params_.n_batch / beside) : longest;
    std::vector<TrunkDecode> out;
    for (int32_t chunk = 0; chunk < chunks.count; chunk += beside) {
        for (int32_t first = 0; first < longest; first += each) {
            TrunkDecode decode{chunk, {}};
            for (int32_t seq = 0; seq < beside; ++seq) {
                const int32_t * text = chunks.text(chunk + seq);
                const int32_t   end  = std::min(first + each, lengths[chunk + seq]);
                for (int32_t p = first; p < end; ++p) {
                    decode.rows.push_back({text[p], p, seq, nullptr});
                }
            }
            out.push_back(std::move(decode));
        }
    }
    return out;
}

void Contexts::forget_rows(int32_t n_tokens) {
    states_.assign(static_cast<size_t>(n_tokens + 1) * static_cast<size_t>(n_embd_), 0.0f);
}

Status Contexts::decode_trunk(const TrunkDecode & part) {
    if (part.rows.front().pos == 0) {
        llama_memory_clear(llama_get_memory(trunk_.ctx.get()), true);
    }
    const Status status = decode(/*head=*/false, part.rows.data(), part.rows.size());
    return status.ok() && has_head() ? keep_rows(part.rows) : status;
}

// The trunk's row of a position is the state of the slot after it, as the engine's own driver pairs
// them (common/speculative.cpp, common_speculative_impl_draft_mtp::process). The rows of the decode
// are of one chunk, one after the other, see open_both().
Status Contexts::keep_rows(const std::vector<Row> & rows) {
    const float * given = llama_get_embeddings_nextn(trunk_.ctx.get());
    const size_t  n     = static_cast<size_t>(n_embd_);
    const auto    zeros = [n](const float * row) {
        return std::all_of(row, row + n, [](float v) { return v == 0.0f; });
    };
    if (given == nullptr || zeros(given + (rows.size() - 1) * n)) {
        return Status::failed(Code::engine_failed,
                              "the trunk of this architecture gives no rows for the head");
    }
    std::copy_n(given, rows.size() * n,
                states_.begin() + static_cast<ptrdiff_t>(rows.front().pos + 1) * n_embd_);
    return {};
}

void Contexts::synchronize() { llama_synchronize(trunk_.ctx.get()); }

int32_t Contexts::together() const { return std::min(kSlotsTogether, params_.n_batch); }

Row Contexts::slot(const int32_t * tokens, int32_t p, int32_t seq, bool output) const {
    return {tokens[p], p, seq, states_.data() + static_cast<ptrdiff_t>(p) * n_embd_, output};
}

void Contexts::select_head(int32_t head) {
    llama_memory_clear(llama_get_memory(head_.ctx.get()), true);
    llama_set_nextn_layer_offset(head_.ctx.get(), head);
}

Status Contexts::decode_head(const Row * rows, size_t count) {
    return decode(/*head=*/true, rows, count);
}

Status Contexts::feed_text(const int32_t * tokens, int32_t first, int32_t end) {
    Status           status;
    std::vector<Row> rows;
    for (; first < end && status.ok(); first += params_.n_batch) {
        rows.clear();
        for (int32_t p = first; p < std::min(end, first + params_.n_batch); ++p) {
            rows.push_back(slot(tokens, p, 0));
        }
        status = decode_head(rows.data(), rows.size());
    }
    return status;
}

void Contexts::share_cells(int32_t seq, int32_t end) const {
    if (end > 0) {
        const bool parts = shares_parts();
        llama_memory_seq_cp(llama_get_memory(side(!sharing_).ctx.get()), 0, seq, parts ? 0 : -1,
                            parts ? end : -1);
    }
}

void Contexts::drop_branches(int32_t n) const {
    const llama_memory_t memory = llama_get_memory(side(!sharing_).ctx.get());
    for (int32_t seq = 1; seq <= n; ++seq) {
        llama_memory_seq_rm(memory, seq, -1, -1);
    }
}

// --- what a decode gave ----------------------------------------------------

const float * Contexts::logits(bool head, int32_t row) const {
    return llama_get_logits_ith(side(head).ctx.get(), row);
}

const float * Contexts::head_row(int32_t row) const {
    return llama_get_embeddings_nextn_ith(head_.ctx.get(), row);
}

} // namespace imatrix
