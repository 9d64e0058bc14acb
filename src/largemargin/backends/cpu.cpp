// Rows of logits on the CPU: their statistics, the large-margin loss, and the gradients of both. rowstats.py explains the maths and cpu.py
// calls this file. Symbols: f the logits, y the target, z = f - max over the non-targets, q their softmax.
//
// In both layouts a row takes three steps:
//   gather   the largest and the smallest logit, then e^z, kept for the gradient, and the sums S = sum e^z, T = sum e^z z, A = sum z
//   finish   a handful of numbers a row: the statistics, the loss, and the coefficients of the gradient
//   scatter  one pass: gradient_c = q_c (g_e (z_c - E_q z) + g_q) + g_a (1/K - q_c) - dense w_c off the target, on_target on it
// An element costs one exp. If the statistics are given (`state`), the gradient is a scatter alone. A plain row, without masked classes and
// without e^z = 0, takes loops of its own: they check nothing.
//
// Class probabilities make every class a target. Then y is the class j with the largest logit, and two steps are added: a pass before the
// gather that finds j, and one after it that sums over all other targets (rows/all_classes.py explains the maths).
//
// The file is compiled once per instruction set, with LARGEMARGIN_ISA set to its name, and once without it for the shared code. It must not
// use templates of the standard library: the linker would merge their copies, and a machine could run code of an instruction set it lacks.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The numbers of logits in float64 are double, all others float; the file is compiled for both.
#ifdef LARGEMARGIN_FLOAT64
typedef double real;
typedef uint64_t Bits;
typedef int64_t Integer;
#else
typedef float real;
typedef uint32_t Bits;
typedef int32_t Integer;
#endif

// Mirrored field by field in cpu.py, which checks each offset with largemargin_offset_of.
struct Job {
    // logits and gradient: rows (outer, inner) of num_classes, with the strides of outer, inner and class in elements
    int64_t outer, inner, num_classes;
    int64_t logits_strides[3], gradient_strides[3];
    const void* logits;
    void* gradient;         // null: no gradient; may be the logits themselves; statistics write e^z to it
    const int64_t* target;  // one per row; RECORD and the gradients of statistics also take -2, a class of the row that is not here
    int64_t ignore_index;
    int32_t dtype, num_threads;
    // statistics: each null or one number per row
    real* stats[6];        // log_odds, neg_entropy, mean_log_q, rho, spread, num_nontargets
    real* state;           // (3, rows): max, S, E_q z; written with the statistics, read with their gradients
    const real* grads[5];  // upstream of log_odds, neg_entropy, mean_log_q, rho, spread
    // predictions: one number per row
    int64_t* ahead;              // the number of classes before the target, -1 for an ignored row
    real* prediction_log_odds;  // of the first of the largest logits
    // class probabilities, or null: then the loss is its expectation over them, and there is no target
    int64_t probabilities_strides[3], probabilities_gradient_strides[3];
    const void* probabilities;
    void* probabilities_gradient;  // or null
    int32_t probabilities_dtype;
    // loss
    const real* weight;  // one per class, or null
    real* losses;        // one per row, or null
    const real* row_upstream;
    double upstream;  // of the reduced loss; used if row_upstream is null
    double lam, hard_bias, label_smoothing;
    real* reduced;            // the reduced loss, or null
    int32_t divergence, mean;  // mean: divide by the summed weights of the kept rows
    int32_t kind;              // the result wanted
};

// RECORD is the statistics of some classes of a row; predictions have statistics too; KEPT_GRADIENT finds e^z in the gradient's memory
enum Kind { STATISTICS = 0, STATISTICS_GRADIENT = 1, LOSS = 2, PREDICTIONS = 3, KEPT_GRADIENT = 4, RECORD = 5, NUM_KINDS };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };
enum Divergence { SYMMETRIC = 0, KL_QU = 1, KL_UQ = 2, HARD_MARGIN = 3, HINGE = 4 };  // the last two have no divergence

#ifndef LARGEMARGIN_ISA

EXPORT int64_t largemargin_sizeof_job() { return sizeof(Job); }
EXPORT int64_t largemargin_num_kinds() { return NUM_KINDS; }

// The offset of a field of Job, by its name in cpu.py; -1 for an unknown name.
EXPORT int64_t largemargin_offset_of(const char* name) {
#define FIELD(named, field) if (!std::strcmp(name, #named)) return offsetof(Job, field)
#define SAME(field) FIELD(field, field)
    SAME(outer); SAME(inner); SAME(num_classes); SAME(logits); SAME(gradient); SAME(target); SAME(ignore_index); SAME(dtype);
    FIELD(outer_stride, logits_strides[0]); FIELD(inner_stride, logits_strides[1]); FIELD(class_stride, logits_strides[2]);
    FIELD(gradient_outer_stride, gradient_strides[0]); FIELD(gradient_inner_stride, gradient_strides[1]);
    FIELD(gradient_class_stride, gradient_strides[2]); SAME(num_threads); SAME(state); SAME(weight); SAME(losses); SAME(row_upstream);
    FIELD(probabilities_outer_stride, probabilities_strides[0]); FIELD(probabilities_inner_stride, probabilities_strides[1]);
    FIELD(probabilities_class_stride, probabilities_strides[2]);
    FIELD(probabilities_gradient_outer_stride, probabilities_gradient_strides[0]);
    FIELD(probabilities_gradient_inner_stride, probabilities_gradient_strides[1]);
    FIELD(probabilities_gradient_class_stride, probabilities_gradient_strides[2]);
    SAME(probabilities); SAME(probabilities_gradient); SAME(probabilities_dtype);
    FIELD(log_odds, stats[0]); FIELD(neg_entropy, stats[1]); FIELD(mean_log_q, stats[2]); FIELD(rho, stats[3]); FIELD(spread, stats[4]);
    FIELD(num_nontargets, stats[5]); FIELD(log_odds_grad, grads[0]); FIELD(neg_entropy_grad, grads[1]); FIELD(mean_log_q_grad, grads[2]);
    FIELD(rho_grad, grads[3]); FIELD(spread_grad, grads[4]); SAME(ahead); SAME(prediction_log_odds); SAME(upstream); SAME(lam); SAME(hard_bias); SAME(label_smoothing); SAME(reduced); SAME(divergence);
    SAME(mean); SAME(kind);
    return -1;
}

// The widest instruction set of this machine among those compiled.
EXPORT const char* largemargin_isa() {
#ifdef LARGEMARGIN_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return "avx512";
    // every processor with AVX2 has F16C too, a name that clang before 17 does not know here
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "baseline";
}

#else

namespace {

constexpr int64_t kTileBlock = 128;        // classes of a tile summed in float32 before the sum goes to float64
constexpr int64_t kShort = 256;            // rows up to this many classes are copied as a whole
constexpr int64_t kAlignment = 64;          // bytes: a vector across two cache lines costs two accesses
constexpr int64_t kTile = 1 << 16;          // the most logits of a tile
constexpr int64_t kRows = 128;              // the most rows finished together
constexpr int64_t kLanes = 16;             // loops run over multiples of this many elements, to have no scalar remainder
constexpr int64_t kElementsATask = 16384;   // rows are finished together up to this many elements
constexpr int64_t kElementsAThread = 4096;
constexpr int64_t kHugePages = 8 << 20;    // gradients from this many bytes ask for huge pages
constexpr real kInf = INFINITY, kOne = 1;
constexpr int32_t kIgnored = -1, kElsewhere = -2;  // targets that are not an index, as in rowstats.py

// Hot loops are separate functions: compilers leave some loops scalar if they inline or clone them.
#if defined(__clang__)
#define HOT __attribute__((noinline)) static
#else
#define HOT __attribute__((noinline, noclone)) static
#endif
#define RESTRICT __restrict__

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline int64_t copy_width(int64_t num_classes) { return (padded(num_classes) / kLanes | 1) * kLanes; }  // an odd number of lines

template <class To, class From>
inline To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Vectors of the width of a register. The hottest loops are written with them: compilers would use half of the register for 16-bit numbers,
// and would add up the lanes one after the other. Scalar functions that loops inline are templates, for vectors too.
#if defined(__AVX512F__)
constexpr int64_t kBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif
constexpr int64_t kWidth = kBytes / sizeof(real);
constexpr int64_t kBlock = 64 * kWidth;  // classes of a row summed in the precision of the logits before the sum goes to float64
typedef real Reals __attribute__((vector_size(kBytes)));
typedef Bits Words __attribute__((vector_size(kBytes)));
typedef Integer Mask __attribute__((vector_size(kBytes)));

inline real as_real(Bits bits) { return bits_as<real>(bits); }
inline Reals as_real(Words bits) { return bits_as<Reals>(bits); }
inline Bits as_bits(real x) { return bits_as<Bits>(x); }
inline Words as_bits(Reals x) { return bits_as<Words>(x); }
inline real select(bool which, real a, real b) { return which ? a : b; }
inline Bits select(bool which, Bits a, Bits b) { return which ? a : b; }
inline Reals select(Mask which, Reals a, Reals b) { return which ? a : b; }
inline Words select(Mask which, Words a, Words b) { return which ? a : b; }
inline Reals all(real x) { return x - Reals{}; }
inline real larger(real a, real b) { return a > b ? a : b; }  // NaN gives b
inline real smaller(real a, real b) { return a < b ? a : b; }

// Compilers take too many steps for these; NaN gives b.
#if defined(__AVX512F__) && defined(LARGEMARGIN_FLOAT64)
inline Reals larger(Reals a, Reals b) { return bits_as<Reals>(_mm512_max_pd(bits_as<__m512d>(a), bits_as<__m512d>(b))); }
inline Reals smaller(Reals a, Reals b) { return bits_as<Reals>(_mm512_min_pd(bits_as<__m512d>(a), bits_as<__m512d>(b))); }
#elif defined(__AVX512F__)
inline Reals larger(Reals a, Reals b) { return bits_as<Reals>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b))); }
inline Reals smaller(Reals a, Reals b) { return bits_as<Reals>(_mm512_min_ps(bits_as<__m512>(a), bits_as<__m512>(b))); }
#elif defined(__AVX2__) && defined(LARGEMARGIN_FLOAT64)
inline Reals larger(Reals a, Reals b) { return bits_as<Reals>(_mm256_max_pd(bits_as<__m256d>(a), bits_as<__m256d>(b))); }
inline Reals smaller(Reals a, Reals b) { return bits_as<Reals>(_mm256_min_pd(bits_as<__m256d>(a), bits_as<__m256d>(b))); }
#elif defined(__AVX2__)
inline Reals larger(Reals a, Reals b) { return bits_as<Reals>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b))); }
inline Reals smaller(Reals a, Reals b) { return bits_as<Reals>(_mm256_min_ps(bits_as<__m256>(a), bits_as<__m256>(b))); }
#else
inline Reals larger(Reals a, Reals b) { return select(a > b, a, b); }
inline Reals smaller(Reals a, Reals b) { return select(a < b, a, b); }
#endif

template <class X>
inline X load_as(const void* from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class X>
inline void store_as(void* to, X x) { std::memcpy(to, &x, sizeof x); }
inline Reals load_vector(const real* from) { return load_as<Reals>(from); }
inline void store_vector(real* to, Reals x) { store_as(to, x); }
inline real load(real x) { return x; }
inline void store(real* to, real x) { *to = x; }

// Adds a vector to sums in float64, lane by lane.
inline void add_lanes(double* to, Reals x) {
    typedef double Wide __attribute__((vector_size(kWidth * sizeof(double))));
    Wide sums;
    std::memcpy(&sums, to, sizeof sums);
    sums += __builtin_convertvector(x, Wide);
    std::memcpy(to, &sums, sizeof sums);
}

template <class T>
constexpr bool is_half = false;

#ifndef LARGEMARGIN_FLOAT64
typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));

template <class V>
inline auto rounded_bfloat16(V x) {  // to nearest, ties to even; NaN stays NaN
    const auto bits = as_bits(x);
    return select(x == x, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, bits - bits + 0x7fc0u);
}

