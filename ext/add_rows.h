// Adds squares of rows, and the rows themselves, to float64 sums, with several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace imatrix {

class Parallel;

// The rows of one matrix or expert and the sums that their squares and they are added to.
struct RowBlock {
    const float * const * rows        = nullptr; // n contiguous floats each
    size_t                n_rows      = 0;
    double *              sums        = nullptr; // [n]
    double *              signed_sums = nullptr; // [n], or NULL: the squares only
};

// What was found not to be finite: the lowest channel of the first block that has one.
struct NonFinite {
    size_t  block   = 0;
    int64_t channel = -1; // -1: all is finite
};

// sums[j] += the squares of column j, signed_sums[j] += column j, for every block. The work
// is divided among threads by columns and by blocks, never by rows, so that the sums do not depend
// on the number of threads. After a NaN or Inf the sums of that block are of no use.
NonFinite add_rows(Parallel & threads, const std::vector<RowBlock> & blocks, size_t n);

} // namespace imatrix
