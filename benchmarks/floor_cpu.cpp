// The passes over a row that any kernel of this loss makes, each as plain as it can be: what floor_cpu.py compares the kernel with.
// It is compiled with the flags of the kernel. No masked classes, no target, no NaN.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline void store(float* to, float x) { *to = x; }
inline void store(BFloat16* to, float x) { to->bits = static_cast<uint16_t>((as_bits(x) + 0x7fffu + ((as_bits(x) >> 16) & 1u)) >> 16); }

// the polynomial of the kernel; 2^n is added to the exponent
inline float exp_(float x) {
    const float magic = 12582912.0f, shifted = x * 1.44269504f + magic, n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, r2 = r * r;
    const float p = (0.001392692661f * r2 + (0.008363773874f * r + 0.04166655011f)) * r2 + (0.1666657338f * r + 0.5f);
    return as_float(as_bits(p * r2 + r + 1.0f) + (as_bits(shifted) << 23));
}

#define PASS template <class T> __attribute__((noinline, noclone))

PASS float maximum(const T* f, int64_t n) {
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t c = 0; c < n; ++c) max = load(f[c]) > max ? load(f[c]) : max;
    return max;
}

PASS void exponential(const T* f, float max, float* __restrict__ exp_z, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) exp_z[c] = exp_(load(f[c]) - max);
}

PASS float gather(const T* f, float max, float* __restrict__ exp_z, int64_t n) {
    float s = 0, t = 0, a = 0;
#pragma omp simd reduction(+ : s, t, a)
    for (int64_t c = 0; c < n; ++c) {
        const float z = load(f[c]) - max, e = exp_(z);
        exp_z[c] = e;
        s += e;
        t += e * z;
        a += z;
    }
    return s + t + a;
}

PASS void scatter(const T* f, float max, const float* exp_z, float g, float c0, float c1, T* gradient, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) store(gradient + c, exp_z[c] * (g * (load(f[c]) - max) + c0) + c1);
}

enum Pass { COPY, MAXIMUM, EXPONENTIAL, GATHER, SCATTER, ALL };

template <class T>
void run(int64_t pass, const T* logits, T* gradient, float* scratch, float* results, int64_t num_rows, int64_t n, int64_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < num_rows; ++row) {
        const T* f = logits + row * n;
        T* g = gradient + row * n;
        float* exp_z = scratch + row * num_threads / num_rows * n;  // one for each thread
        float max = 10.0f;
        if (pass == COPY) std::memcpy(g, f, n * sizeof(T));
        if (pass == MAXIMUM || pass == ALL) results[row] = max = maximum(f, n);
        if (pass == EXPONENTIAL) exponential(f, max, exp_z, n);
        if (pass == GATHER || pass == ALL) results[row] = gather(f, max, exp_z, n);
        if (pass == SCATTER || pass == ALL) scatter(f, max, exp_z, 0.1f, 0.2f, 0.3f, g, n);
    }
}

}  // namespace

extern "C" void run_pass(int64_t pass, int64_t is_bfloat16, const void* logits, void* gradient, float* scratch, float* results,
                         int64_t num_rows, int64_t n, int64_t num_threads) {
    if (is_bfloat16) run(pass, static_cast<const BFloat16*>(logits), static_cast<BFloat16*>(gradient), scratch, results, num_rows, n, num_threads);
    else run(pass, static_cast<const float*>(logits), static_cast<float*>(gradient), scratch, results, num_rows, n, num_threads);
}

// As the kernel asks for its gradient.
extern "C" void ask_for_huge_pages(void* memory, int64_t bytes) {
    const uintptr_t huge = 2 << 20, from = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
    if (bytes >= 8 << 20) madvise(reinterpret_cast<void*>(from), reinterpret_cast<uintptr_t>(memory) + bytes - from, MADV_HUGEPAGE);
}
