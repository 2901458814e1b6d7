#include "eval_hook.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>

namespace imatrix {
bool EvalHook::callback(ggml_tensor * node, bool ask, void * user_data) noexcept {
    auto & hook = *static_cast<EvalHook *>(user_data);
    // After an error the chunk is lost anyway: let the rest of the graph run unobserved.
    // (Returning false from the second call would end this split's nodes early, but the
    // decode would still report success; ggml-backend.cpp, compute_splits.)
    if (!hook.enabled_ || !hook.observing_ || hook.error_.kind != Failure::none) {
        return !ask;
    }
    try {
        if (ask) {
            return hook.ask(node);
        }
        return hook.visit(node);
    } catch (const std::exception &) { // bad_alloc, or a length_error on the way to it
        hook.error_ = {Failure::out_of_memory, {}, -1, -1};
    }
    return !ask;
}

void EvalHook::begin_chunk() {
    settle();
    error_ = {};
    devices_.begin_chunk();
}

void EvalHook::settle() {
    const StagedRows::Bad bad = staged_.settle();
    if (bad.found) {
        fail_non_finite(bad.weight, bad.slot, bad.mat, bad.channel);
    }
}

void EvalHook::finish_chunk() {
    settle();
    if (error_.kind != Failure::none) {
        return; // this chunk's sums are dropped anyway
    }
    counters_.fetched_bytes +=
        devices_.fetch([this](size_t weight, size_t slot, const float * sums, int64_t width) {
            const Shape shape = sums_.slots()[slot].shape;
            for (int64_t mat = 0; mat < shape.n_mat; ++mat) {
                const bool expert = shape.n_counts > 1;
                if (expert && sums_.slots()[slot].pending_counts[static_cast<size_t>(mat)] == 0) {
                    continue; // not reached by this chunk
                }
                if (!add_sums(weight, slot, mat, sums + mat * width, width > shape.n_in)) {
                    return;
                }
            }
        });
}

void EvalHook::begin_decode(Wanted wanted, const std::string & prefix) {
    wanted_ = wanted;
    prefix_ = prefix;
    ++graph_;
    start_graph();
    activations_.clear();
    // slots that were restored and not made here: of no graph
    slot_made_in_.resize(sums_.slots().size(), 0);
    slot_fed_in_.resize(sums_.slots().size(), 0);
}

void EvalHook::fail(Failure kind, const std::string & weight, int64_t mat, int64_t channel) {
    if (error_.kind != Failure::none) {
        return;
    }
    // rows that came before may be wrong too, and have not been looked at yet
    const StagedRows::Bad before = staged_.settle();
    if (before.found) {
        fail_non_finite(before.weight, before.slot, before.mat, before.channel);
        return;
    }
    error_ = {kind, weight, mat, channel};
}

void EvalHook::fail_non_finite(size_t weight, size_t slot, int64_t mat, int64_t channel) {
    const bool several = sums_.slots()[slot].shape.n_mat > 1;
    fail(Failure::non_finite, sums_.weights()[weight].name, several ? mat : -1, channel);
}

// Called for every node before it runs. True makes the scheduler compute up to and
// including this node, wait, and come back with collect().
bool EvalHook::ask(ggml_tensor * node) {
    // A node that is about to be computed is no activation of an earlier graph any more, even if
    // it has the address of one: tensors of the next graph are made in the same memory.
    forget(node);
    const bool wanted = has_rows(node, wanted_);
    const bool effect = has_effect(node);
    if (!wanted && !effect) {
        return false;
    }
    run_.n_wanted += wanted ? 1 : 0;
    run_.n_effects += effect ? 1 : 0;
    ending_ =
        end_.n_wanted > 0 && run_.n_wanted == end_.n_wanted && run_.n_effects == end_.n_effects;
    // the scheduler stops after the last one even if its rows are known
    collecting_ = wanted && is_new(node, rows_of(node));
    return collecting_ || ending_;
}

// Whether the rows of a wanted node are to be collected; if not, they were for another weight.
bool EvalHook::is_new(ggml_tensor * node, int64_t rows) {
    const size_t weight = sums_.weight(prefix_ + plain_name(node->src[0]->name));
    seen_in_.resize(sums_.weights().size(), 0);
    if (seen_in_[weight] == graph_) {
        // One decode runs one graph per ubatch, and the same tensor addresses come again:
        // what is known about activations ends here.
        ++graph_;
        activations_.clear();
    }
    seen_in_[weight] = graph_;

    if (!grouping_) {
        return true;
    }
    const Shape shape = shape_of(node);
    for (auto known = activations_.rbegin(); known != activations_.rend(); ++known) {
        if (known->rows != node->src[1] || known->ids != node->src[2] || known->shape != shape) {
            continue;
        }
        // fetched already: this weight is fed too, there is nothing to compute
        if (!take_slot(weight, shape, known->slot)) {
            return false;
        }
        if (sums_.weights()[weight].slot != known->slot) {
            fail(Failure::regroup, sums_.weights()[weight].name);
            return false;
        }
        sums_.weights()[weight].pending_rows += rows;
        return false;
    }
    return true;
}

void EvalHook::forget(const ggml_tensor * computed) {
    const auto is_computed = [computed](const Activation & known) {
        return known.rows == computed || known.rows->view_src == computed;
    };
    activations_.erase(std::remove_if(activations_.begin(), activations_.end(), is_computed),
                       activations_.end());
}

// Gives a weight its slot on first use: `shared`, or one of its own. A slot that has
// data from before this graph is never shared with a newcomer.
bool EvalHook::take_slot(size_t weight, const Shape & shape, size_t shared) {
    size_t & slot = sums_.weights()[weight].slot;
    if (slot == Sums::npos) {
        const bool fresh = shared != Sums::npos && slot_made_in_[shared] == graph_;
        if (fresh) {
            slot = shared;
        } else {
            const size_t made = sums_.add_slot(shape);
            slot              = made;
        }
        slot_made_in_.resize(sums_.slots().size(), graph_);
        slot_fed_in_.resize(sums_.slots().size(), 0);
        return true;
    }
    if (sums_.slots()[slot].shape != shape) {
        fail(Failure::shape_changed, sums_.weights()[weight].name);
        return false;
    }
    return true;
}

const char * EvalHook::host_bytes(const ggml_tensor * tensor, std::vector<char> & staging) {
    const ggml_backend_buffer_t buffer =
        tensor->view_src != nullptr ? tensor->view_src->buffer : tensor->buffer;
    if (buffer == nullptr || ggml_backend_buffer_is_host(buffer)) {
        return static_cast<const char *>(tensor->data);
    }
    // ggml_nbytes spans a strided view from its first to its last byte
    const size_t size = ggml_nbytes(tensor);
    staging.resize(size);
    ggml_backend_tensor_get(tensor, staging.data(), 0, size);
    counters_.fetched_bytes += static_cast<int64_t>(size);
    return staging.data();
}

// Adds float32 sums to the pending ones, if they are finite. With `both` the signed ones follow
// behind those of squares.
bool EvalHook::add_sums(size_t weight, size_t slot, int64_t mat, const float * partial, bool both) {
    const Shape & shape = sums_.slots()[slot].shape;
    // a sum of squares is finite only if every one of them is, and then the signed one is too
    for (int64_t j = 0; j < shape.n_in; ++j) {
        if (!std::isfinite(partial[j])) {
            fail(Failure::non_finite, sums_.weights()[weight].name, shape.n_mat > 1 ? mat : -1, j);
            return false;
        }
    }
    sums_.add(slot, mat, partial, both ? partial + shape.n_in : nullptr);
    return true;
}

// Whether the rows need no more work: a device added them, or failed.
bool EvalHook::summed_there(size_t weight, DeviceSums::Outcome outcome, int64_t n_rows) {
    switch (outcome) {
        case DeviceSums::Outcome::added:
            counters_.squared_elements +=
                n_rows * sums_.slots()[sums_.weights()[weight].slot].shape.n_in;
            return true;
        case DeviceSums::Outcome::failed:
            fail(Failure::device_failed, sums_.weights()[weight].name);
            return true;
        case DeviceSums::Outcome::unsupported: break;
    }
    return false;
}

void EvalHook::collect_dense(size_t weight, const ggml_tensor * node) {
    const ggml_tensor * w     = node->src[0];
    const ggml_tensor * x     = node->src[1];
    const size_t        slot  = sums_.weights()[weight].slot;
    const Shape         shape = sums_.slots()[slot].shape;
    sums_.count(slot, 0, rows_of(node));

    // in order: matrix m of the slot multiplies the m-th of equal parts of the rows
    const bool in_order = shape.n_mat == 1 || (w->ne[2] == x->ne[2] && w->ne[3] == x->ne[3]);
    const bool far      = device_sums_ && DeviceSums::is_far(x);
    const bool both     = !sums_.slots()[slot].signed_total.empty();
    if (far && in_order &&
        summed_there(weight, devices_.add(x, weight, slot, shape, both), ggml_nrows(x))) {
        return;
    }
    list_rows_of_matrices(w, x, rows_of_);
    if (far && !in_order &&
        summed_there(weight, devices_.add_routed(x, weight, slot, shape, rows_of_, both),
                     ggml_nrows(x))) {
        return;
    }
    add_routed_rows(weight, x);
}

// The rows of rows_of_ in `data`, the bytes of x, and the sums that they go to.
void EvalHook::list_rows(size_t slot, const ggml_tensor * x, const char * data,
                         std::vector<const float *> & rows, std::vector<RowBlock> & blocks,
                         std::vector<int64_t> & mats) {
    rows.clear();
    blocks.clear();
    mats.clear();
    for (int64_t mat = 0; mat < sums_.slots()[slot].shape.n_mat; ++mat) {
        const std::vector<int32_t> & numbers = rows_of_[static_cast<size_t>(mat)];
        if (numbers.empty()) {
            continue;
        }
        for (const int64_t number : numbers) {
            const int64_t i1 = number % x->ne[1];
            const int64_t i2 = number / x->ne[1] % x->ne[2];
            const int64_t i3 = number / x->ne[1] / x->ne[2];
            rows.push_back(reinterpret_cast<const float *>(
                data + i1 * static_cast<int64_t>(x->nb[1]) + i2 * static_cast<int64_t>(x->nb[2]) +
                i3 * static_cast<int64_t>(x->nb[3])));
        }
        double * sums = sums_.touch(slot, mat);
        blocks.push_back({nullptr, numbers.size(), sums, sums_.signed_pending(slot, mat)});
        mats.push_back(mat);
    }
    const float * const * first = rows.data();
    for (RowBlock & block : blocks) {
        block.rows = first;
        first += block.n_rows;
    }
}

// Squares and adds the rows of rows_of_ on the host. If they had to be copied from a device, the
// device goes on while they are added.
void EvalHook::add_routed_rows(size_t weight, const ggml_tensor * x) {
    const size_t slot = sums_.weights()[weight].slot;
    const size_t n_in = static_cast<size_t>(sums_.slots()[slot].shape.n_in);
    if (DeviceSums::is_far(x)) {
        StagedRows::Job & job  = staged_.next();
        const char *      data = host_bytes(x, job.bytes);
        list_rows(slot, x, data, job.rows, job.blocks, job.mats);
        job.weight = weight;
        job.slot   = slot;
        job.n      = n_in;
        counters_.squared_elements += static_cast<int64_t>(job.rows.size() * n_in);
        staged_.submit();
        return;
    }
    staged_.wait_for(slot);
    list_rows(slot, x, static_cast<const char *>(x->data), rows_, blocks_, block_mats_);
    const NonFinite bad = add_rows(threads_, blocks_, n_in);
    if (bad.channel >= 0) {
        fail_non_finite(weight, slot, block_mats_[bad.block], bad.channel);
        return;
    }
    counters_.squared_elements += static_cast<int64_t>(rows_.size() * n_in);
}

// Reads the experts of every token into ids_, [n_tokens, n_used].
void EvalHook::read_ids(const ggml_tensor * ids) {
    if (device_sums_ && DeviceSums::is_far(ids) && devices_.fetch_ids(ids, ids_)) {
        counters_.fetched_bytes += ggml_nelements(ids) * static_cast<int64_t>(sizeof(int32_t));
        return;
    }
    const char * bytes = host_bytes(ids, staging_ids_);
    ids_.resize(static_cast<size_t>(ggml_nelements(ids)));
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t used = 0; used < ids->ne[0]; ++used) {
            std::memcpy(&ids_[static_cast<size_t>(token * ids->ne[0] + used)],
                        bytes + token * static_cast<int64_t>(ids->nb[1]) +
                            used * static_cast<int64_t>(ids->nb[0]),
                        sizeof(int32_t));
        }
    }
}

