#include "session.h"

#include "engine_log.h"
#include "row_kernels.h"

#include <algorithm>

namespace imatrix {
namespace {

// What the hook found wrong with the last decodes.
Status status_of(const HookError & error) {
    Status status;
    status.weight  = error.weight;
    status.mat     = error.mat;
    status.channel = error.channel;
    status.code    = Code::engine_failed;
    switch (error.kind) {
        case Failure::none:    return {};
        case Failure::regroup: return {}; // step() redoes the chunk
        case Failure::non_finite:
            status.code    = Code::non_finite;
            status.message = "a NaN or infinite activation reached " + error.weight;
            break;
        case Failure::bad_expert:
            status.message =
                error.weight + ": expert id " + std::to_string(error.mat) + " is out of range";
            break;
        case Failure::bad_layout:
            status.message = error.weight + ": activations in a layout that cannot be summed";
            break;
        case Failure::shape_changed:
            status.message = error.weight + ": its shape differs from that of earlier chunks";
            break;
        case Failure::device_failed:
            status.message = error.weight + ": the device that holds its activations failed";
            break;
        case Failure::out_of_memory:
            return Status::failed(Code::out_of_memory, "out of memory for the sums");
    }
    return status;
}

} // namespace

// --- opening ---------------------------------------------------------------

Session::Session(const Model & trunk, const Model * head)
    : head_model_(head), contexts_(trunk, head, cancelled_) {}

const char * Session::kernel() const { return chosen_row_kernel().name; }

Status Session::open(const SessionParams & params) {
    contexts_.close();
    const std::string refusal = row_kernel_refusal();
    if (!refusal.empty()) {
        return Status::failed(Code::bad_argument, refusal);
    }
    params_ = params;
    hook_.set_device_sums(params.device_sums);
    sums_.keep_signed(params.signed_sums);
    hook_.set_threads(static_cast<size_t>(std::max(1, params.n_threads)));

    const int32_t n_heads = params.mtp && head_model_ != nullptr ? head_model_->n_heads() : 0;
    if (n_heads > 1 && head_model_->copies_whole_sequences()) {
        return Status::failed(Code::bad_model,
                              "several heads of this architecture cannot be collected: the "
                              "engine's memory for them copies whole sequences only");
    }
    ContextsParams needs;
    needs.n_ctx     = params.n_ctx;
    needs.n_batch   = params.n_batch;
    needs.n_ubatch  = params.n_ubatch;
    needs.n_seq     = params.n_seq;
    needs.n_threads = params.n_threads;
    needs.mtp       = params.mtp;
    needs.computes  = params.computes;
    needs.n_outputs = params.process_output || params.perplexity ? params.n_batch : params.n_seq;
    needs.n_head_outputs  = params.n_seq;
    needs.branch_cells    = n_heads > 1 ? n_heads - 1 : -1; // see run_later_head
    needs.reads_head_rows = n_heads > 1;
    needs.all_rows        = true;
    needs.output_weight   = params.process_output;
    needs.on_node         = {EvalHook::callback, &hook_};
    return contexts_.open(needs);
}

// If every row is asked for logits only so that the last layer runs on it, nobody reads them, and
// the graph is left after its last wanted weight. With a head the trunk's rows are read, which some
// architectures compute last.
bool Session::may_end_early() const {
    return trunk_plan().needs_outputs && !params_.process_output && !params_.perplexity &&
           !params_.mtp && params_.leave_out_logits;
}

// --- the trunk -------------------------------------------------------------

// What the hook found comes first: it may be why the decode failed.
Status Session::after_decode(Status decoded) const {
    Status found = status_of(hook_.error());
    return found.ok() ? decoded : found;
}

Status Session::decode_trunk(const Chunks & chunks, TrunkDecode & part) {
    for (Row & row : part.rows) {
        const int32_t length = chunks.lengths[part.first_chunk + row.seq];
        row.output           = params_.perplexity && is_scored(row.pos, length);
    }
    hook_.begin_decode({params_.process_output, /*head=*/false});
    hook_.end_after(may_end_early() ? trunk_plan().end : GraphEnd{});
    Status status = after_decode(contexts_.decode_trunk(part));
    hook_.end_after({});
    if (status.ok() && params_.perplexity) {
        status = score(chunks, part);
    }
    return status;
}

// -log softmax(logits)[next token] of the rows that were asked for their logits.
Status Session::score(const Chunks & chunks, const TrunkDecode & part) {
    struct Scored {
        int32_t       chunk;
        int32_t       next; // token
        const float * logits;
    };
    std::vector<Scored> scored;
    for (size_t k = 0; k < part.rows.size(); ++k) {
        const Row & row = part.rows[k];
        if (row.output) {
            const int32_t chunk  = part.first_chunk + row.seq;
            const float * logits = contexts_.logits(/*head=*/false, static_cast<int32_t>(k));
            if (logits == nullptr) {
                return engine_error(Code::engine_failed, "the engine gave no logits");
            }
            scored.push_back({chunk, chunks.text(chunk)[row.pos + 1], logits});
        }
    }
    std::vector<double> nll(scored.size());
    const int32_t       n_vocab = contexts_.model(/*head=*/false).n_vocab();
    hook_.threads().run(scored.size(), [&](size_t k) {
        const float * logits = scored[k].logits;
        nll[k]               = nll_of(logits, softmax_of(logits, n_vocab), scored[k].next);
    });
    for (size_t k = 0; k < scored.size(); ++k) {
        scores_[static_cast<size_t>(scored[k].chunk)].add(nll[k]);
    }
    return {};
}

// --- the head --------------------------------------------------------------

// Runs rows through the head, in decodes of at most n_batch. With `given`, the rows that come back
// are written to it: the row of slot p as the state of slot p+1.
Status Session::feed_head(const std::vector<Row> & rows, bool observed,
                          std::vector<float> * given) {
    const size_t n     = static_cast<size_t>(contexts_.n_embd());
    const size_t batch = static_cast<size_t>(params_.n_batch);
    for (size_t first = 0; first < rows.size(); first += batch) {
        const size_t count = std::min(batch, rows.size() - first);
        hook_.begin_decode({/*output_weight=*/false, /*head=*/true}, head_model_->head_prefix());
        hook_.set_observing(observed);
        const Status status = after_decode(contexts_.decode_head(rows.data() + first, count));
        hook_.set_observing(true);
        if (!status.ok()) {
            return status;
        }
        for (size_t k = 0; k < count && given != nullptr; ++k) {
            const float * row = contexts_.head_row(static_cast<int32_t>(k));
            if (row == nullptr) {
                return Status::failed(
                    Code::engine_failed,
                    "the head of this architecture gives no rows for the next one");
            }
            std::copy_n(row, n,
                        given->begin() + (rows[first + k].pos + 1) * static_cast<ptrdiff_t>(n));
        }
    }
    return {};
}

// Runs every head over the chunk, whose trunk rows are kept.
//
// Slot 0 goes first, by itself and unobserved: the driver fills the head's cache with it, and never
// drafts there (see FirstSlot).
Status Session::run_heads(const int32_t * tokens, int32_t n_tokens) {
    if (contexts_.sharing()) {
        return run_sharing_head(tokens, n_tokens);
    }
    std::vector<Row> first;
    std::vector<Row> rows;
    for (int32_t p = 0; p < n_tokens; ++p) {
        const bool alone = p == 0 && params_.first_slot != FirstSlot::counted;
        (alone ? first : rows).push_back(contexts_.slot(tokens, p, 0));
    }
    if (params_.first_slot == FirstSlot::absent) {
        first.clear();
    }
    Status status;
    for (int32_t head = 0; head < contexts_.n_heads() && status.ok(); ++head) {
        contexts_.select_head(head);
        std::vector<float> * given = head == 0 && contexts_.n_heads() > 1 ? given_.data() : nullptr;
        status                     = feed_head(first, false, given);
        if (status.ok()) {
            status = feed_head(rows, head == 0, given);
        }
        if (status.ok() && head > 0) {
            status = run_later_head(head, tokens, n_tokens);
        }
    }
    return status;
}

// Head d >= 1 as it runs when the engine drafts (common/speculative.cpp,
// common_speculative_impl_draft_mtp::draft, chain_heads): drafting starts d slots back, at slot
// p-d, with the trunk's row, and slot p-d+j gets the row that head j-1 gave for the slot before.
// Keys and values of slots up to p-d come from the trunk's rows, as process() leaves them: the
// caller has just decoded those, as sequence 0. Tokens are the text's own (teacher forcing). No
// draft starts at slot 0, so the first slot at which head d has a turn is d+1.
//
// Each slot p thus has its own view of the d slots before it, so each is a sequence of its own
// that shares the cells of sequence 0 up to p-d. Only the rows of slot p at depth d are
// observed; those in between, which fill keys and values for it, are not.
Status Session::run_later_head(int32_t head, const int32_t * tokens, int32_t n_tokens) {
    const int32_t        n        = contexts_.n_embd();
    const int32_t        together = contexts_.together();
    const int32_t        start    = params_.first_slot == FirstSlot::counted ? 0 : head + 1;
    std::vector<float> * given =
        head + 1 < contexts_.n_heads() ? &given_[static_cast<size_t>(head)] : nullptr;
    std::vector<Row> rows;
    for (int32_t first = start; first < n_tokens; first += together) {
        const int32_t end = std::min(first + together, n_tokens);
        for (int32_t p = first; p < end; ++p) {
            contexts_.share_cells(1 + p - first, p - head + 1);
        }
        for (int32_t depth = 1; depth <= head; ++depth) {
            const std::vector<float> & states = given_[static_cast<size_t>(depth - 1)];
            rows.clear();
            for (int32_t p = first; p < end; ++p) {
                const int32_t slot = p - head + depth;
                if (slot >= 0) {
                    rows.push_back({tokens[slot], slot, 1 + p - first,
                                    states.data() + static_cast<ptrdiff_t>(slot) * n});
                }
            }
            const bool   last   = depth == head;
            const Status status = feed_head(rows, last, last ? given : nullptr);
            if (!status.ok()) {
                return status;
            }
        }
        contexts_.drop_branches(end - first);
    }
    return {};
}

// A head without keys and values of its own, which reads those of the trunk. The engine drafts
// with it at the position of a token that the trunk has not seen yet (common/speculative.cpp,
// is_mem_shared: id_last at pos0, state of pos0-1), so slot p must see the trunk's cells up to
// p-1 and no more: a sequence of its own that shares those. Slot 0 has none to see, and the
// engine never drafts there: it is left out.
Status Session::run_sharing_head(const int32_t * tokens, int32_t n_tokens) {
    const int32_t    together = contexts_.together();
    std::vector<Row> rows;
    for (int32_t first = 1; first < n_tokens; first += together) {
        const int32_t end = std::min(first + together, n_tokens);
        rows.clear();
        for (int32_t p = first; p < end; ++p) {
            contexts_.share_cells(1 + p - first, p);
            rows.push_back(contexts_.slot(tokens, p, 1 + p - first));
        }
        const Status status = feed_head(rows, true, nullptr);
        contexts_.drop_branches(end - first);
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

// --- one step --------------------------------------------------------------

// Slots at the start of a chunk at which no draft runs the weight: of head d the first d+1, of the
// trunk none.
int64_t Session::slots_before(const std::string & weight) const {
    if (contexts_.sharing()) {
        return 1; // see run_sharing_head
    }
    if (params_.first_slot == FirstSlot::counted) {
        return 0;
    }
    for (int32_t d = 1; d < contexts_.n_heads(); ++d) {
        const std::string block = head_model_->head_block(d);
        if (weight.compare(0, block.size(), block) == 0) {
            return d + 1;
        }
    }
    return 1;
}

// Every weight that the graphs multiply must have seen every row of the chunk.
Status Session::check_rows(int64_t n_tokens) const {
    for (const bool head : {false, true}) {
        for (const PlannedWeight & planned : contexts_.plan(head).weights) {
            const size_t  index  = sums_.find(planned.name);
            const int64_t seen   = index == Sums::npos ? 0 : sums_.weights()[index].pending_rows;
            const int64_t before = head ? slots_before(planned.name) : 0;
            const int64_t slots  = std::max<int64_t>(0, n_tokens - before);
            const int64_t want   = planned.rows * slots;
            // a chunk may be too short for the last heads of a chain
            if (seen == want && (seen > 0 || slots == 0)) {
                continue;
            }
            if (planned.rows == 0 && seen > 0) {
                continue; // rows that do not follow the tokens, e.g. of a compressed sequence
            }
            Status status;
            status.code    = Code::rows_missing;
            status.weight  = planned.name;
            status.message = planned.name + " saw " + std::to_string(seen) +
                             " rows in a chunk of " + std::to_string(n_tokens) +
                             " tokens, expected " +
                             (planned.rows > 0 ? std::to_string(want) : std::string("some"));
            return status;
        }
    }
    return {};
}

Status Session::collect(const Chunks & chunks) {
    // however it ends: rows may still be on their way to sums that will be dropped
    struct Settled {
        EvalHook & hook;
        ~Settled() { hook.settle(); }
    } const settled{hook_};
    hook_.begin_chunk();
    clear_error();
    const int32_t longest = chunks.longest();
    contexts_.forget_rows(longest);
    given_.resize(static_cast<size_t>(std::max(1, contexts_.n_heads()) - 1));
    for (std::vector<float> & states : given_) {
        states.assign(static_cast<size_t>(longest + 1) * static_cast<size_t>(contexts_.n_embd()),
                      0.0f);
    }
    scores_.assign(static_cast<size_t>(chunks.count), {});

    for (TrunkDecode & part : contexts_.trunk_decodes(chunks)) {
        const Status status = decode_trunk(chunks, part);
        if (!status.ok()) {
            return status;
        }
    }
    if (contexts_.has_head()) {
        const Status status = run_heads(chunks.tokens, longest);
        if (!status.ok()) {
            return status;
        }
    }
    contexts_.synchronize(); // the last graph may still be running if nothing stopped it
    hook_.finish_chunk();
    Status summed;
    if (cancelled_) {
        summed = Status::failed(Code::cancelled, "cancelled");
    }
    summed = after_decode(summed);
    if (!summed.ok() || hook_.error().kind == Failure::regroup || !hook_.enabled()) {
        return summed;
    }
    return check_rows(chunks.total());
}

Status Session::step(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                     ChunkScore * scores) {
    if (!contexts_.is_open()) {
        return Status::failed(Code::bad_argument, "the session is not open");
    }
    if (n_chunks < 1 || n_chunks > params_.n_seq) {
        return Status::failed(Code::bad_argument, "1 to n_seq chunks a step");
    }
    for (int32_t i = 0; i < n_chunks; ++i) {
        if (lengths[i] < 1 || lengths[i] > params_.n_ctx) {
            return Status::failed(Code::bad_argument, "1 to n_ctx tokens a chunk");
        }
    }
    const Chunks chunks{tokens, lengths, n_chunks};
    Status       status = guarded("in a chunk", [&] {
        Status found = collect(chunks);
        if (found.code == Code::rows_missing && params_.leave_out_logits && may_end_early()) {
            // not the nodes that the plan has: whole graphs are run from here on
            params_.leave_out_logits = false;
            sums_.discard();
            found = collect(chunks);
        }
        const bool diverged = hook_.error().kind == Failure::regroup || !hook_.groups_agree();
        if (found.ok() && diverged) {
            // Weights that shared an activation in an earlier graph do not share it any more:
            // from here on each is fetched and summed on its own.
            sums_.ungroup();
            hook_.stop_grouping();
            found = collect(chunks);
        }
        return found;
    });
    if (!status.ok()) {
        sums_.discard();
        return status;
    }
    sums_.commit();
    if (scores != nullptr) {
        std::copy(scores_.begin(), scores_.end(), scores);
    }
    return status;
}

Status Session::try_decode() {
    if (!contexts_.is_open() || params_.computes) {
        return Status::failed(Code::bad_argument, "the session is open to compute, or not at all");
    }
    clear_error();
    // how many tokens there are matters only if they see those after them
    const int32_t n_tokens =
        contexts_.causal() ? std::min(params_.n_ctx, kProbeTokens) : params_.n_ctx;
    const std::vector<int32_t> tokens(static_cast<size_t>(n_tokens), 0);
    contexts_.forget_rows(n_tokens);
    const auto tried = [](auto && decode) {
        return guarded("in a decode", [&] {
            try {
                return decode();
            } catch (const NothingComputed &) {
                return Status{};
            }
        });
    };
    Status status = tried([&] {
        const Chunks chunks{tokens.data(), &n_tokens, 1};
        return contexts_.decode_trunk(contexts_.trunk_decodes(chunks).front());
    });
    if (contexts_.sharing() && status.ok()) {
        return tried([&] { return run_sharing_head(tokens.data(), n_tokens); });
    }
    for (int32_t head = 0; head < contexts_.n_heads() && status.ok(); ++head) {
        contexts_.select_head(head);
        status = tried([&] { return contexts_.feed_text(tokens.data(), 0, n_tokens); });
    }
    return status;
}

Status Session::restore(const std::vector<std::string> & names, const Shape & shape,
                        const double * sums, const int64_t * counts, const double * signed_sums) {
    return guarded("for the sums to restore", [&] {
        return sums_.restore(names, shape, sums, counts, signed_sums)
                   ? Status{}
                   : Status::failed(Code::bad_argument, "a weight to restore has sums already");
    });
}

} // namespace imatrix
