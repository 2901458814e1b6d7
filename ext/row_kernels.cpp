#include "row_kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define IMATRIX_X86 1
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#define IMATRIX_NEON 1
#include <arm_neon.h>
#endif

namespace imatrix {
namespace {

// Every kernel reads eight rows a pass over acc: the rows are what costs memory
// bandwidth, acc (a few thousand floats) stays in the first cache level.
constexpr size_t kUnroll = 8;

// Each of the eight streams is prefetched this many floats ahead. Rows that no cache holds are then
// read as fast as by a plain read, and at 0.74 to 0.81 of its speed without (EPYC, AVX-512,
// benchmarks/test_row_kernels.py). A prefetch past the end of a row cannot fault.
constexpr size_t kAhead = 256;

// Every kernel is compiled twice: with Signed it adds the values beside their squares; without, it
// does not touch `signed_acc`, which may be NULL.
template <bool Signed>
void plain_row(const float * __restrict x, size_t n, float * __restrict acc,
               float * __restrict signed_acc) {
    for (size_t j = 0; j < n; ++j) {
        acc[j] += x[j] * x[j];
        if constexpr (Signed) {
            signed_acc[j] += x[j];
        }
    }
}

// `signed_acc` from element j on; NULL stays NULL
inline float * from(float * signed_acc, size_t j) {
    return signed_acc == nullptr ? nullptr : signed_acc + j;
}

template <bool Signed>
void add_plain(const float * const * rows, size_t n_rows, size_t n, float * acc,
               float * signed_acc) {
    for (size_t r = 0; r < n_rows; ++r) {
        plain_row<Signed>(rows[r], n, acc, signed_acc);
    }
}

void run_plain(const float * const * rows, size_t n_rows, size_t n, float * acc,
               float * signed_acc) {
    (signed_acc != nullptr ? add_plain<true> : add_plain<false>) (rows, n_rows, n, acc, signed_acc);
}

#ifdef IMATRIX_X86
template <bool Signed>
__attribute__((target("avx512f"))) void add_avx512(const float * const * rows, size_t n_rows,
                                                   size_t n, float * acc, float * signed_acc) {
    size_t r = 0;
    for (; r + kUnroll <= n_rows; r += kUnroll) {
        const float * const * x = rows + r;
        size_t                j = 0;
        for (; j + 16 <= n; j += 16) {
            // two chains, so that the additions do not wait for each other
            __m512                  a = _mm512_loadu_ps(acc + j);
            __m512                  b = _mm512_setzero_ps();
            [[maybe_unused]] __m512 c = b;
            [[maybe_unused]] __m512 d = b;
            if constexpr (Signed) {
                c = _mm512_loadu_ps(signed_acc + j);
            }
            for (size_t k = 0; k < kUnroll; k += 2) {
                __builtin_prefetch(x[k] + j + kAhead);
                __builtin_prefetch(x[k + 1] + j + kAhead);
                const __m512 u = _mm512_loadu_ps(x[k] + j);
                const __m512 v = _mm512_loadu_ps(x[k + 1] + j);
                a              = _mm512_fmadd_ps(u, u, a);
                b              = _mm512_fmadd_ps(v, v, b);
                if constexpr (Signed) {
                    c = _mm512_add_ps(c, u);
                    d = _mm512_add_ps(d, v);
                }
            }
            _mm512_storeu_ps(acc + j, _mm512_add_ps(a, b));
            if constexpr (Signed) {
                _mm512_storeu_ps(signed_acc + j, _mm512_add_ps(c, d));
            }
        }
        for (size_t k = 0; k < kUnroll; ++k) {
            plain_row<Signed>(x[k] + j, n - j, acc + j, from(signed_acc, j));
        }
    }
    for (; r < n_rows; ++r) {
        size_t j = 0;
        for (; j + 16 <= n; j += 16) {
            const __m512 u = _mm512_loadu_ps(rows[r] + j);
            _mm512_storeu_ps(acc + j, _mm512_fmadd_ps(u, u, _mm512_loadu_ps(acc + j)));
            if constexpr (Signed) {
                _mm512_storeu_ps(signed_acc + j, _mm512_add_ps(u, _mm512_loadu_ps(signed_acc + j)));
            }
        }
        plain_row<Signed>(rows[r] + j, n - j, acc + j, from(signed_acc, j));
    }
}

void run_avx512(const float * const * rows, size_t n_rows, size_t n, float * acc,
                float * signed_acc) {
    (signed_acc != nullptr ? add_avx512<true> : add_avx512<false>) (rows, n_rows, n, acc,
                                                                    signed_acc);
}

template <bool Signed>
__attribute__((target("avx2,fma"))) void add_avx2(const float * const * rows, size_t n_rows,
                                                  size_t n, float * acc, float * signed_acc) {
    size_t r = 0;
    for (; r + kUnroll <= n_rows; r += kUnroll) {
        const float * const * x = rows + r;
        size_t                j = 0;
        for (; j + 16 <= n; j += 16) { // a cache line
            __m256                  a0 = _mm256_loadu_ps(acc + j);
            __m256                  a1 = _mm256_loadu_ps(acc + j + 8);
            __m256                  b0 = _mm256_setzero_ps();
            __m256                  b1 = _mm256_setzero_ps();
            [[maybe_unused]] __m256 c0 = b0;
            [[maybe_unused]] __m256 c1 = b0;
            [[maybe_unused]] __m256 d0 = b0;
            [[maybe_unused]] __m256 d1 = b0;
            if constexpr (Signed) {
                c0 = _mm256_loadu_ps(signed_acc + j);
                c1 = _mm256_loadu_ps(signed_acc + j + 8);
            }
            for (size_t k = 0; k < kUnroll; k += 2) {
                __builtin_prefetch(x[k] + j + kAhead);
                __builtin_prefetch(x[k + 1] + j + kAhead);
                const __m256 u0 = _mm256_loadu_ps(x[k] + j);
                const __m256 u1 = _mm256_loadu_ps(x[k] + j + 8);
                const __m256 v0 = _mm256_loadu_ps(x[k + 1] + j);
                const __m256 v1 = _mm256_loadu_ps(x[k + 1] + j + 8);
                a0              = _mm256_fmadd_ps(u0, u0, a0);
                a1              = _mm256_fmadd_ps(u1, u1, a1);
                b0              = _mm256_fmadd_ps(v0, v0, b0);
                b1              = _mm256_fmadd_ps(v1, v1, b1);
                if constexpr (Signed) {
                    c0 = _mm256_add_ps(c0, u0);
                    c1 = _mm256_add_ps(c1, u1);
                    d0 = _mm256_add_ps(d0, v0);
                    d1 = _mm256_add_ps(d1, v1);
                }
            }
            _mm256_storeu_ps(acc + j, _mm256_add_ps(a0, b0));
            _mm256_storeu_ps(acc + j + 8, _mm256_add_ps(a1, b1));
            if constexpr (Signed) {
                _mm256_storeu_ps(signed_acc + j, _mm256_add_ps(c0, d0));
                _mm256_storeu_ps(signed_acc + j + 8, _mm256_add_ps(c1, d1));
            }
        }
        for (size_t k = 0; k < kUnroll; ++k) {
            plain_row<Signed>(x[k] + j, n - j, acc + j, from(signed_acc, j));
        }
    }
    for (; r < n_rows; ++r) {
        size_t j = 0;
        for (; j + 8 <= n; j += 8) {
            const __m256 u = _mm256_loadu_ps(rows[r] + j);
            _mm256_storeu_ps(acc + j, _mm256_fmadd_ps(u, u, _mm256_loadu_ps(acc + j)));
            if constexpr (Signed) {
                _mm256_storeu_ps(signed_acc + j, _mm256_add_ps(u, _mm256_loadu_ps(signed_acc + j)));
            }
        }
        plain_row<Signed>(rows[r] + j, n - j, acc + j, from(signed_acc, j));
    }
}

void run_avx2(const float * const * rows, size_t n_rows, size_t n, float * acc,
              float * signed_acc) {
    (signed_acc != nullptr ? add_avx2<true> : add_avx2<false>) (rows, n_rows, n, acc, signed_acc);
}
#endif

#ifdef IMATRIX_NEON
template <bool Signed>
void add_neon(const float * const * rows, size_t n_rows, size_t n, float * acc,
              float * signed_acc) {
    size_t r = 0;
    for (; r + kUnroll <= n_rows; r += kUnroll) {
        const float * const * x = rows + r;
        size_t                j = 0;
        for (; j + 4 <= n; j += 4) {
            float32x4_t                  a = vld1q_f32(acc + j);
            float32x4_t                  b = vdupq_n_f32(0.0f);
            [[maybe_unused]] float32x4_t c = b;
            [[maybe_unused]] float32x4_t d = b;
            if constexpr (Signed) {
                c = vld1q_f32(signed_acc + j);
            }
            for (size_t k = 0; k < kUnroll; k += 2) {
                const float32x4_t u = vld1q_f32(x[k] + j);
                const float32x4_t v = vld1q_f32(x[k + 1] + j);
                a                   = vfmaq_f32(a, u, u);
                b                   = vfmaq_f32(b, v, v);
                if constexpr (Signed) {
                    c = vaddq_f32(c, u);
                    d = vaddq_f32(d, v);
                }
            }
            vst1q_f32(acc + j, vaddq_f32(a, b));
            if constexpr (Signed) {
                vst1q_f32(signed_acc + j, vaddq_f32(c, d));
            }
        }
        for (size_t k = 0; k < kUnroll; ++k) {
            plain_row<Signed>(x[k] + j, n - j, acc + j, from(signed_acc, j));
        }
    }
    for (; r < n_rows; ++r) {
        size_t j = 0;
        for (; j + 4 <= n; j += 4) {
            const float32x4_t u = vld1q_f32(rows[r] + j);
            vst1q_f32(acc + j, vfmaq_f32(vld1q_f32(acc + j), u, u));
            if constexpr (Signed) {
                vst1q_f32(signed_acc + j, vaddq_f32(vld1q_f32(signed_acc + j), u));
            }
        }
        plain_row<Signed>(rows[r] + j, n - j, acc + j, from(signed_acc, j));
    }
}

void run_neon(const float * const * rows, size_t n_rows, size_t n, float * acc,
              float * signed_acc) {
    (signed_acc != nullptr ? add_neon<true> : add_neon<false>) (rows, n_rows, n, acc, signed_acc);
}
#endif

} // namespace

size_t row_kernels(NamedRowKernel out[4]) {
    size_t count = 0;
#ifdef IMATRIX_X86
    if (__builtin_cpu_supports("avx512f")) {
        out[count++] = {"avx512", run_avx512};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        out[count++] = {"avx2", run_avx2};
    }
#endif
#ifdef IMATRIX_NEON
    out[count++] = {"neon", run_neon};
#endif
    out[count++] = {"plain", run_plain};
    return count;
}

namespace {

struct Choice {
    NamedRowKernel kernel;
    std::string    refusal;
};

Choice choose() {
    NamedRowKernel all[4];
    const size_t   n      = row_kernels(all);
    const char *   wanted = std::getenv("IMATRIX_KERNEL");
    if (wanted == nullptr || *wanted == '\0') {
        return {all[0], ""};
    }
    std::string names;
    for (size_t i = 0; i < n; ++i) {
        if (std::strcmp(all[i].name, wanted) == 0) {
            return {all[i], ""};
        }
        names += (i == 0 ? "" : ", ") + std::string(all[i].name);
    }
    return {all[0], "IMATRIX_KERNEL=" + std::string(wanted) +
                        ": this processor has no such row kernel. It can run " + names};
}

const Choice & choice() {
    static const Choice once = choose();
    return once;
}

} // namespace

const NamedRowKernel & chosen_row_kernel() { return choice().kernel; }

std::string row_kernel_refusal() { return choice().refusal; }

} // namespace imatrix