void EvalHook::collect_experts(size_t weight, const ggml_tensor * node) {
    const ggml_tensor * x        = node->src[1]; // [n_in, n_used or 1, n_tokens]
    const ggml_tensor * ids      = node->src[2]; // [n_used, n_tokens], not contiguous
    const int64_t       n_expert = node->src[0]->ne[2];
    const size_t        slot     = sums_.weights()[weight].slot;
    const Shape         shape    = sums_.slots()[slot].shape;
    if (x->ne[3] != 1 || x->ne[2] != ids->ne[1]) {
        fail(Failure::bad_layout, sums_.weights()[weight].name);
        return;
    }
    read_ids(ids);
    int32_t bad = 0;
    if (!list_rows_of_experts(node->src[0], x, ids_, ids->ne[0], rows_of_, bad)) {
        fail(Failure::bad_expert, sums_.weights()[weight].name, bad);
        return;
    }
    for (int64_t e = 0; e < n_expert; ++e) {
        const size_t n_rows = rows_of_[static_cast<size_t>(e)].size();
        if (n_rows > 0) {
            sums_.count(slot, e, static_cast<int64_t>(n_rows));
        }
    }
    const bool both = !sums_.slots()[slot].signed_total.empty();
    if (device_sums_ && DeviceSums::is_far(x) &&
        summed_there(weight, devices_.add_routed(x, weight, slot, shape, rows_of_, both),
                     ggml_nelements(ids))) {
        return;
    }
    add_routed_rows(weight, x);
}

