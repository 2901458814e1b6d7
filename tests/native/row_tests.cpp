// The row kernels and what shares rows among threads, against sums in double. It needs the three
// files that it tests and nothing of the engine, so that it is quickly compiled for another
// processor (benchmarks/portable.py).
#include "add_rows.h"
#include "checks.h"
#include "parallel.h"
#include "row_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

using namespace imatrix;
using namespace imatrix::testing;

namespace {

void check_kernels() {
    NamedRowKernel kernels[4];
    const size_t   n_kernels = row_kernels(kernels);
    CHECK(n_kernels >= 1 && std::string(kernels[n_kernels - 1].name) == "plain");
    for (size_t k = 0; k < n_kernels; ++k) {
        for (int round = 0; round < 100; ++round) {
            const size_t n      = static_cast<size_t>(any(1, 70));
            const size_t n_rows = static_cast<size_t>(any(0, 20));
            const size_t shift  = static_cast<size_t>(any(0, 3)); // any alignment of 4 bytes
            // exactly as long as needed: a sanitizer sees a read past the end
            std::vector<std::vector<float>> rows;
            std::vector<const float *>      pointers;
            for (size_t r = 0; r < n_rows; ++r) {
                rows.push_back(normal(n + shift));
                pointers.push_back(rows.back().data() + shift);
            }
            std::vector<float> acc(n, 0.5f), alone(n, 0.5f), signed_acc(n, 0.5f);
            kernels[k].run(pointers.data(), n_rows, n, alone.data(), nullptr);
            kernels[k].run(pointers.data(), n_rows, n, acc.data(), signed_acc.data());
            CHECK(acc == alone);
            for (size_t j = 0; j < n; ++j) {
                double want = 0.5, want_signed = 0.5, magnitude = 0.5;
                for (const float * row : pointers) {
                    want += static_cast<double>(row[j]) * row[j];
                    want_signed += static_cast<double>(row[j]);
                    magnitude += std::abs(static_cast<double>(row[j]));
                }
                CHECK(near(acc[j], want));
                CHECK(std::abs(signed_acc[j] - want_signed) <= 1e-5 * magnitude);
            }
        }
    }
}

// The same bits by any number of threads, over and over by the same ones.
void check_threads() {
    constexpr size_t                 n = 1100, n_rows = 120; // enough to be shared
    const std::vector<float>         data = normal(n * n_rows);
    std::vector<const float *>       rows;
    std::vector<std::vector<double>> first;
    for (size_t r = 0; r < n_rows; ++r) {
        rows.push_back(data.data() + r * n);
    }
    for (const size_t n_threads : {1, 2, 5}) {
        Parallel threads;
        threads.set_threads(n_threads);
        for (int round = 0; round < 20; ++round) {
            std::vector<std::vector<double>> sums(4, std::vector<double>(n));
            const std::vector<RowBlock>      blocks{
                {rows.data(), 70, sums[0].data(), sums[2].data()},
                {rows.data() + 70, 50, sums[1].data(), sums[3].data()}};
            CHECK(add_rows(threads, blocks, n).channel < 0);
            first = first.empty() ? sums : first;
            CHECK(sums == first);
        }
    }
}

} // namespace

int main() {
    NamedRowKernel kernels[4];
    const size_t   n = row_kernels(kernels);
    for (size_t k = 0; k < n; ++k) {
        std::printf("kernel %s\n", kernels[k].name);
    }
    check_kernels();
    check_threads();
    std::printf(g_failed == 0 ? "ok\n" : "%d checks failed\n", g_failed);
    return g_failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
