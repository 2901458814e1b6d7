// Adds x² and x to sums: every collected activation goes through this loop.
#pragma once

#include <cstddef>
#include <string>

namespace imatrix {

// acc[j] += rows[0][j]² + rows[1][j]² + ... for j < n, in float32, and, unless it is NULL,
// signed_acc[j] += rows[0][j] + rows[1][j] + ... The sums of squares are the same with and
// without it. `rows` are pointers to n contiguous floats each, in any order, aligned to 4 bytes.
// float32 holds a partial sum over a few hundred rows well (see kRowsPerPartial in
// add_rows.cpp); longer sums belong in float64.
using RowKernel = void (*)(const float * const * rows, size_t n_rows, size_t n, float * acc,
                           float * signed_acc);

struct NamedRowKernel {
    const char * name; // "avx512", "avx2", "neon", "plain"
    RowKernel    run;
};

// The kernels that this processor can run, best first; "plain" is always the last.
// Returns how many there are (at most 4) and writes them to `out`.
size_t row_kernels(NamedRowKernel out[4]);

// The one that sums are made with, chosen once: the best, or the one that the environment variable
// IMATRIX_KERNEL names, by which each can be tried on one machine.
const NamedRowKernel & chosen_row_kernel();

// Why the kernel that IMATRIX_KERNEL names cannot be had, with those that can; "" if nothing is
// wrong. Ask before sums are made: the best is
// taken then.
std::string row_kernel_refusal();

} // namespace imatrix