// narrowed() takes numbers below 2^16
#if defined(__AVX512F__)
inline Words widened(Shorts x) { return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(x))); }
inline Shorts narrowed(Words x) { return bits_as<Shorts>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x))); }
inline Reals from_half(Shorts x) { return bits_as<Reals>(_mm512_cvtph_ps(bits_as<__m256i>(x))); }
inline Shorts to_half(Reals x) { return bits_as<Shorts>(_mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
inline Words widened(Shorts x) { return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x))); }
inline Shorts narrowed(Words x) {
    const __m256i bits = bits_as<__m256i>(x);
    return bits_as<Shorts>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
inline Reals from_half(Shorts x) { return bits_as<Reals>(_mm256_cvtph_ps(bits_as<__m128i>(x))); }
inline Shorts to_half(Reals x) { return bits_as<Shorts>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Words widened(Shorts x) { return __builtin_convertvector(x, Words); }
inline Shorts narrowed(Words x) { return __builtin_convertvector(x, Shorts); }
inline Reals from_half(Shorts x) {
    const Words bits = widened(x), size = (bits & 0x7fffu) << 13;
    const Mask special = bits_as<Mask>(size) >= 0x0f800000;  // infinity and NaN
    return as_real(as_bits(as_real(size) * 0x1p112f) | (bits_as<Words>(special) & 0x7f800000u) | (bits & 0x8000u) << 16);
}
inline Shorts to_half(Reals x) {  // to nearest, ties to even
    const Words bits = as_bits(x), size = bits & 0x7fffffffu;
    const Words normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13, subnormal = as_bits(as_real(size) + 0.5f) - 0x3f000000u;
    const Mask compared = bits_as<Mask>(size);
    const Words finite = select(compared < 0x38800000, subnormal, normal);
    const Words large = 0x7c00u + (bits_as<Words>(compared > 0x7f800000) & 0x200u);  // infinity or NaN
    return narrowed(select(compared >= 0x47800000, large, finite) | (bits & 0x80000000u) >> 16);
}
#endif

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

template <>
constexpr bool is_half<Half> = true;

inline Reals load_vector(const BFloat16* from) { return as_real(widened(load_as<Shorts>(from)) << 16); }
inline Reals load_vector(const Half* from) { return from_half(load_as<Shorts>(from)); }
inline void store_vector(BFloat16* to, Reals x) { store_as(to, narrowed(rounded_bfloat16(x))); }
inline void store_vector(Half* to, Reals x) { store_as(to, to_half(x)); }
inline real load(BFloat16 x) { return as_real(static_cast<uint32_t>(x.bits) << 16); }
inline real load(Half x) { return from_half(Shorts{x.bits})[0]; }
inline void store(BFloat16* to, real x) { to->bits = static_cast<uint16_t>(rounded_bfloat16(x)); }
inline void store(Half* to, real x) { to->bits = to_half(Reals{x})[0]; }
#endif

// The lanes of a vector put together.
inline real sum(Reals x) {
    typedef real Part __attribute__((vector_size(16)));
    Part parts[kBytes / 16], total = {};
    std::memcpy(parts, &x, sizeof x);
    for (Part part : parts) total += part;
    real two[2] = {total[0], total[1]};
    for (size_t i = 2; i < 16 / sizeof(real); i += 2) two[0] += total[i], two[1] += total[i + 1];
    return two[0] + two[1];
}

template <real (*of_two)(real, real)>
inline real reduced(Reals x) {
    real two[2] = {x[0], x[1]};
    for (int64_t i = 2; i < kWidth; i += 2) two[0] = of_two(x[i], two[0]), two[1] = of_two(x[i + 1], two[1]);
    return of_two(two[0], two[1]);
}

// e^r = 1 + r + r^2 p(r) for |r| <= log(2)/2, and 2 artanh(s) = 2s + s tail(s^2) for s up to that of a number between sqrt(1/2) and sqrt(2)
#ifdef LARGEMARGIN_FLOAT64
constexpr real kLow = -708.39641, kLowest = -746;  // e^x is a normal number from kLow up, and 0 below kLowest
constexpr int kMantissa = 52;
constexpr Bits kBias = 1023, kRootHalf = 0x3fe6a09e667f3bcdu;
constexpr real kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;

template <class V>
inline V exp_polynomial(V r, V) {  // Taylor's, error 4e-18
    constexpr real kFactorials[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2};
    V p = V{} + 1 / 6227020800.0;  // 1 / 13!
    for (real factorial : kFactorials) p = p * r + 1 / factorial;
    return p;
}

template <class V>
inline V artanh_tail(V s2) {
    V tail = {};
    for (int k = 11; k > 0; --k) tail = s2 * (2.0 / (2 * k + 1) + tail);
    return tail;
}
#else
constexpr real kLow = -87.3365f, kLowest = -104;
constexpr int kMantissa = 23;
constexpr Bits kBias = 127, kRootHalf = 0x3f3504f3u;
constexpr real kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;

template <class V>
inline V exp_polynomial(V r, V r2) {  // Chebyshev's fit, error 8e-9
    return (0.001392692661f * r2 + (0.008363773874f * r + 0.04166655011f)) * r2 + (0.1666657338f * r + 0.5f);
}

template <class V>
inline V artanh_tail(V s2) {
    return s2 * (0.666666667f + s2 * (0.4f + s2 * (0.285714286f + s2 * 0.222222222f)));
}
#endif

template <class V>
inline V at_least(real low, V x) {  // NaN stays NaN
    return larger(low - V{}, x);
}

// y, with e^x = 2^n y down to kLowest; n is in the low bits of `n_bits`. y is right to 0.75 units in the last place.
template <class V, class B>
inline V reduced_exp(V x, B& n_bits) {
    const real magic = static_cast<real>(Bits{3} << (kMantissa - 1));  // adding it leaves the nearest integer in the low bits
    const V shifted = x * static_cast<real>(1.4426950408889634) + magic, n = shifted - magic;
    const V r = (x - n * kLog2High) - n * kLog2Low, r2 = r * r;
    n_bits = as_bits(shifted);
    return exp_polynomial(r, r2) * r2 + r + static_cast<real>(1);
}

// e^x for kLow <= x <= 0; NaN gives any number.
template <class V>
inline V plain_exp(V x) {
    decltype(as_bits(x)) n;
    const V y = reduced_exp(x, n);
    return as_real(as_bits(y) + (n << kMantissa));
}

// e^x for x <= 0. It is 0 below kLow unless the caller wants subnormal numbers; NaN stays NaN.
template <bool subnormal = false, class V>
inline V exp_(V x) {
    decltype(as_bits(x)) n;
    V y = reduced_exp(subnormal ? at_least(kLowest, x) : x, n);
    if (!subnormal) return select(x < kLow, V{}, y * as_real((n << kMantissa) + (kBias << kMantissa)));
    // 2^n in two factors: one alone is not a normal number
    y = y * as_real((n << kMantissa) + ((kBias + 64) << kMantissa)) * as_real((kBias - 64) << kMantissa);
    return select(x < kLowest, V{}, y);
}

inline real as_number(Integer n) { return static_cast<real>(n); }
inline Reals as_number(Mask n) { return __builtin_convertvector(n, Reals); }
inline Integer as_integer(Bits bits) { return static_cast<Integer>(bits); }
inline Mask as_integer(Words bits) { return bits_as<Mask>(bits); }

// log x for normal x > 0; NaN and +inf give NaN. log m = 2 artanh((m - 1) / (m + 1)), sqrt(1/2) <= m < sqrt(2).
template <class V>
inline V log_(V x) {
    const auto bits = as_bits(x) - kRootHalf;
    const V n = as_number(as_integer(bits) >> kMantissa);
    const V m = as_real((bits & ((Bits{1} << kMantissa) - 1)) + kRootHalf);
    const V s = (m - kOne) / (m + kOne);
    return n * kLog2High + (2 * s + (s * artanh_tail(s * s) + n * kLog2Low)) + (x - x);
}

// log(1 + x) for x >= 0
inline real log1p_(real x) {
    real u = 1.0f + x;
    return log_(u) + (x - (u - 1.0f)) / u;
}

// softplus(x) = log(1 + e^x) and its derivative
template <class V>
struct SoftplusOf {
    V value, slope;
};
typedef SoftplusOf<real> Softplus;

inline Softplus softplus(real x) {
    real t = exp_<true>(x > 0 ? -x : x);
    return {(x > 0 ? x : 0.0f) + log1p_(t), (x > 0 ? 1.0f : t) / (1.0f + t)};
}

// softplus(b - l) and its derivative at d = z - b, where l = z - log S and S >= 1: one logarithm for both of them.
template <class V>
inline SoftplusOf<V> hard_term(V d, V S) {
    const V t = exp_<true>(select(d > V{}, -d, d)), pull = select(d > V{}, S * t, S), other = select(d > V{}, kOne - V{}, t);
    const V u = pull + other, rounded = select(d > V{}, pull - (u - kOne), V{});
    return {select(d > V{}, V{}, -d) + (log_(u) + rounded / u), pull / u};
}

// z clamped for products with e^z, which is 0 below the clamp, because 0 * inf is NaN.
template <class V>
inline V near(V z) {
    return at_least(kLow, z);
}

// Rows finished together: the results of gather and the inputs of scatter. Each quantity has its own array, so loops over rows vectorise.
struct Rows {
    int64_t offset[kRows], gradient_offset[kRows], probabilities_offset[kRows], probabilities_gradient_offset[kRows];  // in elements
    Integer y[kRows];     // kIgnored beyond the last row too
    real target_logit[kRows], target_weight[kRows], upstream[kRows];
    real class_weight[kRows];  // of y: its target_weight, unless the target is probabilities
    real margin_term[kRows];   // the loss before target_weight and smoothing
    real max[kRows];
    double sum_exp[kRows], sum_exp_z[kRows], sum_z[kRows], count[kRows], sum_weight[kRows], sum_weight_z[kRows];
    real inv_sum_exp[kRows], mean_z[kRows], inv_count[kRows];
    real g_e[kRows], g_q[kRows], g_a[kRows], dense[kRows], on_target[kRows], at_max[kRows];
    Integer rival[kRows];  // the first class with the largest logit but for y, or -1; for losses of the hard margin alone
    Integer live[kRows];  // if 0, the gradient is 0 except for on_target
    real losses[kRows];
    Integer plain[kRows];  // no class is masked, and e^z > 0 for all
    int64_t size, first;   // the rows [first, first + size)
};

// The statistics of a row from its record, as finish() in rowstats.py.
struct Stats {
    real log_odds, mean_q_z, mean_u_z, rho, inv_sum_exp, inv_count;
};

inline Stats statistics(const Rows& rows, int64_t p) {
    const bool alone = rows.count[p] == 0;
    const double sum_exp = alone ? 1.0 : rows.sum_exp[p], inv_sum_exp = 1.0 / sum_exp, inv_count = 1.0 / (alone ? 1.0 : rows.count[p]);
    const real f_y = rows.target_logit[p], rho = log_(static_cast<real>(sum_exp));
    real l = (f_y - rows.max[p]) - rho;
    l = alone ? (f_y - f_y) + kInf : l;  // certain, unless the target is itself -inf, +inf or NaN
    l = f_y == kInf ? NAN : l;
    return {l,
            static_cast<real>(rows.sum_exp_z[p] * inv_sum_exp),
            static_cast<real>(rows.sum_z[p] * inv_count),
            rho,
            static_cast<real>(inv_sum_exp),
            static_cast<real>(inv_count)};
}

// One element of the gradient, off the target. In a plain row no class is masked and no z below kLow.
template <bool plain = false, class V, class C>
inline V element(V f, V q, V z, C mean_z, C g_e, C g_q, C g_a, C inv_count, C dense) {
    const V sparse = q * (g_e * ((plain ? z : near(z)) - mean_z) + g_q);
    // g_a is not added to g_q first: with one non-target class its term is exactly 0
    const V value = sparse + (g_a * (inv_count - q) - dense);
    return plain ? value : select(f == -kInf, V{}, value);
}

// What the loss of a target that is not the largest logit is made of, beside a hard bias; each has all before it. Its softmax loss is
// log sum e^f - f_y, which needs no logarithm of its own.
enum Terms { SOFTMAX_LOSS, DIVERGENCE, LOGARITHM };

struct Options {
    real lam, lam_e, lam_a, lam_log_count;  // lam * divergence = lam_e e + lam_a a + lam_log_count log K
    real hard_bias, keep, smoothing;        // keep = 1 - smoothing
    bool weighted_smoothing, has_rivals, is_hinge;
    Terms terms;
};

inline real times(real factor, real x) { return factor != 0 ? factor * x : 0.0f; }  // avoids 0 * inf

// The statistics of a few rows.
void finish_statistics(const Job& job, const Rows& rows) {
    const int64_t num_rows = job.outer * job.inner;
    for (int64_t p = 0; p < rows.size; ++p) {
        const int64_t row = rows.first + p;
        const bool kept = rows.y[p] != kIgnored;
        const Stats s = statistics(rows, p);
        const real fields[6] = {s.log_odds,
                                 s.mean_q_z - s.rho,
                                 s.mean_u_z - s.rho,
                                 s.rho,
                                 s.mean_q_z - s.mean_u_z,
                                 static_cast<real>(rows.count[p])};
        for (int64_t i = 0; i < 6; ++i) job.stats[i][row] = kept ? fields[i] : 0.0f;
        if (!job.state) continue;
        job.state[row] = rows.max[p];
        job.state[num_rows + row] = static_cast<real>(rows.sum_exp[p]);
        job.state[2 * num_rows + row] = s.mean_q_z;
    }
}

// The losses of a few rows and the coefficients of their gradients.
HOT void finish_losses(const Options& options, Rows& rows) {
    const real hard_bias = options.hard_bias, keep = options.keep, smoothing = options.smoothing;
    const real lam = options.lam, lam_e = options.lam_e, lam_a = options.lam_a, lam_log_count = options.lam_log_count;
    const int64_t lanes = padded(rows.size);
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
        const bool kept = rows.y[p] >= 0, alone = rows.count[p] == 0;
        const Stats stats = statistics(rows, p);
        const real l = stats.log_odds, rho = stats.rho, count = static_cast<real>(rows.count[p]);
        const real w_y = rows.target_weight[p], s = rows.upstream[p];
        const Softplus hard = softplus(hard_bias - l);
        // a smoothing of 1 drops the first term, but a masked target stays infinite
        const real kept_share = keep > 0 ? keep : (hard.value < kInf ? 0.0f : 1.0f);
        real loss = kept_share > 0 ? kept_share * hard.value : 0.0f;
        // lam_e e + lam_a a + lam_log_count log K; if e and a both count, their common log S is left out
        const real e_term = lam_e != 0 ? lam_e * (stats.mean_q_z - rho) : 0.0f, a_term = lam_a != 0 ? lam_a * (stats.mean_u_z - rho) : 0.0f;
        const real mean_z = lam_a == -lam_e ? lam_e * (stats.mean_q_z - stats.mean_u_z) : e_term + a_term;
        const real log_count = log_(alone ? 1.0f : count);
        loss = lam > 0 ? loss + (mean_z + lam_log_count * log_count) : loss;
        rows.margin_term[p] = loss;
        loss *= w_y;
        const real g_l = -s * w_y * kept_share * hard.slope;
        real g_q = -g_l, on_target = g_l, dense = 0.0f;
        if (smoothing > 0) {
            const Softplus off = softplus(l), on = softplus(-l);
            const bool masked = rows.target_logit[p] == -kInf;  // then y is not a class of the row
            const real w_n = static_cast<real>(rows.sum_weight[p]), w_z = static_cast<real>(rows.sum_weight_z[p]);
            const real w_t = masked ? 0.0f : rows.class_weight[p];
            const real each = smoothing / (count + (masked ? 0.0f : 1.0f));
            const real off_target = alone ? 0.0f : w_n * (off.value + rho) - w_z;
            loss += each * (off_target + (masked ? 0.0f : w_t * on.value));
            g_q += s * each * (w_n + w_t) * on.slope;
            on_target += s * each * (w_n * off.slope - w_t * on.slope);
            dense = s * each;
        }
        on_target = alone ? (l == l ? 0.0f : l) : on_target;
        rows.losses[p] = kept ? loss : 0.0f;
        rows.inv_sum_exp[p] = stats.inv_sum_exp;
        rows.mean_z[p] = stats.mean_q_z;
        rows.inv_count[p] = stats.inv_count;
        rows.g_e[p] = times(lam_e, s * w_y);
        rows.g_a[p] = times(lam_a, s * w_y);
        rows.g_q[p] = g_q;
        rows.dense[p] = dense;
        rows.on_target[p] = kept ? on_target : 0.0f;
        rows.at_max[p] = 0.0f;
        rows.live[p] = kept && !alone ? 1 : 0;
    }
}

// The losses of the lead of the target over its rival, and the gradient of the two.
void finish_rivals(const Options& options, Rows& rows) {
    for (int64_t p = 0; p < rows.size; ++p) {
        const real missing = options.hard_bias - (rows.target_logit[p] - rows.max[p]), w_y = rows.target_weight[p];
        const Softplus hinge = {missing <= 0 ? 0.0f : missing, missing > 0 ? 1.0f : missing <= 0 ? 0.0f : missing};
        const Softplus term = options.is_hinge ? hinge : softplus(missing);
        const bool kept = rows.y[p] >= 0;
        rows.losses[p] = kept ? w_y * term.value : 0.0f;
        rows.on_target[p] = kept ? -rows.upstream[p] * w_y * term.slope : 0.0f;
    }
}

// The targets of a row but its largest logit f_j. In the symbols of rows/all_classes.py, with u the share of a target, which is its
// probability times its weight: z = f - f_j, x = e^z, s = sum x, S = 1 + s - x, tau = (sum x z - x z) / S.
struct Others {
    // what their terms need: f_j, e^(max - f_j), s, sum x z, sum z, log(1 + s), the number of non-targets of j
    real top[kRows], scale[kRows], sum_x[kRows], sum_xz[kRows], sum_z[kRows], log_sum[kRows], count[kRows];
    // sums over the targets: of u, u z, u (sum z - z), u/S, u tau, u tau/S and u log S; the third is exactly 0 if j is the only non-target
    double share[kRows], share_z[kRows], share_rest[kRows], share_over_S[kRows], share_tau[kRows], share_tau_over_S[kRows], share_log_S[kRows];
    double share_hard[kRows], share_pull[kRows];  // with a hard bias b: of u softplus(b - l) and of u softplus'(b - l) / S
    double masked[kRows], lost[kRows];            // the shares of masked targets, and their loss, which is infinite
    // coefficients of the gradient: the sums over all targets, and what a class takes out as its own target
    real e_sum[kRows], m_sum[kRows], on_each[kRows], own_lam_e[kRows], own_lam_a[kRows], own_on_each[kRows], pull[kRows], masked_pull[kRows];
    real unknown[kRows];  // NaN in a row with NaN or without a class, which has no finite gradient; else 0

    static constexpr int64_t kSums = 9;
    double* sums(int64_t i) {
        double* const found[kSums] = {share, share_z, share_rest, share_over_S, share_tau, share_tau_over_S, share_log_S, share_hard, share_pull};
        return found[i];
    }
};

HOT void peel(const Rows& rows, Others& others) {
    const int64_t lanes = padded(rows.size);
    std::memset(&others, 0, sizeof others);
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
        const bool alone = rows.count[p] == 0;
        const real lead = alone ? 0.0f : rows.max[p] - rows.target_logit[p];
        others.top[p] = rows.target_logit[p];
        others.scale[p] = alone ? 0.0f : exp_(lead);
        others.sum_x[p] = static_cast<real>(others.scale[p] * rows.sum_exp[p]);
        others.sum_xz[p] = static_cast<real>(others.scale[p] * (rows.sum_exp_z[p] + near(lead) * rows.sum_exp[p]));
        others.sum_z[p] = static_cast<real>(rows.sum_z[p] + rows.count[p] * lead);
        others.log_sum[p] = log1p_(others.sum_x[p]);
        others.count[p] = static_cast<real>(rows.count[p]);
    }
}