// Called after a node that ask() wanted has run and its backend was synchronized.
void EvalHook::collect(ggml_tensor * node) {
    ++counters_.stops;
    const size_t weight = sums_.weight(prefix_ + plain_name(node->src[0]->name));
    const Shape  shape  = shape_of(node);
    if (node->src[1]->nb[0] != sizeof(float)) {
        fail(Failure::bad_layout, sums_.weights()[weight].name);
        return;
    }
    if (!take_slot(weight, shape, Sums::npos)) {
        return;
    }
    const size_t slot = sums_.weights()[weight].slot;
    if (grouping_) {
        if (slot_fed_in_[slot] == graph_) {
            // another weight of the group brought its own activation: not the same any more
            fail(Failure::regroup, sums_.weights()[weight].name);
            return;
        }
        slot_fed_in_[slot] = graph_;
        activations_.push_back({node->src[1], node->src[2], shape, slot});
    }
    if (node->op == GGML_OP_MUL_MAT_ID) {
        collect_experts(weight, node);
    } else {
        collect_dense(weight, node);
    }
    sums_.weights()[weight].pending_rows += rows_of(node);
}

// After a node that ask() stopped at. False leaves the rest of this graph out.
bool EvalHook::visit(ggml_tensor * node) {
    if (collecting_) {
        collect(node);
    }
    if (!ending_) {
        return true;
    }
    ++counters_.ended;
    start_graph(); // the next node belongs to the next ubatch
    return false;
}

bool EvalHook::groups_agree() const {
    for (const Sums::Weight & weight : sums_.weights()) {
        if (weight.slot != Sums::npos &&
            weight.pending_rows != sums_.slots()[weight.slot].pending_rows) {
            return false;
        }
    }
    return true;
}

} // namespace imatrix
