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

size_t Sums::add_slot(const Shape & shape) {
    Slot         slot;
    const size_t values = static_cast<size_t>(shape.n_mat) * static_cast<size_t>(shape.n_in);
    slot.shape          = shape;
    slot.total.assign(values, 0.0);
    slot.pending.assign(values, 0.0);
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

void Sums::add(size_t index, int64_t mat, const float * partial) {
    double *      sums = touch(index, mat);
    const int64_t n_in = slots_[index].shape.n_in;
    for (int64_t j = 0; j < n_in; ++j) {
        sums[j] += static_cast<double>(partial[j]);
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
        const int64_t n = slot.shape.n_in;
        for (int64_t mat = 0; mat < slot.shape.n_mat; ++mat) {
            if (!slot.touched[static_cast<size_t>(mat)]) {
                continue; // an expert that this chunk did not reach
            }
            double * total   = slot.total.data() + mat * n;
            double * pending = slot.pending.data() + mat * n;
            for (int64_t j = 0; j < n; ++j) {
                total[j] += pending[j];
            }
        }
        for (size_t i = 0; i < slot.total_counts.size(); ++i) {
            slot.total_counts[i] += slot.pending_counts[i];
        }
    }
    discard();
}

void Sums::discard() {
    for (Slot & slot : slots_) {
        if (slot.dirty) {
            const int64_t n = slot.shape.n_in;
            for (int64_t mat = 0; mat < slot.shape.n_mat; ++mat) {
                if (slot.touched[static_cast<size_t>(mat)]) {
                    std::fill_n(slot.pending.data() + mat * n, n, 0.0);
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
                   const int64_t * counts) {
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
    for (const std::string & name : names) {
        weights_[weight(name)].slot = index;
    }
    return true;
}

void Sums::clear() {
    discard();
    for (Slot & slot : slots_) {
        std::fill(slot.total.begin(), slot.total.end(), 0.0);
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