// Adds the other targets to the losses of the largest logits and to the coefficients of their gradients.
HOT void finish_others(const Options& options, Rows& rows, Others& others) {
    const bool hard_bias = options.hard_bias != 0;
    const double keep = options.keep, lam = options.lam, lam_e = options.lam_e, lam_a = options.lam_a;
    const int64_t lanes = padded(rows.size);
    for (int64_t p = 0; p < lanes && options.lam_log_count != 0; ++p) {
        const double masked = others.masked[p], present = others.share[p] - masked, count = rows.count[p];
        rows.losses[p] += static_cast<real>(options.lam_log_count * (present * std::log(count > 0 ? count : 1.0) + masked * std::log(count + 1.0)));
    }
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
        const double masked = others.masked[p], present = others.share[p] - masked, sum = 1.0 + others.sum_x[p];
        const double count = rows.count[p] > 0 ? rows.count[p] : 1.0, whole = rows.count[p] + 1.0;
        const double hard = hard_bias ? others.share_hard[p] : others.log_sum[p] * present - others.share_z[p];
        const double pull = keep * (hard_bias ? others.share_pull[p] : others.share[p] / sum) + (keep > 0 ? 0 : masked / sum);
        // a masked target has one non-target more
        const double rest = others.share_rest[p] / count + (masked != 0 ? others.sum_z[p] * masked / whole : 0);
        const double divergence = lam_e * others.share_tau[p] - (lam_e + lam_a) * others.share_log_S[p] + (lam_a != 0 ? lam_a * rest : 0);
        const double loss = keep * hard + others.lost[p] + (lam > 0 ? divergence : 0);
        rows.losses[p] = static_cast<real>(rows.losses[p] + loss);

        const real s = rows.upstream[p];
        const double of_tau = lam_e * others.share_tau_over_S[p] + lam_a * others.share_over_S[p];
        others.e_sum[p] = times(options.lam_e, s) * static_cast<real>(others.share_over_S[p]);
        others.m_sum[p] = lam > 0 ? static_cast<real>(s * of_tau) : 0.0f;
        others.on_each[p] = times(options.lam_a, s) * static_cast<real>(present / count + masked / whole);
        others.own_lam_e[p] = times(options.lam_e, s);
        others.own_lam_a[p] = times(options.lam_a, s);
        others.own_on_each[p] = times(options.lam_a, s) / static_cast<real>(count);
        others.pull[p] = options.keep * s;
        others.unknown[p] = rows.margin_term[p] == rows.margin_term[p] ? 0.0f : NAN;
        others.masked_pull[p] = (options.keep > 0 ? options.keep * s : s) + others.unknown[p];
        rows.g_q[p] += static_cast<real>(s * pull * others.sum_x[p]);
        // of the other targets' gradient, at x = 1 and z = 0; j has no own term to take out
        rows.on_target[p] = static_cast<real>(rows.on_target[p] + s * pull + (static_cast<double>(others.on_each[p]) - others.m_sum[p]));
    }
}

double finish(const Job& job, const Options& options, double upstream, Rows& rows, Others* others = nullptr) {
    if (job.kind != LOSS) {
        finish_statistics(job, rows);
        return 0;
    }
    for (int64_t p = 0; p < rows.size; ++p) rows.upstream[p] = job.row_upstream ? job.row_upstream[rows.first + p] : static_cast<real>(upstream);
    if (options.has_rivals) finish_rivals(options, rows);
    else finish_losses(options, rows);
    if (others) finish_others(options, rows, *others);
    double sum = 0;
    for (int64_t p = 0; p < rows.size; ++p) sum += rows.losses[p];
    if (job.losses) std::memcpy(job.losses + rows.first, rows.losses, static_cast<size_t>(rows.size) * sizeof(real));
    return sum;
}

// The gradient at c* with a gradient of rho: its terms q g_rho and -g_rho nearly cancel if q is close to 1.
inline real at_first_max(const Rows& rows, int64_t p) {
    const real q = rows.inv_sum_exp[p];
    return element(rows.max[p], q, real{}, rows.mean_z[p], rows.g_e[p], -rows.on_target[p], rows.g_a[p], rows.inv_count[p], real{}) +
           rows.at_max[p] * (q - 1.0f);
}

// The coefficients of the gradient from the saved state and the upstream gradients of the statistics.
void resume(const Job& job, Rows& rows) {
    const int64_t stride = job.outer * job.inner;
    for (int64_t p = 0; p < rows.size; ++p) {
        const int64_t row = rows.first + p;
        const real count = job.stats[5][row];
        real g[5];
        for (int64_t i = 0; i < 5; ++i) g[i] = job.grads[i] ? job.grads[i][row] : 0.0f;
        rows.max[p] = job.state[row];
        rows.inv_sum_exp[p] = 1.0f / job.state[stride + row];
        rows.mean_z[p] = job.state[2 * stride + row];
        rows.inv_count[p] = 1.0f / (count > 0 ? count : 1.0f);
        rows.g_e[p] = g[1] + g[4];  // spread = e - a
        rows.g_q[p] = g[3] - g[0];
        rows.g_a[p] = g[2] - g[4];
        rows.dense[p] = 0.0f;
        rows.at_max[p] = g[3];
        rows.plain[p] = 0;
        rows.live[p] = rows.y[p] != kIgnored && count > 0;
        rows.on_target[p] = rows.y[p] != kIgnored ? g[0] * (count > 0 ? 1.0f : 0.0f) : 0.0f;  // NaN stays NaN
    }
}

