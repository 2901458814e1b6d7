#include "add_rows.h"

#include "parallel.h"
#include "row_kernels.h"

#include <algorithm>
#include <cmath>

namespace imatrix {
namespace {

// float32 partial sums run over at most this many rows, then go to float64. The relative
// error of such a sum is below 512 * 2^-24 = 3e-5 in the worst case and near 1e-6 in fact; the
// error of a signed sum is that much of the sum of the magnitudes.
constexpr size_t kRowsPerPartial = 512;

// Columns that one kernel call adds: their partial sums stay in the first cache level.
constexpr size_t kColumns = 2048;

// A task gets at least this many columns, and starts at a multiple of the kernels' vectors: a
// column of a kernel's tail is rounded differently from one of its middle (row_kernels.cpp).
constexpr size_t kLeastColumns = 64;

// Fewer elements than this take less time than it takes to wake a thread.
constexpr size_t kWorthSharing = size_t{1} << 16;

int64_t add_columns(const RowBlock & block, size_t first, size_t last) {
    const float * shifted[kRowsPerPartial];
    float         partial[kColumns];
    float         signed_partial[kColumns];
    const bool    both = block.signed_sums != nullptr;
    for (size_t a = first; a < last; a += kColumns) {
        const size_t n = std::min(kColumns, last - a);
        for (size_t r = 0; r < block.n_rows; r += kRowsPerPartial) {
            const size_t count = std::min(kRowsPerPartial, block.n_rows - r);
            for (size_t k = 0; k < count; ++k) {
                shifted[k] = block.rows[r + k] + a;
            }
            std::fill_n(partial, n, 0.0f);
            if (both) {
                std::fill_n(signed_partial, n, 0.0f);
            }
            chosen_row_kernel().run(shifted, count, n, partial, both ? signed_partial : nullptr);
            // A sum of squares is finite only if every one of them is, and then no value is beyond
            // 2^64, so that their sum is finite too.
            for (size_t j = 0; j < n; ++j) {
                if (!std::isfinite(partial[j])) {
                    return static_cast<int64_t>(a + j);
                }
                block.sums[a + j] += static_cast<double>(partial[j]);
            }
            if (both) {
                for (size_t j = 0; j < n; ++j) {
                    block.signed_sums[a + j] += static_cast<double>(signed_partial[j]);
                }
            }
        }
    }
    return -1;
}

} // namespace

NonFinite add_rows(Parallel & threads, const std::vector<RowBlock> & blocks, size_t n) {
    size_t n_rows = 0;
    for (const RowBlock & block : blocks) {
        n_rows += block.n_rows;
    }
    NonFinite bad;
    if (threads.threads() == 1 || n_rows * n < kWorthSharing) {
        for (size_t b = 0; b < blocks.size() && bad.channel < 0; ++b) {
            bad = {b, add_columns(blocks[b], 0, n)};
        }
        return bad;
    }
    // each thread gets several tasks, so that the last ones to finish are not waited for long
    const size_t want  = (4 * threads.threads() + blocks.size() - 1) / blocks.size();
    const size_t most  = std::max<size_t>(1, n / kLeastColumns);
    const size_t parts = std::min(want, most);
    const size_t width =
        ((n + parts - 1) / parts + kLeastColumns - 1) / kLeastColumns * kLeastColumns;

    std::vector<int64_t> found(blocks.size() * parts, -1);
    threads.run(found.size(), [&](size_t task) {
        const size_t first = std::min(n, task % parts * width);
        found[task]        = add_columns(blocks[task / parts], first, std::min(n, first + width));
    });
    for (size_t task = 0; task < found.size(); ++task) {
        if (found[task] >= 0) {
            return {task / parts, found[task]};
        }
    }
    return bad;
}

} // namespace imatrix
