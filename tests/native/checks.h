// What both programs of tests check with, and the random numbers that they check.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace imatrix::testing {

inline int g_failed = 0;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                            \
            ++g_failed;                                                                            \
        }                                                                                          \
    } while (false)

inline std::mt19937 g_random{20240607};

inline int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}

inline std::vector<float> normal(size_t n) {
    std::normal_distribution<float> draw;
    std::vector<float>              out(n);
    std::generate(out.begin(), out.end(), [&] { return draw(g_random); });
    return out;
}

// Of sums in float32: a hundred additions, each rounded to 6e-8 of the sum, are off by 6e-6.
inline bool near(double got, double want) {
    return std::abs(got - want) <= 1e-5 * std::abs(want) + 1e-30;
}

} // namespace imatrix::testing