struct Scratch {
    real* exp_z;         // e^z of the current rows
    real* edges;         // of the current rows
    real* block;         // the logits of a tile, or with probabilities of one block, or of the rows together
    const real* weight;  // of the classes, padded
    // for probabilities
    real* shares;   // as the block
    real* values;   // of the gradient of a block
    real* copies;   // of rows whose classes are not neighbours: logits, then probabilities
    Others* others;  // of the current rows
};

// ---- rows whose classes are neighbours in memory

// The largest and the smallest of some logits, lane by lane, without NaN.
struct Range {
    Reals max, min;
};

template <class T>
HOT void widen(const T* f, int64_t n, Range& range) {
    Reals max = range.max, min = range.min;
    for (int64_t c = 0; c < n; c += kWidth) {
        const Reals x = load_vector(f + c);
        max = larger(x, max);
        min = smaller(x, min);
    }
    range = {max, min};
}

// Sums over some non-target classes, with z = f - shift.
struct Sums {
    double exp_z, exp_z_z, z;
};

template <bool plain, class T>
HOT void gather_classes(const T* RESTRICT f, real shift, int64_t n, real* RESTRICT exp_z, bool keep_exp, Sums& sums) {
    for (int64_t left = n; left > 0; left -= kBlock, f += kBlock, exp_z += keep_exp ? kBlock : 0) {
        const int64_t size = left < kBlock ? left : kBlock;
        Reals s = {}, t = {}, a = {};
        for (int64_t c = 0; c < size; c += kWidth) {
            const Reals x = load_vector(f + c), z = x - shift, e = plain ? plain_exp(z) : exp_(z);
            store_vector(exp_z + c, e);
            s += e;
            t += e * (plain ? z : near(z));
            a += plain ? z : select(x == -kInf, Reals{}, z);
        }
        sums.exp_z += sum(s);
        sums.exp_z_z += sum(t);
        sums.z += sum(a);
    }
}

// The number of classes of a row beside its target, and their summed weights.
template <class T>
HOT void count_classes(const T* f, const real* w, int64_t num_classes, int64_t y, real shift, double& count, double& sum_weight,
                       double& sum_weight_z) {
    double k = 0, b = 0, bz = 0;
#pragma omp simd reduction(+ : k, b, bz)
    for (int64_t c = 0; c < num_classes; ++c) {
        const real x = load(f[c]);
        const bool present = x != -kInf && c != y;
        const double weight = present ? (w ? w[c] : 1.0f) : 0.0f;
        k += present ? 1.0 : 0.0;
        b += weight;
        bz += weight * (present ? x - shift : 0.0f);
    }
    count = k, sum_weight = b, sum_weight_z = bz;
}

template <class T, class U>
void copy_row(const T* from, int64_t n, U* to) {
    const int64_t whole = n / kWidth * kWidth;
    for (int64_t c = 0; c < whole; c += kWidth) store_vector(to + c, load_vector(from + c));
    for (int64_t c = whole; c < n; ++c) store(to + c, load(from[c]));
}

// The n logits of a block, the target masked, padded with absent classes.
template <class T>
HOT void load_block(const T* RESTRICT from, int64_t n, int64_t target, real* RESTRICT to) {
    copy_row(from, n, to);
    for (int64_t c = n; c < padded(n); ++c) to[c] = -kInf;
    if (target >= 0 && target < n) to[target] = -kInf;
}

enum Way { PLAIN, MASKED, WEIGHTED, AGAIN };  // rows: plain; any; any, with smoothed weights; any, without e^z

template <Way way, class T>
HOT void scatter_classes(const Rows& rows, int64_t p, const T* f, const real* exp_z, const real* w, int64_t n, T* gradient) {
    const real max = rows.max[p], mean_z = rows.mean_z[p], inv_count = rows.inv_count[p], scale = rows.inv_sum_exp[p];
    const real g_e = rows.g_e[p], g_q = rows.g_q[p], g_a = rows.g_a[p], dense = rows.dense[p];
    for (int64_t c = 0; c < n; c += kWidth) {  // f and gradient may be the same memory: the loop reads an element before it writes it
        const Reals x = load_vector(f + c), z = x - max, q = (way == AGAIN ? exp_(z) : load_vector(exp_z + c)) * scale;
        const Reals each = way == WEIGHTED ? dense * load_vector(w + c) : all(dense);
        store_vector(gradient + c, element<way == PLAIN>(x, q, z, all(mean_z), all(g_e), all(g_q), all(g_a), all(inv_count), each));
    }
}

template <class T>
void scatter_row(const Rows& rows, int64_t p, const T* f, const real* w, int64_t num_classes, const real* exp_z, T* gradient) {
    const int64_t y = rows.y[p], whole = num_classes / kLanes * kLanes, rest = num_classes - whole;
    if (!rows.live[p]) {
        for (int64_t c = 0; c < num_classes; ++c) store(gradient + c, 0.0f);
        if (y >= 0) store(gradient + y, rows.on_target[p]);
        return;
    }
    const auto scatter = !exp_z          ? scatter_classes<AGAIN, T>
                         : w             ? scatter_classes<WEIGHTED, T>
                         : rows.plain[p] ? scatter_classes<PLAIN, T>
                                         : scatter_classes<MASKED, T>;
    scatter(rows, p, f, exp_z, w, whole, gradient);
    if (rest > 0) {
        T some[kLanes] = {}, values[kLanes];
        std::memcpy(some, f + whole, static_cast<size_t>(rest) * sizeof(T));
        real exp_some[kLanes] = {};  // e^z in the gradient's memory ends with the row
        const bool kept = static_cast<const void*>(exp_z) == gradient;
        if (kept) std::memcpy(exp_some, exp_z + whole, static_cast<size_t>(rest) * sizeof(real));
        scatter(rows, p, some, kept ? exp_some : exp_z ? exp_z + whole : nullptr, w ? w + whole : nullptr, kLanes, values);
        std::memcpy(gradient + whole, values, static_cast<size_t>(rest) * sizeof(T));
    }
    if (rows.at_max[p] != 0.0f) {  // the first class with the maximum gets the gradient of rho
        for (int64_t c = 0; c < num_classes; ++c) {
            if (c == y || load(f[c]) != rows.max[p]) continue;
            store(gradient + c, at_first_max(rows, p));
            break;
        }
    }
    if (y >= 0) store(gradient + y, rows.on_target[p]);
}

// The edges of a row: the classes beside the target, those after the last whole vector, and all classes of a short row. They are copied, so
// that the loops over all others meet no target and no end.
struct Edges {
    int64_t begin, end, whole, rest;  // the classes [begin, end), and the rest after the whole vectors

    Edges(int64_t num_classes, int64_t y) : begin(0), end(num_classes / kLanes * kLanes), whole(end), rest(num_classes - whole) {
        if (num_classes <= kShort) return;
        begin = y >= 0 && y < whole ? y / kLanes * kLanes : whole;
        end = begin < whole ? begin + kLanes : whole;
    }
    static int64_t stride(int64_t num_classes) { return num_classes <= kShort ? padded(num_classes) : 2 * kLanes; }
    int64_t size() const { return end - begin; }
    int64_t padded_size() const { return size() + (rest > 0 ? kLanes : 0); }
};

template <class T>
inline void load_edges(const T* f, const Edges& edges, int64_t y, real* to) {
    const int64_t size = edges.size();
    for (int64_t c = 0; c < size; c += kWidth) store_vector(to + c, load_vector(f + edges.begin + c));
    for (int64_t c = 0; edges.rest > 0 && c < kLanes; ++c) to[size + c] = c < edges.rest ? load(f[edges.whole + c]) : -kInf;
    if (y >= 0) to[y < edges.end ? y - edges.begin : size + (y - edges.whole)] = -kInf;
}

// The sums of a row about its target, and e^z.
template <class T>
void gather_row(const T* f, int64_t num_classes, const real* w, bool keep_exp, const real* edge, real* exp_z, Rows& rows, int64_t p) {
    const int64_t y = rows.y[p], has_target = y >= 0;
    const Edges edges(num_classes, y);
    const int64_t begin = edges.begin, end = edges.end, whole = edges.whole, size = edges.padded_size();
    Range range = {all(-kInf), all(kInf)};
    Reals present = {};
    for (int64_t c = 0; c < size; c += kWidth) {
        const Reals x = load_vector(edge + c);
        range.max = larger(x, range.max);
        range.min = smaller(select(x == -kInf, all(kInf), x), range.min);
        present += select(x == -kInf, Reals{}, all(1.0f));
    }
    if (begin > 0) widen(f, begin, range);
    if (whole > end) widen(f + end, whole - end, range);
    const real max = reduced<larger>(range.max), shift = max == -kInf ? 0.0f : max;
    const int64_t num_present = static_cast<int64_t>(sum(present));
    const bool plain = num_present == edges.size() + edges.rest - has_target && reduced<smaller>(range.min) - max >= kLow;
    alignas(kAlignment) real exp_edges[2 * kLanes];
    const bool apart = num_classes > kShort;
    Sums sums = {0, 0, 0};
    gather_classes<false>(edge, shift, size, apart ? exp_edges : exp_z, false, sums);
    const auto gather = plain ? gather_classes<true, T> : gather_classes<false, T>;
    if (begin > 0) gather(f, shift, begin, exp_z, keep_exp, sums);
    if (whole > end) gather(f + end, shift, whole - end, exp_z + (keep_exp ? end : 0), keep_exp, sums);
    if (keep_exp && apart) {
        std::memcpy(exp_z + begin, exp_edges, static_cast<size_t>(edges.size()) * sizeof(real));
        std::memcpy(exp_z + whole, exp_edges + edges.size(), static_cast<size_t>(size - edges.size()) * sizeof(real));
    }
    rows.max[p] = max;
    rows.plain[p] = plain;
    rows.sum_exp[p] = sums.z == sums.z ? sums.exp_z : sums.z;  // NaN stays NaN
    rows.sum_exp_z[p] = sums.exp_z_z;
    rows.sum_z[p] = rows.sum_weight_z[p] = sums.z;
    rows.count[p] = rows.sum_weight[p] = static_cast<double>(num_classes - has_target);
    if (w || !plain) count_classes(f, w, num_classes, y, shift, rows.count[p], rows.sum_weight[p], rows.sum_weight_z[p]);
}

// The same for the current rows.
template <class T>
void gather_rows(const T* logits, int64_t num_classes, const real* w, bool keep_exp, Rows& rows, Scratch& scratch) {
    const int64_t lanes = padded(num_classes), edge_size = Edges::stride(num_classes);
    for (int64_t p = 0; p < rows.size; ++p) {  // a separate loop: what was stored in parts can be loaded as a whole only after a while
        const T* f = logits + rows.offset[p];
        load_edges(f, Edges(num_classes, rows.y[p]), rows.y[p], scratch.edges + p * edge_size);
        if (rows.y[p] >= 0) rows.target_logit[p] = load(f[rows.y[p]]);
    }
    for (int64_t p = 0; p < rows.size; ++p) {
        if (rows.y[p] == kIgnored) continue;
        real* exp_z = scratch.exp_z + (keep_exp ? p * lanes : 0);
        gather_row(logits + rows.offset[p], num_classes, w, keep_exp, scratch.edges + p * edge_size, exp_z, rows, p);
    }
}

// The first of the largest elements; 0 if there is none.
template <class T>
HOT int64_t first_max(const T* f, int64_t n) {
    constexpr int64_t kChunk = 128;
    real largest = -kInf;
    int64_t first = 0;
    for (int64_t from = 0; from < n; from += kChunk) {
        const int64_t size = n - from < kChunk ? n - from : kChunk;
        real max = -kInf;
#pragma omp simd reduction(max : max)
        for (int64_t c = 0; c < size; ++c) max = load(f[from + c]) > max ? load(f[from + c]) : max;
        if (max > largest) largest = max, first = from;
    }
    const int64_t size = n - first < kChunk ? n - first : kChunk;
    int32_t at = kChunk;
#pragma omp simd reduction(min : at)
    for (int32_t c = 0; c < static_cast<int32_t>(size); ++c) at = load(f[first + c]) == largest && c < at ? c : at;
    return at < kChunk ? first + at : 0;
}

