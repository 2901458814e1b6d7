// The store: per weight, float64 sums of squared activations and of the activations themselves,
// and int64 counts of rows.
#pragma once

#include "live.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace imatrix {

// The shape of what is kept for a weight.
//   dense weight:  n_mat rows of sums (a 3-D weight has one a matrix), one count
//   experts:       n_mat rows of sums and n_mat counts, by expert id
// as llama-imatrix keeps it (tools/imatrix/imatrix.cpp, collect_imatrix).
struct Shape {
    int64_t n_in     = 0;
    int64_t n_mat    = 1;
    int64_t n_counts = 1;

    bool operator==(const Shape & o) const {
        return n_in == o.n_in && n_mat == o.n_mat && n_counts == o.n_counts;
    }
    bool operator!=(const Shape & o) const { return !(*this == o); }
};

// Additions go to a pending side first and count only when the whole chunk is good:
// commit() moves them over, discard() drops them.
//
// Weights that are fed by the same activation (q, k and v; gate and up) share one slot,
// so that it is squared, added and kept once. The eval hook finds in the first chunk which do;
// ungroup() gives every weight a slot of its own again.
class Sums : public Counted<Sums> {
public:
    static constexpr size_t npos = static_cast<size_t>(-1);

    struct Slot {
        Shape                shape;
        std::vector<double>  total;          // [n_mat, n_in]
        std::vector<double>  pending;        // [n_mat, n_in]
        std::vector<double>  signed_total;   // [n_mat, n_in], or empty: not kept
        std::vector<double>  signed_pending; // as signed_total
        std::vector<int64_t> total_counts;   // [n_counts]
        std::vector<int64_t> pending_counts; // [n_counts]
        std::vector<uint8_t> touched;        // [n_mat], pending holds something
        int64_t              pending_rows = 0;
        bool                 dirty        = false;
    };

    struct Weight {
        std::string name;
        size_t      slot         = npos;
        int64_t     pending_rows = 0; // rows that reached this weight in this chunk
    };

    // The index of a weight, made on first use without a slot.
    size_t weight(const std::string & name);
    size_t find(const std::string & name) const; // npos if there is none

    // Whether sums of the activations themselves are kept beside those of their squares. Off: those
    // that there are are dropped, because they would lack the rows to come. On: slots that are made
    // from then on have them; a slot that is there already has rows that they would lack.
    void keep_signed(bool on);
    bool keeps_signed() const { return keeps_signed_; }

    size_t add_slot(const Shape & shape);

    // The pending sums of a matrix, to be added to.
    double * touch(size_t slot, int64_t mat);
    // The pending signed sums of a matrix that was touched; NULL if they are not kept.
    double * signed_pending(size_t slot, int64_t mat);
    // pending[mat] += partial, float32 to float64; likewise signed_pending unless it is NULL
    void add(size_t slot, int64_t mat, const float * partial, const float * signed_partial);
    void count(size_t slot, int64_t index, int64_t rows);

    void commit();
    void discard();

    // Makes a slot that holds committed sums [n_mat, n_in] and counts [n_counts], and gives it
    // to all `names`. `signed_sums`: NULL if those rows have none. False, and nothing is changed,
    // if one of the names has a slot already.
    bool restore(const std::vector<std::string> & names, const Shape & shape, const double * sums,
                 const int64_t * counts, const double * signed_sums);

    // Sets every sum and count to zero; which weights share a slot stays. Call it between chunks.
    void clear();

    // Gives every weight its own slot: a copy of the committed part of the one it shared.
    // Call it between chunks.
    void ungroup();

    std::vector<Weight> &       weights() { return weights_; }
    const std::vector<Weight> & weights() const { return weights_; }
    std::vector<Slot> &         slots() { return slots_; }
    const std::vector<Slot> &   slots() const { return slots_; }

private:
    std::vector<Weight>                     weights_;
    std::vector<Slot>                       slots_;
    std::unordered_map<std::string, size_t> by_name_;
    bool                                    keeps_signed_ = true;
};

} // namespace imatrix
