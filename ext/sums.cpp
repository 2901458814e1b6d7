#include "sums.h"

#include <algorithm>

namespace imatrix {

size_t Sums::weight(const std::string & name) {
    const auto found = by_name_.find(name);
    if (found != by_name_.end()) {
        return found->second;
    }
    weights_.push_back({name, npos, 0});
    by_name_.emplace(name, weights_.size() - 1);
    return weights_.size() - 1;
}

size_t Sums::find(const std::string & name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? npos : found->second;
}

void Sums::keep_signed(bool on) {
    keeps_signed_ = on;
    if (!on) {
        for (Slot & slot : slots_) {
            slot.signed_total   = {};
            slot.signed_pending = {};
        }
    }
}

size_t Sums::add_slot(const Shape & shape) {
    Slot         slot;
    const size_t values = static_cast<size_t>(shape.n_mat) * static_cast<size_t>(shape.n_in);
    slot.shape          = shape;
    slot.total.assign(values, 0.0);
    slot.pending.assign(values, 0.0);
    if (keeps_signed_) {
        slot.signed_total.assign(values, 0.0);
        slot.signed_pending.assign(values, 0.0);
    }
    slot.total_counts.assign(static_cast<size_t>(shape.n_counts), 0);
    slot.pending_counts.assign(static_cast<size_t>(shape.n_counts), 0);
    slot.touched.assign(static_cast<size_t>(shape.n_mat), 0);
    slots_.push_back(std::move(slot));
    return slots_.size() - 1;
}

double * Sums::touch(size_t index, int64_t mat) {
    Slot & slot                            = slots_[index];
    slot.touched[static_cast<size_t>(mat)] = 1;
    slot.dirty                             = true;
    return slot.pending.data() + mat * slot.shape.n_in;
}

double * Sums::signed_pending(size_t index, int64_t mat) {
    Slot & slot = slots_[index];
    return slot.signed_pending.empty() ? nullptr
                                       : slot.signed_pending.data() + mat * slot.shape.n_in;
}

void Sums::add(size_t index, int64_t mat, const float * partial, const float * signed_partial) {
    const int64_t n_in = slots_[index].shape.n_in;
    const auto    add  = [n_in](double * sums, const float * more) {
        for (int64_t j = 0; j < n_in; ++j) {
            sums[j] += static_cast<double>(more[j]);
        }
    };
    add(touch(index, mat), partial);
    double * signed_sums = signed_pending(index, mat);
    if (signed_sums != nullptr && signed_partial != nullptr) {
        add(signed_sums, signed_partial);
    }
}

void Sums::count(size_t index, int64_t at, int64_t rows) {
    Slot & slot = slots_[index];
    slot.pending_counts[static_cast<size_t>(at)] += rows;
    slot.pending_rows += rows;
    slot.dirty = true;
}

void Sums::commit() {
    for (Slot & slot : slots_) {
        if (!slot.dirty) {
            continue;
        }
        const int64_t n   = slot.shape.n_in;
        const auto    add = [n](std::vector<double> & total, const std::vector<double> & pending,
                                int64_t mat) {
            for (int64_t j = mat * n; j < (mat + 1) * n; ++j) {
                total[static_cast<size_t>(j)] += pending[static_cast<size_t>(j)];
            }
        };
        for (int64_t mat = 0; mat < slot.shape.n_mat; ++mat) {
            if (!slot.touched[static_cast<size_t>(mat)]) {
                continue; // an expert that this chunk did not reach
            }
            add(slot.total, slot.pending, mat);
            if (!slot.signed_total.empty()) {
                add(slot.signed_total, slot.signed_pending, mat);
            }
        }
        for (size_t i = 0; i < slot.total_counts.size(); ++i) {
            slot.total_counts[i] += slot.pending_counts[i];
        }
    }
    discard();
}

void Sums::discard() {
    for (size_t i = 0; i < slots_.size(); ++i) {
        Slot & slot = slots_[i];
        if (slot.dirty) {
            const int64_t n = slot.shape.n_in;
            for (int64_t mat = 0; mat < slot.shape.n_mat; ++mat) {
                if (slot.touched[static_cast<size_t>(mat)]) {
                    std::fill_n(slot.pending.data() + mat * n, n, 0.0);
                    if (double * signed_sums = signed_pending(i, mat)) {
                        std::fill_n(signed_sums, n, 0.0);
                    }
                }
            }
            std::fill(slot.touched.begin(), slot.touched.end(), uint8_t{0});
            std::fill(slot.pending_counts.begin(), slot.pending_counts.end(), int64_t{0});
            slot.dirty = false;
        }
        slot.pending_rows = 0;
    }
    for (Weight & weight : weights_) {
        weight.pending_rows = 0;
    }
}

bool Sums::restore(const std::vector<std::string> & names, const Shape & shape, const double * sums,
                   const int64_t * counts, const double * signed_sums) {
    for (const std::string & name : names) {
        const size_t known = find(name);
        if (known != npos && weights_[known].slot != npos) {
            return false;
        }
    }
    const size_t index = add_slot(shape);
    Slot &       slot  = slots_[index];
    std::copy_n(sums, slot.total.size(), slot.total.begin());
    std::copy_n(counts, slot.total_counts.size(), slot.total_counts.begin());
    if (signed_sums == nullptr) {
        slot.signed_total   = {};
        slot.signed_pending = {};
    } else if (keeps_signed_) {
        std::copy_n(signed_sums, slot.signed_total.size(), slot.signed_total.begin());
    }
    for (const std::string & name : names) {
        weights_[weight(name)].slot = index;
    }
    return true;
}

void Sums::clear() {
    discard();
    for (Slot & slot : slots_) {
        std::fill(slot.total.begin(), slot.total.end(), 0.0);
        std::fill(slot.signed_total.begin(), slot.signed_total.end(), 0.0);
        std::fill(slot.total_counts.begin(), slot.total_counts.end(), int64_t{0});
    }
}

void Sums::ungroup() {
    discard();
    std::vector<uint8_t> taken(slots_.size(), 0);
    for (Weight & weight : weights_) {
        if (weight.slot == npos) {
            continue;
        }
        if (!taken[weight.slot]) {
            taken[weight.slot] = 1;
            continue;
        }
        const Slot copy = slots_[weight.slot];
        slots_.push_back(copy);
        weight.slot = slots_.size() - 1;
        taken.push_back(1);
    }
}

} // namespace imatrix