// The number of classes that come before y: those with a larger logit, and of equal logits the first. A masked class comes after any number.
template <class T>
HOT int64_t num_ahead(const T* f, int64_t num_classes, int64_t y) {
    const real of_y = load(f[y]);
    int32_t before = 0, after = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t c = 0; c < y; ++c) before += load(f[c]) >= of_y;
#pragma omp simd reduction(+ : after)
    for (int64_t c = y + 1; c < num_classes; ++c) after += load(f[c]) > of_y;
    return of_y == -kInf ? INT64_MAX : before + after;
}

// The log-odds of the predictions of the current rows, and the number of classes before their targets.
template <class T>
void predict(const Job& job, const T* logits, Rows& rows, Scratch& scratch) {
    Integer y[kRows];
    for (int64_t p = 0; p < rows.size; ++p) {
        const T* f = logits + rows.offset[p];
        y[p] = rows.y[p];
        job.ahead[rows.first + p] = y[p] >= 0 ? num_ahead(f, job.num_classes, y[p]) : -1;
        if (y[p] >= 0) rows.y[p] = static_cast<Integer>(first_max(f, job.num_classes));
    }
    gather_rows(logits, job.num_classes, nullptr, false, rows, scratch);
    for (int64_t p = 0; p < rows.size; ++p) {
        job.prediction_log_odds[rows.first + p] = y[p] >= 0 ? statistics(rows, p).log_odds : 0.0f;
        rows.y[p] = y[p];
    }
}

// NaN if the row holds NaN or +inf, else 0.
template <class T>
HOT real unknown(const T* f, int64_t num_classes) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < num_classes; ++c) sum += load(f[c]) == -kInf ? 0.0f : load(f[c]) - load(f[c]);
    return sum;
}

// The largest logit of each row but for its target, and the first class that has it.
template <class T>
void find_rivals(const T* logits, int64_t num_classes, Rows& rows) {
    for (int64_t p = 0; p < rows.size; ++p) {
        const T* f = logits + rows.offset[p];
        const int64_t y = rows.y[p], after = y + 1, num_after = num_classes - after;
        rows.rival[p] = -1;
        if (y < 0) continue;
        rows.target_logit[p] = load(f[y]);
        rows.max[p] = -kInf + unknown(f, num_classes);
        if (num_classes == 1) continue;
        int64_t rival = first_max(f, y);
        const int64_t later = num_after > 0 ? after + first_max(f + after, num_after) : rival;
        if (y == 0 || load(f[later]) > load(f[rival])) rival = later;
        if (rows.max[p] == -kInf) rows.max[p] = load(f[rival]);
        rows.rival[p] = load(f[rival]) == -kInf ? -1 : static_cast<Integer>(rival);
    }
}

template <class T>
double run_rows(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch, const T* logits, T* gradient) {
    const int64_t num_classes = job.num_classes;
    const real* w = options.weighted_smoothing ? scratch.weight : nullptr;
    const bool gather = job.kind != STATISTICS_GRADIENT && job.kind != KEPT_GRADIENT;
    double sum = 0;
    if (options.has_rivals) {
        find_rivals(logits, num_classes, rows);
        sum = finish(job, options, upstream, rows);
    } else if (gather) {
        if (job.kind == PREDICTIONS) predict(job, logits, rows, scratch);
        gather_rows(logits, num_classes, w, gradient != nullptr, rows, scratch);
        sum = finish(job, options, upstream, rows);
    } else {
        resume(job, rows);
    }
    for (int64_t p = 0; gradient && p < rows.size; ++p) {
        T* to = gradient + rows.gradient_offset[p];
        const real* exp_z = gather ? scratch.exp_z + p * padded(num_classes) : job.kind == KEPT_GRADIENT ? reinterpret_cast<real*>(to) : nullptr;
        if (job.kind == STATISTICS) {
            if (rows.y[p] != kIgnored) copy_row(exp_z, num_classes, to);
            continue;
        }
        scatter_row(rows, p, logits + rows.offset[p], w, num_classes, exp_z, to);
        if (options.has_rivals && rows.rival[p] >= 0) store(gradient + rows.gradient_offset[p] + rows.rival[p], -rows.on_target[p]);
    }
    return sum;
}

// ---- class probabilities

// Vectors of targets, with the logits and e^z of their classes: a block of the classes of one row, or one class after the other of rows side
// by side. One vector follows the other by `stride`.
struct Targets {
    int64_t num_vectors, stride;
    real *f, *exp_z, *shares;
};

// The shares of the n targets of a block, 0 for j and for the padding.
template <class P>
HOT void load_shares(const P* RESTRICT from, const real* RESTRICT w, int64_t n, int64_t j, real* RESTRICT to) {
    if (w) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) to[c] = load(from[c]) * w[c];
    } else {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) to[c] = load(from[c]);
    }
    for (int64_t c = n; c < padded(n); ++c) to[c] = 0.0f;
    if (j >= 0 && j < n) to[j] = 0.0f;
}

// A number of row p for the lanes of a vector, or the numbers of the rows from p on.
template <bool side_by_side>
inline Reals of_rows(const real* numbers, int64_t p) {
    return side_by_side ? load_vector(numbers + p) : all(numbers[p]);
}

// What the terms of the targets need of their rows.
struct Peeled {
    Reals top, scale, sum_x, sum_xz, sum_z, log_sum, count;
};

template <bool side_by_side>
Peeled peeled(const Others& others, int64_t p) {
    const auto of = of_rows<side_by_side>;
    return {of(others.top, p),   of(others.scale, p),   of(others.sum_x, p), of(others.sum_xz, p),
            of(others.sum_z, p), of(others.log_sum, p), of(others.count, p)};
}

// The sums of Others.
struct TargetSums {
    Reals of[Others::kSums];
};

template <Terms terms, bool has_bias>
HOT TargetSums add_targets(const Targets& targets, const Peeled& row, real hard_bias) {
    const Reals top = row.top, scale = row.scale, sum_x = row.sum_x, sum_xz = row.sum_xz, sum_z = row.sum_z;
    Reals share = {}, share_z = {}, rest = {}, over_S = {}, share_tau = {}, tau_over_S = {}, share_log = {}, hard = {}, pull = {};
    for (int64_t i = 0; i < targets.num_vectors; ++i) {
        const int64_t at = i * targets.stride;
        const Reals u = load_vector(targets.shares + at), f = load_vector(targets.f + at), x = load_vector(targets.exp_z + at) * scale;
        const Reals z = f - top, S = kOne + (sum_x - x), inv_S = kOne / S, u_over_S = u * inv_S;
        const Mask counts = (u != Reals{}) & (f != -kInf);
        share += u;
        share_z += select(counts, u * z, Reals{});
        if constexpr (terms >= DIVERGENCE) {
            const Reals tau = (sum_xz - x * near(z)) * inv_S;
            over_S += u_over_S;
            share_tau += u * tau;
            rest += select(counts, u * (sum_z - z), Reals{});
            tau_over_S += u_over_S * tau;
        }
        if constexpr (terms == LOGARITHM) share_log += u * log_(S);
        if constexpr (has_bias) {
            const SoftplusOf<Reals> term = hard_term(z - hard_bias, S);
            hard += select(counts, u * term.value, Reals{});
            pull += term.slope * u_over_S;
        }
    }
    return {{share, share_z, rest, over_S, share_tau, tau_over_S, share_log, hard, pull}};
}

// The coefficients of the gradient of their rows.
struct Pulls {
    Reals max, mean_z, inv_count, g_e, g_q, g_a, dense, q_scale, e_sum, m_sum, on_each, own_lam_e, own_lam_a, own_on_each, pull, masked_pull;
};

template <bool side_by_side>
Pulls pulls(const Rows& rows, const Others& others, int64_t p) {
    const auto of = of_rows<side_by_side>;
    return {of(rows.max, p),          of(rows.mean_z, p),         of(rows.inv_count, p),    of(rows.g_e, p),
            of(rows.g_q, p),          of(rows.g_a, p),            of(rows.dense, p),        of(rows.inv_sum_exp, p),
            of(others.e_sum, p),      of(others.m_sum, p),        of(others.on_each, p),    of(others.own_lam_e, p),
            of(others.own_lam_a, p),  of(others.own_on_each, p),  of(others.pull, p),       of(others.masked_pull, p)};
}

// The gradient of the classes of the targets. Every class takes the term of its own target out of the sums over all. `w` has the weights of
// the classes, if they are smoothed.
template <bool has_divergence, bool has_bias>
HOT void scatter_targets(const Targets& targets, const Peeled& row, const Pulls& coefficients, real hard_bias, const real* w, bool side_by_side,
                         real* RESTRICT values) {
    const Pulls of = coefficients;  // a copy stays in registers
    const Reals top = row.top, scale = row.scale, sum_x = row.sum_x, sum_xz = row.sum_xz;
    for (int64_t i = 0; i < targets.num_vectors; ++i) {
        const int64_t at = i * targets.stride;
        const Reals u = load_vector(targets.shares + at), f = load_vector(targets.f + at), exp_z = load_vector(targets.exp_z + at);
        const Reals x = exp_z * scale, z = near(f - top), S = kOne + (sum_x - x), inv_S = kOne / S;
        const Reals dense = !w ? of.dense : of.dense * (side_by_side ? all(w[i]) : load_vector(w + at));
        Reals value = element(f, exp_z * of.q_scale, f - of.max, of.mean_z, of.g_e, of.g_q, of.g_a, of.inv_count, dense);
        Reals own_pull = of.pull * u;
        if constexpr (has_divergence) {
            const Reals tau = (sum_xz - x * z) * inv_S, own = u * inv_S * (of.own_lam_e * (z - tau) - of.own_lam_a);
            value += x * ((z * of.e_sum - of.m_sum) - own) + (of.on_each - of.own_on_each * u);
        }
        if constexpr (has_bias) own_pull *= hard_term((f - top) - hard_bias, S).slope * (kOne + x * inv_S);
        store_vector(values + at, select(f == -kInf, -of.masked_pull * u, value - own_pull));
    }
}

// The margin terms of the targets.
template <Terms terms, bool has_bias>
HOT void margin_terms(const Targets& targets, const Peeled& row, const Options& options, real* RESTRICT values) {
    const Reals top = row.top, scale = row.scale, sum_x = row.sum_x, sum_xz = row.sum_xz, log_sum = row.log_sum;
    const Reals count = select(row.count > Reals{}, row.count, all(kOne)), lam_u = options.lam_a / count;
    const Reals sum_z = options.lam_a != 0 ? row.sum_z : Reals{};
    const Reals log_count = options.lam_log_count != 0 ? options.lam_log_count * log_(count) : Reals{};
    const real hard_bias = options.hard_bias, keep = options.keep, lam_e = options.lam_e, lam_log_S = options.lam_e + options.lam_a;
    for (int64_t i = 0; i < targets.num_vectors; ++i) {
        const int64_t at = i * targets.stride;
        const Reals f = load_vector(targets.f + at), x = load_vector(targets.exp_z + at) * scale, z = f - top, S = kOne + (sum_x - x);
        Reals term = keep * (has_bias ? hard_term(z - hard_bias, S).value : log_sum - z);
        if constexpr (terms >= DIVERGENCE) term += lam_e * ((sum_xz - x * near(z)) / S) + lam_u * (sum_z - z);
        if constexpr (terms == LOGARITHM) term += log_count - lam_log_S * log_(S);
        store_vector(values + at, term);
    }
}

// The masked targets of a row. Those with a share have an infinite loss, so few rows have any.
template <bool weighted, class T, class P>
HOT void add_masked(const T* RESTRICT f, const P* RESTRICT probabilities, const real* RESTRICT w, int64_t num_classes, double& all_masked,
                    double& all_lost) {
    real masked = 0, lost = 0;
#pragma omp simd reduction(+ : masked, lost)
    for (int64_t c = 0; c < num_classes; ++c) {
        const real share = load(f[c]) == -kInf ? load(probabilities[c]) : 0.0f, u = weighted ? share * w[c] : share;
        masked += u;
        lost += (share != 0.0f ? kInf : 0.0f) * u;  // 0, infinite, or NaN
    }
    all_masked = masked;
    all_lost = lost;
}

// The gradient of the shares of a block, from its margin terms in `values`. A masked class without a share has none.
template <class P>
HOT void scatter_shares(const real* RESTRICT f, const P* RESTRICT probabilities, const real* RESTRICT w, real upstream, real unknown,
                        int64_t n, real* RESTRICT values) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
        const real of_masked = load(probabilities[c]) == 0.0f ? unknown : unknown + kInf;
        values[c] = (f[c] == -kInf ? of_masked : values[c]) * upstream;
    }
    if (!w) return;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) values[c] *= w[c];
}

// The number of classes in the block of a row from class `from` on.
inline int64_t classes_of_block(int64_t num_classes, int64_t from) { return num_classes - from < kBlock ? num_classes - from : kBlock; }

// This block of row p; its shares are there already if it is the only one and comes `again`.
template <class T, class P>
Targets targets_of(const Job& job, const Rows& rows, int64_t p, int64_t from, const T* logits, const P* probabilities, const Scratch& scratch,
                   bool again) {
    const int64_t n = classes_of_block(job.num_classes, from), lanes = padded(job.num_classes), j = rows.y[p] - from;
    const bool alone = job.num_classes <= kBlock;  // the only block of a row stays where it is
    const int64_t at = alone ? p * lanes : 0;
    const Targets targets = {padded(n) / kWidth, kWidth, scratch.block + at, scratch.exp_z + p * lanes + from, scratch.shares + at};
    if (alone && again) return targets;
    load_block(logits + rows.offset[p] + from, n, j, targets.f);
    load_shares(probabilities + rows.probabilities_offset[p] + from, job.weight ? job.weight + from : nullptr, n, j, targets.shares);
    return targets;
}

TargetSums add(const Options& options, const Targets& targets, const Peeled& row) {
    using Sums = TargetSums (*)(const Targets&, const Peeled&, real);
    static constexpr Sums kSums[3][2] = {{add_targets<SOFTMAX_LOSS, false>, add_targets<SOFTMAX_LOSS, true>},
                                         {add_targets<DIVERGENCE, false>, add_targets<DIVERGENCE, true>},
                                         {add_targets<LOGARITHM, false>, add_targets<LOGARITHM, true>}};
    return kSums[options.terms][options.hard_bias != 0](targets, row, options.hard_bias);
}

void margins(const Options& options, const Targets& targets, const Peeled& row, real* values) {
    using Terms_ = void (*)(const Targets&, const Peeled&, const Options&, real*);
    static constexpr Terms_ kTerms[3][2] = {{margin_terms<SOFTMAX_LOSS, false>, margin_terms<SOFTMAX_LOSS, true>},
                                            {margin_terms<DIVERGENCE, false>, margin_terms<DIVERGENCE, true>},
                                            {margin_terms<LOGARITHM, false>, margin_terms<LOGARITHM, true>}};
    kTerms[options.terms][options.hard_bias != 0](targets, row, options, values);
}

void scatter(const Options& options, const Targets& targets, const Peeled& row, const Pulls& of, const real* w, bool side_by_side, real* values) {
    using Gradient = void (*)(const Targets&, const Peeled&, const Pulls&, real, const real*, bool, real*);
    static constexpr Gradient kGradients[2][2] = {{scatter_targets<false, false>, scatter_targets<false, true>},
                                                  {scatter_targets<true, false>, scatter_targets<true, true>}};
    kGradients[options.terms != SOFTMAX_LOSS][options.hard_bias != 0](targets, row, of, options.hard_bias, w, side_by_side, values);
}

// Rows of probabilities whose classes are neighbours.
template <class T, class P>
double run_targets(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch, const T* logits,
                   const P* probabilities, T* gradient, P* probabilities_gradient) {
    const int64_t num_classes = job.num_classes;
    const real* w = options.weighted_smoothing ? scratch.weight : nullptr;
    real* values = scratch.values;
    for (int64_t p = 0; p < rows.size; ++p) {
        const int64_t j = first_max(logits + rows.offset[p], num_classes);
        rows.y[p] = static_cast<Integer>(j);  // it alone can have more than half of the softmax
        rows.class_weight[p] = job.weight ? job.weight[j] : 1.0f;
        rows.target_weight[p] = load(probabilities[rows.probabilities_offset[p] + j]) * rows.class_weight[p];
    }
    gather_rows(logits, num_classes, w, true, rows, scratch);
    Others& others = *scratch.others;
    peel(rows, others);
    for (int64_t p = 0; p < rows.size; ++p) {
        for (int64_t from = 0; from < num_classes; from += kBlock) {
            const Targets targets = targets_of(job, rows, p, from, logits, probabilities, scratch, false);
            const TargetSums sums = add(options, targets, peeled<false>(others, p));
            for (int64_t i = 0; i < Others::kSums; ++i) others.sums(i)[p] += sum(sums.of[i]);
        }
        const T* f = logits + rows.offset[p];
        const P* t = probabilities + rows.probabilities_offset[p];
        if (rows.count[p] + 1 == num_classes) continue;
        if (job.weight) add_masked<true>(f, t, job.weight, num_classes, others.masked[p], others.lost[p]);
        else add_masked<false>(f, t, job.weight, num_classes, others.masked[p], others.lost[p]);
    }
    const double loss = finish(job, options, upstream, rows, &others);
    for (int64_t p = 0; (gradient || probabilities_gradient) && p < rows.size; ++p) {
        T* g = gradient + (gradient ? rows.gradient_offset[p] : 0);
        P* g_t = probabilities_gradient + (probabilities_gradient ? rows.probabilities_gradient_offset[p] : 0);
        for (int64_t from = 0; from < num_classes; from += kBlock) {
            const Targets targets = targets_of(job, rows, p, from, logits, probabilities, scratch, true);
            const int64_t n = classes_of_block(num_classes, from);
            if (gradient) {
                scatter(options, targets, peeled<false>(others, p), pulls<false>(rows, others, p), w ? w + from : nullptr, false, values);
                copy_row(values, n, g + from);
            }
            if (!probabilities_gradient) continue;
            margins(options, targets, peeled<false>(others, p), values);
            scatter_shares(targets.f, probabilities + rows.probabilities_offset[p] + from, job.weight ? job.weight + from : nullptr,
                           rows.upstream[p], others.unknown[p], n, values);
            copy_row(values, n, g_t + from);
        }
        if (gradient) store(g + rows.y[p], rows.on_target[p]);
        if (probabilities_gradient) store(g_t + rows.y[p], rows.margin_term[p] * rows.upstream[p] * rows.class_weight[p]);
    }
    return loss;
}

template <class T, class U>
__attribute__((always_inline)) inline void copy_square(const T* from, int64_t from_i, int64_t from_j, U* to, int64_t to_i, int64_t to_j,
                                                       int64_t num_i, int64_t num_j) {
    alignas(kAlignment) real square[kLanes][kLanes], column[kLanes];
    const bool reads_vectors = from_j == 1 && num_j == kLanes, writes_vectors = to_i == 1 && num_i == kLanes;
    for (int64_t i = 0; i < num_i; ++i) {
        for (int64_t j = 0; reads_vectors && j < kLanes; j += kWidth) store_vector(square[i] + j, load_vector(from + i * from_i + j));
        for (int64_t j = 0; !reads_vectors && j < num_j; ++j) square[i][j] = load(from[i * from_i + j * from_j]);
    }
    for (int64_t j = 0; j < num_j; ++j) {
        for (int64_t i = 0; i < num_i; ++i) column[i] = square[i][j];
        for (int64_t i = 0; writes_vectors && i < kLanes; i += kWidth) store_vector(to + j * to_j + i, load_vector(column + i));
        for (int64_t i = 0; !writes_vectors && i < num_i; ++i) store(to + i * to_i + j * to_j, column[i]);
    }
}

// Copies numbers (i, j) by squares, so that reads along j and writes along i come in whole cache lines.
template <class T, class U>
HOT void copy(const T* from, int64_t from_i, int64_t from_j, U* to, int64_t to_i, int64_t to_j, int64_t num_i, int64_t num_j) {
    for (int64_t i = 0; i < num_i; i += kLanes)
        for (int64_t j = 0; j < num_j; j += kLanes) {
            const int64_t n = num_i - i < kLanes ? num_i - i : kLanes, m = num_j - j < kLanes ? num_j - j : kLanes;
            const T* source = from + i * from_i + j * from_j;
            U* goal = to + i * to_i + j * to_j;
            if (n == kLanes && m == kLanes) copy_square(source, from_i, from_j, goal, to_i, to_j, kLanes, kLanes);
            else copy_square(source, from_i, from_j, goal, to_i, to_j, n, m);
        }
}

// Rows to and from rows of `width` floats. If their classes are not neighbours, mostly the rows are.
template <class T>
void copy_in(const T* from, const int64_t* strides, int64_t num_rows, int64_t num_classes, int64_t width, real* to) {
    if (strides[2] != 1) return copy(from, strides[2], strides[1], to, 1, width, num_classes, num_rows);
    for (int64_t p = 0; p < num_rows; ++p) copy_row(from + p * strides[1], num_classes, to + p * width);
}

template <class T>
void copy_out(const real* from, const int64_t* strides, int64_t num_rows, int64_t num_classes, int64_t width, T* to) {
    if (strides[2] != 1) return copy(from, width, 1, to, strides[1], strides[2], num_rows, num_classes);
    for (int64_t p = 0; p < num_rows; ++p) copy_row(from + p * width, num_classes, to + p * strides[1]);
}

template <class T>
double run_indices(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const T* logits = static_cast<const T*>(job.logits);
    T* gradient = static_cast<T*>(job.gradient);
    if (!scratch.copies) return run_rows(job, options, upstream, rows, scratch, logits, gradient);
    const int64_t width = copy_width(job.num_classes), g = rows.gradient_offset[0];
    real *f = scratch.copies, *of_f = f + rows.size * width;
    copy_in(logits + rows.offset[0], job.logits_strides, rows.size, job.num_classes, width, f);
    for (int64_t p = 0; p < rows.size; ++p) rows.offset[p] = rows.gradient_offset[p] = p * width;
    const double sum = run_rows(job, options, upstream, rows, scratch, f, gradient ? of_f : nullptr);
    if (gradient) copy_out(of_f, job.gradient_strides, rows.size, job.num_classes, width, gradient + g);
    return sum;
}

template <class T, class P>
double run_probabilities(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const T* logits = static_cast<const T*>(job.logits);
    const P* probabilities = static_cast<const P*>(job.probabilities);
    T* gradient = static_cast<T*>(job.gradient);
    P* probabilities_gradient = static_cast<P*>(job.probabilities_gradient);
    if constexpr (!is_half<T> && !is_half<P>)
        if (!scratch.copies) return run_targets(job, options, upstream, rows, scratch, logits, probabilities, gradient, probabilities_gradient);
    const int64_t width = copy_width(job.num_classes), g = rows.gradient_offset[0], g_t = rows.probabilities_gradient_offset[0];
    real *f = scratch.copies, *t = f + rows.size * width;
    copy_in(logits + rows.offset[0], job.logits_strides, rows.size, job.num_classes, width, f);
    copy_in(probabilities + rows.probabilities_offset[0], job.probabilities_strides, rows.size, job.num_classes, width, t);
    for (int64_t p = 0; p < rows.size; ++p)
        rows.offset[p] = rows.gradient_offset[p] = rows.probabilities_offset[p] = rows.probabilities_gradient_offset[p] = p * width;
    const double sum =
        run_targets(job, options, upstream, rows, scratch, f, t, gradient ? f : nullptr, probabilities_gradient ? t : nullptr);
    if (gradient) copy_out(f, job.gradient_strides, rows.size, job.num_classes, width, gradient + g);
    if (probabilities_gradient)
        copy_out(t, job.probabilities_gradient_strides, rows.size, job.num_classes, width, probabilities_gradient + g_t);
    return sum;
}

// ---- rows that are neighbours in memory while their classes are not, such as (N, C, d1, ...): a tile (class, row), copied

// A loop over a tile takes kDeep classes of a vector of rows at a time: what it knows of the rows stays in registers, and its way through memory
// stays within a few pages.
constexpr int64_t kDeep = 8;

// The logits of a tile, the targets masked, with the largest and smallest logit of each row but for its target.
template <class T>
HOT void load_tile(const T* from, const int64_t* strides, int64_t num_classes, real* RESTRICT tile, real* RESTRICT min, Rows& rows) {
    const int64_t lanes = padded(rows.size);
    for (int64_t p = 0; p < lanes; ++p) rows.max[p] = -kInf, min[p] = kInf;
    for (int64_t first = 0; first < num_classes; first += kDeep) {
        const int64_t last = first + kDeep < num_classes ? first + kDeep : num_classes;
        for (int64_t p = 0; p < lanes; p += kWidth) {
            const bool whole = strides[1] == 1 && p + kWidth <= rows.size;
            for (int64_t c = first; !whole && c < last; ++c)
                for (int64_t i = p; i < p + kWidth; ++i) tile[c * lanes + i] = i < rows.size ? load(from[c * strides[2] + i * strides[1]]) : 0.0f;
            const Mask y = load_as<Mask>(rows.y + p);
            Reals most = load_vector(rows.max + p), least = load_vector(min + p);
            for (int64_t c = first; c < last; ++c) {
                const Reals x = whole ? load_vector(from + c * strides[2] + p) : load_vector(tile + c * lanes + p);
                const Mask is_target = y == static_cast<Integer>(c);
                const Reals other = select(is_target, all(-kInf), x);
                store_vector(tile + c * lanes + p, other);
                most = larger(other, most);
                least = smaller(select(is_target, all(kInf), x), least);
            }
            store_vector(rows.max + p, most);
            store_vector(min + p, least);
        }
    }
}

// The sums over a few classes of a vector of rows, added to theirs. In a plain tile only targets are masked.
template <bool plain>
HOT void gather_tile(const real* RESTRICT tile, const real* RESTRICT w, int64_t lanes, int64_t num_classes, real* RESTRICT exp_z,
                     int64_t p, Rows& rows) {
    const Reals max = load_vector(rows.max + p), shift = select(max == -kInf, Reals{}, max);
    Reals s = {}, t = {}, a = {}, k = {}, b = {}, bz = {};
    for (int64_t c = 0; c < num_classes; ++c) {
        const Reals x = load_vector(tile + c * lanes);
        const Mask absent = x == -kInf;
        const Reals z = select(absent, Reals{}, x - shift), e = select(absent, Reals{}, plain ? plain_exp(z) : exp_(z));
        store_vector(exp_z + c * lanes, e);
        s += e;
        t += e * (plain ? z : near(z));
        a += z;
        if (!plain) k += select(absent, Reals{}, all(1.0f));
        if (!w) continue;
        b += select(absent, Reals{}, all(w[c]));
        bz += w[c] * z;
    }
    add_lanes(rows.sum_exp + p, s);
    add_lanes(rows.sum_exp_z + p, t);
    add_lanes(rows.sum_z + p, a);
    add_lanes(rows.count + p, k);
    add_lanes(rows.sum_weight + p, b);
    add_lanes(rows.sum_weight_z + p, bz);
}

// The sums of the rows of a tile, and e^z.
void gather_rows_of_tile(const real* tile, const real* min, const real* w, int64_t num_classes, real* exp_z, Rows& rows) {
    const int64_t lanes = padded(rows.size);
    bool plain = true;
    for (int64_t p = 0; p < rows.size; ++p) plain = plain && (rows.y[p] == kIgnored || min[p] - rows.max[p] >= kLow);
    const auto gather = plain ? gather_tile<true> : gather_tile<false>;
    for (int64_t from = 0; from < num_classes; from += kTileBlock) {
        const int64_t n = num_classes - from < kTileBlock ? num_classes - from : kTileBlock;
        for (int64_t p = 0; p < lanes; p += kWidth)
            gather(tile + from * lanes + p, w ? w + from : nullptr, lanes, n, exp_z + from * lanes + p, p, rows);
    }
    for (int64_t p = 0; p < lanes; ++p) {
        rows.plain[p] = plain;
        rows.sum_exp[p] = rows.sum_z[p] == rows.sum_z[p] ? rows.sum_exp[p] : NAN;
        if (plain) rows.count[p] = static_cast<double>(num_classes - (rows.y[p] >= 0));
        if (!w) rows.sum_weight[p] = rows.count[p], rows.sum_weight_z[p] = rows.sum_z[p];
    }
}

// The gradient of a tile.
template <Way way, class T>
HOT void scatter_tile(const real* RESTRICT tile, const real* RESTRICT exp_z, const real* w, int64_t num_classes, Rows& rows,
                      const int64_t* strides, T* to) {
    const int64_t lanes = padded(rows.size);
    alignas(kAlignment) real at_first[kRows];
    for (int64_t p = 0; p < lanes; ++p) at_first[p] = way == AGAIN ? at_first_max(rows, p) : 0.0f;
    for (int64_t first = 0; first < num_classes; first += kDeep) {
        const int64_t last = first + kDeep < num_classes ? first + kDeep : num_classes;
        for (int64_t p = 0; p < lanes; p += kWidth) {
            const bool whole = strides[1] == 1 && p + kWidth <= rows.size;
            const Reals max = load_vector(rows.max + p), scale = load_vector(rows.inv_sum_exp + p), mean_z = load_vector(rows.mean_z + p);
            const Reals g_e = load_vector(rows.g_e + p), g_q = load_vector(rows.g_q + p), g_a = load_vector(rows.g_a + p);
            const Reals inv_count = load_vector(rows.inv_count + p), dense = load_vector(rows.dense + p);
            const Reals on_target = load_vector(rows.on_target + p);
            const Mask y = load_as<Mask>(rows.y + p), live = load_as<Mask>(rows.live + p) != 0;
            Reals at_max = load_vector(rows.at_max + p);
            for (int64_t c = first; c < last; ++c) {
                const Reals x = load_vector(tile + c * lanes + p), z = x - max;
                const Reals q = (way == AGAIN ? exp_(z) : load_vector(exp_z + c * lanes + p)) * scale;
                Reals value = element<way == PLAIN>(x, q, z, mean_z, g_e, g_q, g_a, inv_count, way == WEIGHTED ? dense * w[c] : dense);
                if (way == AGAIN) {  // the first class with the maximum gets the gradient of rho
                    const Mask found = (x == max) & (at_max != 0.0f);
                    value = select(found, load_vector(at_first + p), value);
                    at_max = select(found, Reals{}, at_max);
                }
                value = select(y == static_cast<Integer>(c), on_target, select(live, value, Reals{}));
                for (int64_t i = 0; !whole && i < kWidth && p + i < rows.size; ++i) store(to + c * strides[2] + (p + i) * strides[1], value[i]);
                if (whole) store_vector(to + c * strides[2] + p, value);
            }
            store_vector(rows.at_max + p, at_max);
        }
    }
}

template <class T>
double run_tile(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const int64_t num_classes = job.num_classes;
    const T* f = static_cast<const T*>(job.logits) + rows.offset[0];
    const real* w = options.weighted_smoothing ? scratch.weight : nullptr;
    const bool gather = job.kind != STATISTICS_GRADIENT;
    alignas(kAlignment) real min[kRows];
    double sum = 0;
    for (int64_t p = 0; p < rows.size; ++p)
        if (rows.y[p] >= 0) rows.target_logit[p] = load(f[p * job.logits_strides[1] + rows.y[p] * job.logits_strides[2]]);
    load_tile(f, job.logits_strides, num_classes, scratch.block, min, rows);
    if (gather) {
        gather_rows_of_tile(scratch.block, min, w, num_classes, scratch.exp_z, rows);
        sum = finish(job, options, upstream, rows);
    } else {
        resume(job, rows);
    }
    if (!job.gradient) return sum;
    const auto scatter = !gather         ? scatter_tile<AGAIN, T>
                         : w             ? scatter_tile<WEIGHTED, T>
                         : rows.plain[0] ? scatter_tile<PLAIN, T>
                                         : scatter_tile<MASKED, T>;
    scatter(scratch.block, scratch.exp_z, w, num_classes, rows, job.gradient_strides, static_cast<T*>(job.gradient) + rows.gradient_offset[0]);
    return sum;
}

// The first class with the largest logit of each row of a tile becomes its target; the least logit is that of all classes.
void take_out_largest(real* tile, int64_t num_classes, Rows& rows) {
    const int64_t lanes = padded(rows.size);
    for (int64_t p = 0; p < lanes; p += kWidth) {
        const Reals top = load_vector(rows.max + p);
        Reals most = all(-kInf);
        Mask y = load_as<Mask>(rows.y + p);
        for (int64_t c = 0; c < num_classes; ++c) {
            const Reals x = load_vector(tile + c * lanes + p);
            const Mask first = (x == top) & (y < 0);
            const Reals other = select(first, all(-kInf), x);
            y = (y & ~first) | (first & static_cast<Integer>(c));
            store_vector(tile + c * lanes + p, other);
            most = larger(other, most);
        }
        store_vector(rows.max + p, most);
        store_as(rows.y + p, y);
        store_vector(rows.target_logit + p, top);
    }
    for (int64_t p = 0; p < lanes; ++p) {
        if (rows.y[p] < 0) rows.y[p] = 0, rows.target_logit[p] = NAN;  // a row of NaN
        if (p >= rows.size) rows.y[p] = kIgnored;
    }
}

// The shares of a tile, 0 for the largest logits and beyond the last row.
template <class P>
HOT void load_tile_of_shares(const P* from, const int64_t* strides, const real* w, int64_t num_classes, const Rows& rows, real* RESTRICT to) {
    const int64_t lanes = padded(rows.size);
    for (int64_t c = 0; c < num_classes; ++c)
        for (int64_t p = 0; p < lanes; p += kWidth) {
            const P* at = from + c * strides[2] + p * strides[1];
            real some[kWidth] = {};
            const bool whole = strides[1] == 1 && p + kWidth <= rows.size;
            for (int64_t i = 0; !whole && i < kWidth && p + i < rows.size; ++i) some[i] = load(at[i * strides[1]]);
            const Reals share = (whole ? load_vector(at) : load_vector(some)) * (w ? w[c] : kOne);
            store_vector(to + c * lanes + p, select(load_as<Mask>(rows.y + p) == static_cast<Integer>(c), Reals{}, share));
        }
}

// A tile of gradients, with that of the targets.
template <class T>
HOT void store_tile(const real* values, const real* of_targets, const Rows& rows, const int64_t* strides, int64_t num_classes, T* to) {
    const int64_t lanes = padded(rows.size);
    for (int64_t c = 0; c < num_classes; ++c)
        for (int64_t p = 0; p < lanes; p += kWidth) {
            T* at = to + c * strides[2] + p * strides[1];
            const Mask is_target = load_as<Mask>(rows.y + p) == static_cast<Integer>(c);
            const Reals value = select(is_target, load_vector(of_targets + p), load_vector(values + c * lanes + p));
            const bool whole = strides[1] == 1 && p + kWidth <= rows.size;
            if (whole) store_vector(at, value);
            for (int64_t i = 0; !whole && i < kWidth && p + i < rows.size; ++i) store(at + i * strides[1], value[i]);
        }
}

template <class T, class P>
double run_tile_of_probabilities(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const int64_t num_classes = job.num_classes, lanes = padded(rows.size);
    const int64_t *t_strides = job.probabilities_strides, *strides = job.logits_strides;
    const P* t = static_cast<const P*>(job.probabilities) + rows.probabilities_offset[0];
    const real* w = options.weighted_smoothing ? scratch.weight : nullptr;
    real *f = scratch.block, *values = scratch.values;
    Others& others = *scratch.others;
    alignas(kAlignment) real min[kRows], of_targets[kRows] = {};
    load_tile(static_cast<const T*>(job.logits) + rows.offset[0], strides, num_classes, f, min, rows);
    take_out_largest(f, num_classes, rows);
    load_tile_of_shares(t, t_strides, job.weight, num_classes, rows, scratch.shares);
    for (int64_t p = 0; p < rows.size; ++p) {
        rows.class_weight[p] = job.weight ? job.weight[rows.y[p]] : 1.0f;
        rows.target_weight[p] = load(t[p * t_strides[1] + rows.y[p] * t_strides[2]]) * rows.class_weight[p];
    }
    gather_rows_of_tile(f, min, w, num_classes, scratch.exp_z, rows);
    peel(rows, others);
    for (int64_t p = 0; p < lanes; p += kWidth)
        for (int64_t c = 0; c < num_classes; c += kTileBlock) {
            const int64_t n = num_classes - c < kTileBlock ? num_classes - c : kTileBlock, at = c * lanes + p;
            const TargetSums sums = add(options, {n, lanes, f + at, scratch.exp_z + at, scratch.shares + at}, peeled<true>(others, p));
            for (int64_t i = 0; i < Others::kSums; ++i) add_lanes(others.sums(i) + p, sums.of[i]);
        }
    for (int64_t p = 0; !rows.plain[0] && p < rows.size; ++p)
        for (int64_t c = 0; c < num_classes; ++c) {
            const bool masked = f[c * lanes + p] == -kInf && c != rows.y[p];
            const real u = masked ? scratch.shares[c * lanes + p] : 0.0f;
            others.masked[p] += u;
            others.lost[p] += (masked && load(t[p * t_strides[1] + c * t_strides[2]]) != 0.0f ? kInf : 0.0f) * u;
        }
    const double loss = finish(job, options, upstream, rows, &others);
    for (int64_t p = 0; job.gradient && p < lanes; p += kWidth)
        scatter(options, {num_classes, lanes, f + p, scratch.exp_z + p, scratch.shares + p}, peeled<true>(others, p),
                pulls<true>(rows, others, p), w, true, values + p);
    if (job.gradient)
        store_tile(values, rows.on_target, rows, job.gradient_strides, num_classes, static_cast<T*>(job.gradient) + rows.gradient_offset[0]);
    if (!job.probabilities_gradient) return loss;
    for (int64_t p = 0; p < lanes; p += kWidth)
        margins(options, {num_classes, lanes, f + p, scratch.exp_z + p, scratch.shares + p}, peeled<true>(others, p), values + p);
    for (int64_t c = 0; c < num_classes; ++c)
        for (int64_t p = 0; p < rows.size; ++p) {
            real& value = values[c * lanes + p];
            if (f[c * lanes + p] == -kInf && c != rows.y[p])
                value = others.unknown[p] + (load(t[p * t_strides[1] + c * t_strides[2]]) == 0.0f ? 0.0f : kInf);
            value *= rows.upstream[p] * (job.weight ? job.weight[c] : 1.0f);
        }
    for (int64_t p = 0; p < rows.size; ++p) of_targets[p] = rows.margin_term[p] * rows.upstream[p] * rows.class_weight[p];
    store_tile(values, of_targets, rows, job.probabilities_gradient_strides, num_classes,
               static_cast<P*>(job.probabilities_gradient) + rows.probabilities_gradient_offset[0]);
    return loss;
}

// ---- the whole job

#define CONCATENATE_(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_(a, b)

template <class T>
int64_t run(const Job& job) {
    const int64_t num_rows = job.outer * job.inner, num_classes = job.num_classes;
    const bool soft = job.probabilities != nullptr;
    const bool takes_elsewhere = job.kind == RECORD || job.kind == STATISTICS_GRADIENT || job.kind == KEPT_GRADIENT;
    double total_weight = soft ? static_cast<double>(num_rows) : 0;
    for (int64_t row = 0; !soft && row < num_rows; ++row) {
        const int64_t y = job.target[row];
        if (y == job.ignore_index || (y == kElsewhere && takes_elsewhere)) continue;
        if (y < 0 || y >= num_classes) return row;
        total_weight += job.weight ? job.weight[y] : 1.0f;
    }
    Options options = {};
    if (job.kind == LOSS) {
        const real lam = static_cast<real>(job.lam);
        options.lam = lam;
        options.lam_log_count = job.divergence == KL_QU ? lam : job.divergence == KL_UQ ? -lam : 0.0f;
        options.lam_e = job.divergence == SYMMETRIC ? lam / 2 : job.divergence == KL_QU ? lam : 0.0f;
        options.lam_a = job.divergence == SYMMETRIC ? -lam / 2 : job.divergence == KL_UQ ? -lam : 0.0f;
        options.hard_bias = static_cast<real>(job.hard_bias);
        options.keep = static_cast<real>(1 - job.label_smoothing);
        options.smoothing = static_cast<real>(job.label_smoothing);
        options.has_rivals = job.divergence >= HARD_MARGIN;
        options.is_hinge = job.divergence == HINGE;
        options.weighted_smoothing = job.weight && job.label_smoothing > 0;
        options.terms = lam == 0 ? SOFTMAX_LOSS : job.divergence == SYMMETRIC ? DIVERGENCE : LOGARITHM;
    }
    const double upstream = job.mean ? job.upstream / total_weight : job.upstream;

    const bool apart = !(job.logits_strides[2] == 1 && (!job.gradient || job.gradient_strides[2] == 1) &&
                         (!soft || job.probabilities_strides[2] == 1) &&
                         (!job.probabilities_gradient || job.probabilities_gradient_strides[2] == 1));
    const bool all_apart = job.logits_strides[2] != 1 && (!soft || job.probabilities_strides[2] != 1);
    const bool tiled = (soft ? all_apart : apart) && job.kind != PREDICTIONS && !options.has_rivals && job.inner >= kLanes &&
                       num_classes <= kTile / kLanes;
    const bool copied = !tiled && (apart || (soft && (is_half<T> || job.probabilities_dtype == FLOAT16)));
    const int64_t least = tiled || copied ? kLanes : 1;
    int64_t rows_a_task = (tiled ? kTile : kElementsATask) / (num_classes > 0 ? num_classes : 1);
    rows_a_task = rows_a_task < least ? least : rows_a_task > kRows ? kRows : rows_a_task;
    if (rows_a_task > kLanes) rows_a_task = rows_a_task / kLanes * kLanes;
    // a tile, and what is copied together, lies within one outer row
    if ((tiled || copied) && rows_a_task > job.inner) rows_a_task = job.inner < 1 ? 1 : job.inner;
    const int64_t span = tiled || copied ? job.inner : num_rows, tasks_a_span = (span + rows_a_task - 1) / rows_a_task;
    const int64_t num_tasks = (tiled || copied ? job.outer : 1) * tasks_a_span;
    int64_t num_threads = num_rows * num_classes / kElementsAThread;
    num_threads = num_threads < 1 ? 1 : num_threads > job.num_threads ? job.num_threads : num_threads;
    num_threads = num_threads > num_tasks ? num_tasks : num_threads;
    num_threads = num_threads < 1 ? 1 : num_threads;

    const int64_t lanes = padded(num_classes), row_length = (tiled ? padded(rows_a_task) : rows_a_task) * lanes;
    const int64_t block_size = tiled || (soft && num_classes <= kBlock) ? row_length : soft ? kBlock : 0;
    const int64_t exp_size = job.gradient || soft || tiled ? row_length : kBlock + kShort, weight_size = options.weighted_smoothing ? lanes : 0;
    const int64_t rows_size = padded(sizeof(Rows) / sizeof(real) + 1), others_size = soft ? padded(sizeof(Others) / sizeof(real)) : 0;
    const int64_t copies_size = copied ? 2 * rows_a_task * copy_width(num_classes) : 0;
    const int64_t soft_size = soft ? block_size + (tiled ? row_length : kBlock) : 0;
    const int64_t edges_size = tiled ? 0 : rows_a_task * Edges::stride(num_classes);
    const int64_t scratch_size = exp_size + edges_size + block_size + rows_size + others_size + copies_size + soft_size;
    double* sums = static_cast<double*>(std::calloc(static_cast<size_t>(num_tasks + 1), sizeof(double)));
    void* allocated = std::malloc(static_cast<size_t>(num_threads * scratch_size + weight_size) * sizeof(real) + kAlignment);
    if (!sums || !allocated) {
        std::free(sums);
        std::free(allocated);
        return -2;
    }
    real* memory = reinterpret_cast<real*>((reinterpret_cast<uintptr_t>(allocated) + kAlignment - 1) / kAlignment * kAlignment);
    real* weight = memory + num_threads * scratch_size;
    for (int64_t c = 0; c < weight_size; ++c) weight[c] = c < num_classes ? job.weight[c] : 0.0f;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const int64_t bytes = num_rows * num_classes * static_cast<int64_t>(sizeof(T));
    if (job.gradient && job.gradient != job.logits && bytes >= kHugePages) {  // page faults take most of the time of a fresh gradient
        const uintptr_t huge = 2 << 20, from = (reinterpret_cast<uintptr_t>(job.gradient) + huge - 1) / huge * huge;
        madvise(reinterpret_cast<void*>(from), reinterpret_cast<uintptr_t>(job.gradient) + bytes - from, MADV_HUGEPAGE);
    }
#endif

#pragma omp parallel num_threads(static_cast<int>(num_threads)) if (num_threads > 1)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        real* mine = memory + thread * scratch_size;
        real *edges = mine + exp_size, *block = edges + edges_size, *rows_at = block + block_size, *others = rows_at + rows_size;
        real *copies = others + others_size, *shares = copies + copies_size;
        Scratch scratch = {mine,   edges, block, weight, shares, shares + block_size, copied ? copies : nullptr,
                           reinterpret_cast<Others*>(others)};
        // in the scratch too, where it is aligned; aligning it on the stack costs more than it saves
        Rows& rows = *reinterpret_cast<Rows*>(rows_at);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tasks; ++task) {
            const int64_t in_span = task % tasks_a_span * rows_a_task;
            rows.first = task / tasks_a_span * span + in_span;
            rows.size = span - in_span < rows_a_task ? span - in_span : rows_a_task;
            int64_t o = rows.first / job.inner, i = rows.first % job.inner;
            for (int64_t p = 0; p < rows.size; ++p, ++i) {
                if (i == job.inner) ++o, i = 0;
                rows.offset[p] = o * job.logits_strides[0] + i * job.logits_strides[1];
                rows.gradient_offset[p] = o * job.gradient_strides[0] + i * job.gradient_strides[1];
                rows.probabilities_offset[p] = o * job.probabilities_strides[0] + i * job.probabilities_strides[1];
                rows.probabilities_gradient_offset[p] = o * job.probabilities_gradient_strides[0] + i * job.probabilities_gradient_strides[1];
            }
            for (int64_t p = 0; p < padded(rows.size); ++p) {
                const int64_t y = p < rows.size && !soft ? job.target[rows.first + p] : job.ignore_index;
                rows.y[p] = y == job.ignore_index ? kIgnored : static_cast<Integer>(y);
                rows.target_logit[p] = rows.upstream[p] = rows.at_max[p] = 0;
                rows.live[p] = 0;
                rows.target_weight[p] = rows.class_weight[p] = job.weight && rows.y[p] >= 0 ? job.weight[y] : 1.0f;
                rows.max[p] = -kInf;
                rows.sum_exp[p] = rows.sum_exp_z[p] = rows.sum_z[p] = rows.count[p] = rows.sum_weight[p] = rows.sum_weight_z[p] = 0;
            }
#ifdef LARGEMARGIN_FLOAT64
            const auto run_task = tiled && soft ? run_tile_of_probabilities<T, real>
                                  : tiled       ? run_tile<T>
                                  : soft        ? run_probabilities<T, real>
                                                : run_indices<T>;
#else
            const auto by_tile = job.probabilities_dtype == FLOAT16    ? run_tile_of_probabilities<T, Half>
                                 : job.probabilities_dtype == BFLOAT16 ? run_tile_of_probabilities<T, BFloat16>
                                                                       : run_tile_of_probabilities<T, real>;
            const auto by_row = job.probabilities_dtype == FLOAT16    ? run_probabilities<T, Half>
                                 : job.probabilities_dtype == BFLOAT16 ? run_probabilities<T, BFloat16>
                                                                       : run_probabilities<T, real>;
            const auto run_task = soft ? (tiled ? by_tile : by_row) : tiled ? run_tile<T> : run_indices<T>;
#endif
            sums[task] = run_task(job, options, upstream, rows, scratch);
        }
    }
    double sum = 0;  // in the order of the rows, for any number of threads
    for (int64_t task = 0; task < num_tasks; ++task) sum += sums[task];
    if (job.reduced) *job.reduced = static_cast<real>(job.mean ? sum / total_weight : sum);
    std::free(sums);
    std::free(allocated);
    return -1;
}

}  // namespace

// Returns -1 for success, -2 without memory, or else the first row whose label is out of range (nothing was written).
EXPORT int64_t CONCATENATE(largemargin_run_, LARGEMARGIN_ISA)(const Job* job) {
#ifdef LARGEMARGIN_FLOAT64
    return run<real>(*job);
#else
    return job->dtype == FLOAT16 ? run<Half>(*job) : job->dtype == BFLOAT16 ? run<BFloat16>(*job) : run<real>(*job);
#endif
}

#endif
