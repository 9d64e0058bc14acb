// Rows of logits on the CPU: their statistics, the large-margin loss, and the gradients of both. rowstats.py explains the maths and cpu.py
// calls this file. Symbols: f the logits, y the target, z = f - max over the non-targets, q their softmax.
//
// In both layouts a row takes three steps:
//   gather   one pass over the logits: e^z, kept for the gradient, and the sums S = sum e^z, T = sum e^z z, A = sum z, K = sum 1
//   finish   a handful of numbers a row: the statistics, the loss, and the coefficients of the gradient
//   scatter  one pass: gradient_c = q_c (g_e (z_c - E_q z) + g_q) + g_a (1/K - q_c) - dense w_c off the target, on_target on it
// An element costs one exp. If the statistics are given (`state`), the gradient is a scatter alone.
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

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Mirrored field by field in cpu.py, which checks each offset with largemargin_offset_of.
struct Job {
    // logits and gradient: rows (outer, inner) of num_classes, with the strides of outer, inner and class in elements
    int64_t outer, inner, num_classes;
    int64_t logits_strides[3], gradient_strides[3];
    const void* logits;
    void* gradient;         // null: no gradient; may be the logits themselves
    const int64_t* target;  // one per row; statistics also take -1, ignored, and -2, a class of the row that is not here
    int64_t ignore_index;
    int32_t is_bfloat16, num_threads;
    // statistics: each null or one number per row
    float* stats[6];        // log_odds, neg_entropy, mean_log_q, rho, spread, num_nontargets
    float* state;           // (3, rows): max, S, E_q z; written with the statistics, read with their gradients
    const float* grads[4];  // upstream of log_odds, neg_entropy, mean_log_q, rho
    // loss
    const float* weight;  // one per class, or null
    float* losses;        // one per row, or null
    const float* row_upstream;
    double upstream;  // of the reduced loss; used if row_upstream is null
    double lam, hard_bias, label_smoothing;
    float* reduced;            // the reduced loss, or null
    int32_t divergence, mean;  // mean: divide by the summed weights of the kept rows
    int32_t kind;              // the result wanted
};

enum Kind { STATISTICS = 0, STATISTICS_GRADIENT = 1, LOSS = 2 };
enum Divergence { SYMMETRIC = 0, KL_QU = 1, KL_UQ = 2 };

#ifndef LARGEMARGIN_ISA

EXPORT int64_t largemargin_sizeof_job() { return sizeof(Job); }

// The offset of a field of Job, by its name in cpu.py; -1 for an unknown name.
EXPORT int64_t largemargin_offset_of(const char* name) {
#define FIELD(named, field) if (!std::strcmp(name, #named)) return offsetof(Job, field)
#define SAME(field) FIELD(field, field)
    SAME(outer); SAME(inner); SAME(num_classes); SAME(logits); SAME(gradient); SAME(target); SAME(ignore_index); SAME(is_bfloat16);
    FIELD(outer_stride, logits_strides[0]); FIELD(inner_stride, logits_strides[1]); FIELD(class_stride, logits_strides[2]);
    FIELD(gradient_outer_stride, gradient_strides[0]); FIELD(gradient_inner_stride, gradient_strides[1]);
    FIELD(gradient_class_stride, gradient_strides[2]); SAME(num_threads); SAME(state); SAME(weight); SAME(losses); SAME(row_upstream);
    FIELD(log_odds, stats[0]); FIELD(neg_entropy, stats[1]); FIELD(mean_log_q, stats[2]); FIELD(rho, stats[3]); FIELD(spread, stats[4]);
    FIELD(num_nontargets, stats[5]); FIELD(log_odds_grad, grads[0]); FIELD(neg_entropy_grad, grads[1]); FIELD(mean_log_q_grad, grads[2]);
    FIELD(rho_grad, grads[3]); SAME(upstream); SAME(lam); SAME(hard_bias); SAME(label_smoothing); SAME(reduced); SAME(divergence);
    SAME(mean); SAME(kind);
    return -1;
}

// The widest instruction set of this machine among those compiled.
EXPORT const char* largemargin_isa() {
#ifdef LARGEMARGIN_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "baseline";
}

#else

namespace {

constexpr int64_t kBlock = 1024;           // classes summed in float32 before the sum goes to float64
constexpr int64_t kTileBlock = 128;        // the same for tiles
constexpr int64_t kAlignment = 64;          // bytes: a vector across two cache lines costs two accesses
constexpr int64_t kTileClasses = 512;       // classes of a tile; for longer rows the gradient computes e^z again
constexpr int64_t kRows = 128;              // the most rows finished together
constexpr int64_t kLanes = 16;             // loops run over multiples of this many elements, to have no scalar remainder
constexpr int64_t kElementsATask = 4096;   // rows are finished together up to this many elements
constexpr int64_t kElementsAThread = 4096;
constexpr int64_t kHugePages = 8 << 20;    // gradients from this many bytes ask for huge pages
constexpr float kInf = INFINITY;
constexpr int32_t kIgnored = -1, kElsewhere = -2;  // targets that are not an index, as in rowstats.py

// Hot loops are separate functions: compilers leave some loops scalar if they inline or clone them.
#if defined(_MSC_VER)
#define HOT static __declspec(noinline)
#define RESTRICT __restrict
#elif defined(__clang__)
#define HOT __attribute__((noinline)) static
#define RESTRICT __restrict__
#else
#define HOT __attribute__((noinline, noclone)) static
#define RESTRICT __restrict__
#endif

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

struct BFloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline void store(float* to, float x) { *to = x; }
inline void store(BFloat16* to, float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

constexpr float kLow = -87.3365f;  // e^x is a normal number from here up

inline float at_least(float low, float x) { return low > x ? low : x; }  // NaN stays NaN

// e^x for x <= 0, to 0.75 units in the last place. It is 0 below kLow unless the caller wants subnormal numbers; NaN stays NaN.
// e^r = 1 + r + r^2 p(r), with p the Chebyshev fit on |r| <= log(2)/2 (error 8e-9).
template <bool subnormal = false>
inline float exp_(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    float clamped = subnormal ? at_least(-104.0f, x) : x;
    float shifted = clamped * 1.44269504f + magic;
    float n = shifted - magic;
    float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float r2 = r * r;
    float p = (0.001392692661f * r2 + (0.008363773874f * r + 0.04166655011f)) * r2 + (0.1666657338f * r + 0.5f);
    float y = p * r2 + r + 1.0f;
    if (!subnormal) return x < kLow ? 0.0f : y * as_float((as_bits(shifted) << 23) + (127u << 23));
    // 2^n in two factors: one alone is not a normal number
    y = y * as_float((as_bits(shifted) << 23) + (191u << 23)) * as_float(63u << 23);
    return x < -104.0f ? 0.0f : y;
}

// log x for normal x > 0; NaN and +inf give NaN. log m = 2 artanh((m - 1) / (m + 1)), sqrt(1/2) <= m < sqrt(2).
inline float log_(float x) {
    uint32_t bits = as_bits(x) - 0x3f3504f3u;
    float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
    float m = as_float((bits & 0x7fffffu) + 0x3f3504f3u);
    float s = (m - 1.0f) / (m + 1.0f);
    float s2 = s * s;
    float tail = s2 * (0.666666667f + s2 * (0.4f + s2 * (0.285714286f + s2 * 0.222222222f)));
    return n * 0.693359375f + (2.0f * s + (s * tail - n * 2.12194440e-4f)) + (x - x);
}

// softplus(x) = log(1 + e^x) and its derivative
struct Softplus {
    float value, slope;
};

inline Softplus softplus(float x) {
    float t = exp_<true>(x > 0 ? -x : x);
    float u = 1.0f + t;
    float log1p = log_(u) + (t - (u - 1.0f)) / u;
    return {(x > 0 ? x : 0.0f) + log1p, (x > 0 ? 1.0f : t) / u};
}

// z clamped for products with e^z, which is 0 below the clamp, because 0 * inf is NaN.
inline float near(float z) { return at_least(kLow, z); }

// The sums over a set of non-target classes; merge() as in rowstats.py.
struct Record {
    float max;
    double sum_exp, sum_exp_z, sum_z, count, sum_weight, sum_weight_z;
};

inline Record empty_record() { return {-kInf, 0, 0, 0, 0, 0, 0}; }

inline Record merge(const Record& a, const Record& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    float max = a.max > b.max ? a.max : b.max;
    Record sum = {max, 0, 0, 0, 0, 0, 0};
    const Record* parts[] = {&a, &b};
    for (const Record* part : parts) {
        double d = static_cast<double>(part->max) - max, scale = std::exp(d);
        sum.sum_exp += scale * part->sum_exp;
        sum.sum_exp_z += scale * part->sum_exp_z + (scale == 0 ? 0 : scale * d) * part->sum_exp;
        sum.sum_z += part->sum_z + d * part->count;
        sum.count += part->count;
        sum.sum_weight += part->sum_weight;
        sum.sum_weight_z += part->sum_weight_z + d * part->sum_weight;
    }
    return sum;
}

// Rows finished together: the results of gather and the inputs of scatter. Each quantity has its own array, so loops over rows vectorise.
struct Rows {
    int64_t offset[kRows], gradient_offset[kRows];  // in elements
    int32_t y[kRows];     // kIgnored beyond the last row too
    float target_logit[kRows], target_weight[kRows], upstream[kRows];
    float max[kRows];
    double sum_exp[kRows], sum_exp_z[kRows], sum_z[kRows], count[kRows], sum_weight[kRows], sum_weight_z[kRows];
    float inv_sum_exp[kRows], mean_z[kRows], inv_count[kRows];
    float g_e[kRows], g_q[kRows], g_a[kRows], dense[kRows], on_target[kRows], at_max[kRows];
    int32_t live[kRows];  // if 0, the gradient is 0 except for on_target
    float losses[kRows];
    int64_t size, first;  // the rows [first, first + size)

    Record record(int64_t p) const {
        return {max[p], sum_exp[p], sum_exp_z[p], sum_z[p], count[p], sum_weight[p], sum_weight_z[p]};
    }

    void set_record(int64_t p, const Record& record) {
        max[p] = record.max;
        sum_exp[p] = record.sum_exp;
        sum_exp_z[p] = record.sum_exp_z;
        sum_z[p] = record.sum_z;
        count[p] = record.count;
        sum_weight[p] = record.sum_weight;
        sum_weight_z[p] = record.sum_weight_z;
    }
};

// The statistics of a row from its record, as finish() in rowstats.py.
struct Stats {
    float log_odds, mean_q_z, mean_u_z, rho, inv_sum_exp, inv_count;
};

inline Stats statistics(const Rows& rows, int64_t p) {
    const bool alone = rows.count[p] == 0;
    const double sum_exp = alone ? 1.0 : rows.sum_exp[p], inv_sum_exp = 1.0 / sum_exp, inv_count = 1.0 / (alone ? 1.0 : rows.count[p]);
    const float f_y = rows.target_logit[p], rho = log_(static_cast<float>(sum_exp));
    float l = (f_y - rows.max[p]) - rho;
    l = alone ? (f_y - f_y) + kInf : l;  // certain, unless the target is itself -inf, +inf or NaN
    l = f_y == kInf ? NAN : l;
    return {l,
            static_cast<float>(rows.sum_exp_z[p] * inv_sum_exp),
            static_cast<float>(rows.sum_z[p] * inv_count),
            rho,
            static_cast<float>(inv_sum_exp),
            static_cast<float>(inv_count)};
}

// One element of the gradient, off the target.
inline float element(float f, float q, float z, float mean_z, float g_e, float g_q, float g_a, float inv_count, float dense) {
    float sparse = q * (g_e * (near(z) - mean_z) + g_q);
    // g_a is not added to g_q first: with one non-target class its term is exactly 0
    float uniform = g_a * (inv_count - q) - dense;
    return f == -kInf ? 0.0f : sparse + uniform;
}

struct Options {
    float lam, lam_e, lam_a, lam_log_count;  // lam * divergence = lam_e e + lam_a a + lam_log_count log K
    float hard_bias, keep, smoothing;        // keep = 1 - smoothing
    bool weighted_smoothing;
};

// The statistics of a few rows.
void finish_statistics(const Job& job, const Rows& rows) {
    const int64_t num_rows = job.outer * job.inner;
    for (int64_t p = 0; p < rows.size; ++p) {
        const int64_t row = rows.first + p;
        const bool kept = rows.y[p] != kIgnored;
        const Stats s = statistics(rows, p);
        const float fields[6] = {s.log_odds,
                                 s.mean_q_z - s.rho,
                                 s.mean_u_z - s.rho,
                                 s.rho,
                                 s.mean_q_z - s.mean_u_z,
                                 static_cast<float>(rows.count[p])};
        for (int64_t i = 0; i < 6; ++i) job.stats[i][row] = kept ? fields[i] : 0.0f;
        job.state[row] = rows.max[p];
        job.state[num_rows + row] = static_cast<float>(rows.sum_exp[p]);
        job.state[2 * num_rows + row] = s.mean_q_z;
    }
}

// The losses of a few rows and the coefficients of their gradients.
HOT void finish_losses(const Options& options, Rows& rows) {
    const float hard_bias = options.hard_bias, keep = options.keep, smoothing = options.smoothing;
    const float lam = options.lam, lam_e = options.lam_e, lam_a = options.lam_a, lam_log_count = options.lam_log_count;
    const bool weighted_smoothing = options.weighted_smoothing;
    const int64_t lanes = padded(rows.size);
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
        const bool kept = rows.y[p] >= 0, alone = rows.count[p] == 0;
        const Stats stats = statistics(rows, p);
        const float l = stats.log_odds, rho = stats.rho, count = static_cast<float>(rows.count[p]);
        const float w_y = rows.target_weight[p], s = rows.upstream[p];
        const Softplus hard = softplus(hard_bias - l);
        // a smoothing of 1 drops the first term, but a masked target stays infinite
        const float kept_share = keep > 0 ? keep : (hard.value < kInf ? 0.0f : 1.0f);
        float loss = kept_share > 0 ? kept_share * hard.value : 0.0f;
        // lam_e e + lam_a a + lam_log_count log K; if e and a both count, their common log S is left out
        const float e_term = lam_e != 0 ? lam_e * (stats.mean_q_z - rho) : 0.0f, a_term = lam_a != 0 ? lam_a * (stats.mean_u_z - rho) : 0.0f;
        const float mean_z = lam_a == -lam_e ? lam_e * (stats.mean_q_z - stats.mean_u_z) : e_term + a_term;
        const float log_count = log_(alone ? 1.0f : count);
        loss = lam > 0 ? loss + (mean_z + lam_log_count * log_count) : loss;
        loss *= w_y;
        const float g_l = -s * w_y * kept_share * hard.slope;
        float g_q = -g_l, on_target = g_l, dense = 0.0f;
        if (smoothing > 0) {
            const Softplus off = softplus(l), on = softplus(-l);
            const bool masked = rows.target_logit[p] == -kInf;  // then y is not a class of the row
            const float w_n = static_cast<float>(rows.sum_weight[p]), w_z = static_cast<float>(rows.sum_weight_z[p]);
            const float w_t = masked ? 0.0f : (weighted_smoothing ? w_y : 1.0f);
            const float each = smoothing / (count + (masked ? 0.0f : 1.0f));
            const float off_target = alone ? 0.0f : w_n * (off.value + rho) - w_z;
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
        rows.g_e[p] = lam_e != 0 ? s * w_y * lam_e : 0.0f;  // avoids inf * 0
        rows.g_a[p] = lam_a != 0 ? s * w_y * lam_a : 0.0f;
        rows.g_q[p] = g_q;
        rows.dense[p] = dense;
        rows.on_target[p] = kept ? on_target : 0.0f;
        rows.at_max[p] = 0.0f;
        rows.live[p] = kept && !alone ? 1 : 0;
    }
}

double finish(const Job& job, const Options& options, double upstream, Rows& rows) {
    if (job.kind == STATISTICS) {
        finish_statistics(job, rows);
        return 0;
    }
    for (int64_t p = 0; p < rows.size; ++p) rows.upstream[p] = job.row_upstream ? job.row_upstream[rows.first + p] : static_cast<float>(upstream);
    finish_losses(options, rows);
    double sum = 0;
    for (int64_t p = 0; p < rows.size; ++p) sum += rows.losses[p];
    if (job.losses) std::memcpy(job.losses + rows.first, rows.losses, static_cast<size_t>(rows.size) * sizeof(float));
    return sum;
}

// The gradient at c* with a gradient of rho: its terms q g_rho and -g_rho nearly cancel if q is close to 1.
inline float at_first_max(const Rows& rows, int64_t p) {
    const float q = rows.inv_sum_exp[p];
    return element(rows.max[p], q, 0.0f, rows.mean_z[p], rows.g_e[p], -rows.on_target[p], rows.g_a[p], rows.inv_count[p], 0.0f) +
           rows.at_max[p] * (q - 1.0f);
}

// The coefficients of the gradient from the saved state and the upstream gradients of the statistics.
void resume(const Job& job, Rows& rows) {
    const int64_t stride = job.outer * job.inner;
    for (int64_t p = 0; p < rows.size; ++p) {
        const int64_t row = rows.first + p;
        const float count = job.stats[5][row];
        float g[4];
        for (int64_t i = 0; i < 4; ++i) g[i] = job.grads[i] ? job.grads[i][row] : 0.0f;
        rows.max[p] = job.state[row];
        rows.inv_sum_exp[p] = 1.0f / job.state[stride + row];
        rows.mean_z[p] = job.state[2 * stride + row];
        rows.inv_count[p] = 1.0f / (count > 0 ? count : 1.0f);
        rows.g_e[p] = g[1];
        rows.g_q[p] = g[3] - g[0];
        rows.g_a[p] = g[2];
        rows.dense[p] = 0.0f;
        rows.at_max[p] = g[3];
        rows.live[p] = rows.y[p] != kIgnored && count > 0;
        rows.on_target[p] = rows.y[p] != kIgnored ? g[0] * (count > 0 ? 1.0f : 0.0f) : 0.0f;  // NaN stays NaN
    }
}

struct Scratch {
    float* exp_z;      // e^z of the current rows, relative to the maximum of each block
    float* block;      // the logits of one block or tile, the target masked
    float* block_max;  // the maximum of every block of the current rows
    const float* weight;  // of the classes, padded
};

// ---- rows whose classes are neighbours in memory

// The records of `num_blocks` consecutive blocks of `lanes` classes in x; w, if given, holds the weights of all of them.
HOT void gather_blocks(const float* RESTRICT x, const float* RESTRICT w, float* RESTRICT exp_z, int64_t num_blocks, int64_t lanes,
                       Record* RESTRICT records) {
    for (int64_t i = 0; i < num_blocks; ++i) {  // a separate loop, so that the sums of a block need not wait for its maximum
        float max = -kInf;                      // skips NaN, which makes every sum below NaN
#pragma omp simd reduction(max : max)
        for (int64_t c = 0; c < lanes; ++c) max = x[i * lanes + c] > max ? x[i * lanes + c] : max;
        records[i].max = max;
    }
    for (int64_t i = 0; i < num_blocks; ++i, x += lanes, exp_z += lanes) {
        const float max = records[i].max, shift = max == -kInf ? 0.0f : max;
        float s = 0, t = 0, a = 0, k = 0;
#pragma omp simd reduction(+ : s, t, a, k)
        for (int64_t c = 0; c < lanes; ++c) {
            const float z = x[c] - shift, near_z = near(z);
            const bool present = x[c] != -kInf;
            const float e = exp_(z);
            exp_z[c] = e;
            s += e;
            t += e * near_z;
            a += present ? z : 0.0f;
            k += present ? 1.0f : 0.0f;
        }
        records[i] = {max, s, t, a, k, k, a};
        if (!w) continue;
        float b = 0, bz = 0;
#pragma omp simd reduction(+ : b, bz)
        for (int64_t c = 0; c < lanes; ++c) {
            const float weight = x[c] == -kInf ? 0.0f : w[c], z = x[c] == -kInf ? 0.0f : x[c] - shift;
            b += weight;
            bz += weight * z;
        }
        records[i].sum_weight = b;
        records[i].sum_weight_z = bz;
    }
}

// The n logits of a block, the target masked, padded with absent classes.
template <class T>
HOT void load_block(const T* RESTRICT from, int64_t n, int64_t target, float* RESTRICT to) {
    const int64_t whole = n / kLanes * kLanes;
#pragma omp simd
    for (int64_t c = 0; c < whole; ++c) to[c] = load(from[c]);
    for (int64_t c = whole; c < n; ++c) to[c] = load(from[c]);
    for (int64_t c = n; c < padded(n); ++c) to[c] = -kInf;
    if (target >= 0 && target < n) to[target] = -kInf;
}

template <class T, bool have_exp, bool weighted>
HOT void scatter_lanes(const Rows& rows, int64_t p, const T* f, const float* exp_z, const float* w, float scale, int64_t lanes, T* gradient) {
    const float max = rows.max[p], mean_z = rows.mean_z[p], inv_count = rows.inv_count[p];
    const float g_e = rows.g_e[p], g_q = rows.g_q[p], g_a = rows.g_a[p], dense = rows.dense[p];
    lanes = padded(lanes);
#pragma omp simd  // f and gradient may be the same memory: the loop reads element c before it writes it
    for (int64_t c = 0; c < lanes; ++c) {
        const float x = load(f[c]), z = x - max, q = (have_exp ? exp_z[c] : exp_(z)) * scale;
        store(gradient + c, element(x, q, z, mean_z, g_e, g_q, g_a, inv_count, weighted ? dense * w[c] : dense));
    }
}

template <class T>
void scatter_block(const Rows& rows, int64_t p, const T* f, const float* exp_z, const float* w, float scale, int64_t lanes, T* gradient) {
    if (!exp_z) scatter_lanes<T, false, false>(rows, p, f, exp_z, w, scale, lanes, gradient);
    else if (!w) scatter_lanes<T, true, false>(rows, p, f, exp_z, w, scale, lanes, gradient);
    else scatter_lanes<T, true, true>(rows, p, f, exp_z, w, scale, lanes, gradient);
}

template <class T>
void scatter_row(const Rows& rows, int64_t p, const T* f, const float* w, int64_t num_classes, const float* exp_z, const float* block_max,
                 T* gradient) {
    const int64_t y = rows.y[p];
    if (!rows.live[p]) {
        for (int64_t c = 0; c < num_classes; ++c) store(gradient + c, 0.0f);
        if (y >= 0) store(gradient + y, rows.on_target[p]);
        return;
    }
    for (int64_t from = 0; from < num_classes; from += kBlock) {
        const int64_t n = num_classes - from < kBlock ? num_classes - from : kBlock, whole = n / kLanes * kLanes, rest = n - whole;
        float scale = rows.inv_sum_exp[p];
        if (exp_z && block_max[from / kBlock] != rows.max[p]) scale *= std::exp(block_max[from / kBlock] - rows.max[p]);
        const float *e = exp_z ? exp_z + from : nullptr, *v = w ? w + from : nullptr;
        scatter_block(rows, p, f + from, e, v, scale, whole, gradient + from);
        if (rest == 0) continue;
        T some[kLanes] = {}, values[kLanes];
        std::memcpy(some, f + from + whole, static_cast<size_t>(rest) * sizeof(T));
        scatter_block(rows, p, some, e ? e + whole : nullptr, v ? v + whole : nullptr, scale, kLanes, values);
        std::memcpy(gradient + from + whole, values, static_cast<size_t>(rest) * sizeof(T));
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

template <class T>
double run_rows(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const int64_t num_classes = job.num_classes, lanes = padded(num_classes), num_blocks = (num_classes + kBlock - 1) / kBlock;
    const T* logits = static_cast<const T*>(job.logits);
    T* gradient = static_cast<T*>(job.gradient);
    const float* w = options.weighted_smoothing ? scratch.weight : nullptr;
    const bool gather = job.kind != STATISTICS_GRADIENT;
    Record records[kRows];
    double sum = 0;
    for (int64_t p = 0; gather && p < rows.size; ++p) {
        const int64_t y = rows.y[p];
        const T* f = logits + rows.offset[p];
        if (y >= 0) rows.target_logit[p] = load(f[y]);
        if (num_blocks <= 1) {  // loads a few short rows first, and gathers them together
            load_block(f, num_classes, y, scratch.block + p * lanes);
            continue;
        }
        Record record = empty_record();
        for (int64_t from = 0; y != kIgnored && from < num_classes; from += kBlock) {
            const int64_t n = num_classes - from < kBlock ? num_classes - from : kBlock;
            load_block(f + from, n, y - from, scratch.block);
            gather_blocks(scratch.block, w ? w + from : nullptr, scratch.exp_z + (gradient ? p * lanes + from : 0), 1, padded(n), records);
            scratch.block_max[p * num_blocks + from / kBlock] = records[0].max;
            record = merge(record, records[0]);
        }
        rows.set_record(p, record);
    }
    if (gather && num_blocks <= 1) {
        gather_blocks(scratch.block, w, scratch.exp_z, rows.size, lanes, records);
        for (int64_t p = 0; p < rows.size; ++p) {
            rows.set_record(p, records[p]);
            scratch.block_max[p] = records[p].max;
        }
    }
    if (gather) sum = finish(job, options, upstream, rows);
    else resume(job, rows);
    for (int64_t p = 0; gradient && p < rows.size; ++p) {
        const T* f = logits + rows.offset[p];
        T* g = gradient + rows.gradient_offset[p];
        scatter_row(rows, p, f, w, num_classes, gather ? scratch.exp_z + p * lanes : nullptr, scratch.block_max + p * num_blocks, g);
    }
    return sum;
}

// ---- any other strides, such as (N, C, d1, ...): a tile (class, row) of up to kRows rows

// The logits of a tile from class `first` on, the targets masked, and the maximum of each row; rows beyond the last have no class.
template <class T>
HOT void load_tile(const T* from, const int64_t* strides, const Rows& rows, int64_t first, int64_t num_classes, float* RESTRICT tile,
                   float* RESTRICT max) {
    const int64_t lanes = padded(rows.size);
    for (int64_t p = 0; p < lanes; ++p) max[p] = -kInf;
    for (int64_t c = first; c < first + num_classes; ++c, from += strides[2], tile += lanes) {
        if (strides[1] == 1 && rows.size == lanes) {
#pragma omp simd
            for (int64_t p = 0; p < lanes; ++p) tile[p] = load(from[p]);
        } else {
            for (int64_t p = 0; p < lanes; ++p) tile[p] = p < rows.size ? load(from[p * strides[1]]) : -kInf;
        }
#pragma omp simd
        for (int64_t p = 0; p < lanes; ++p) {
            const float x = rows.y[p] == static_cast<int32_t>(c) ? -kInf : tile[p];
            tile[p] = x;
            max[p] = x > max[p] ? x : max[p];
        }
    }
}

struct alignas(kAlignment) TileSums {
    float sum_exp[kRows], sum_exp_z[kRows], sum_z[kRows], count[kRows], sum_weight[kRows], sum_weight_z[kRows];
};

// The sums over a few classes of a tile.
HOT void gather_tile(const float* RESTRICT tile, const float* RESTRICT shift, const float* RESTRICT w, int64_t lanes, int64_t num_classes,
                     float* RESTRICT exp_z, int64_t exp_stride, TileSums* RESTRICT sums) {
    *sums = {};
    float *RESTRICT sum_exp = sums->sum_exp, *RESTRICT sum_exp_z = sums->sum_exp_z, *RESTRICT sum_z = sums->sum_z;
    float *RESTRICT count = sums->count, *RESTRICT sum_weight = sums->sum_weight, *RESTRICT sum_weight_z = sums->sum_weight_z;
    for (int64_t c = 0; c < num_classes; ++c, tile += lanes, exp_z += exp_stride) {
#pragma omp simd
        for (int64_t p = 0; p < lanes; ++p) {
            const float x = tile[p], z = x - shift[p], near_z = near(z), e = exp_(z);
            const float present = x == -kInf ? 0.0f : 1.0f, present_z = x == -kInf ? 0.0f : z;
            exp_z[p] = e;
            sum_exp[p] += e;
            sum_exp_z[p] += e * near_z;
            sum_z[p] += present_z;
            count[p] += present;
        }
        if (!w) continue;
#pragma omp simd
        for (int64_t p = 0; p < lanes; ++p) {
            const float weight = tile[p] == -kInf ? 0.0f : w[c], z = tile[p] == -kInf ? 0.0f : tile[p] - shift[p];
            sum_weight[p] += weight;
            sum_weight_z[p] += weight * z;
        }
    }
}

// The gradient of a tile.
template <class T, bool have_exp>
HOT void scatter_tile(const float* RESTRICT tile, const float* RESTRICT exp_z, const float* w, int64_t first, int64_t num_classes,
                      Rows& rows, const int64_t* strides, T* to) {
    const int64_t lanes = padded(rows.size);
    for (int64_t c = first; c < first + num_classes; ++c, to += strides[2], tile += lanes, exp_z += have_exp ? lanes : 0) {
        const float weight = w ? w[c] : 1.0f;
        alignas(kAlignment) float values[kRows];
#pragma omp simd
        for (int64_t p = 0; p < lanes; ++p) {
            const float x = tile[p], z = x - rows.max[p];
            const float q = (have_exp ? exp_z[p] : exp_(z)) * rows.inv_sum_exp[p];
            const float value =
                element(x, q, z, rows.mean_z[p], rows.g_e[p], rows.g_q[p], rows.g_a[p], rows.inv_count[p], rows.dense[p] * weight);
            values[p] = rows.y[p] == static_cast<int32_t>(c) ? rows.on_target[p] : (rows.live[p] ? value : 0.0f);
        }
        if (!have_exp) {  // the first class with the maximum gets the gradient of rho
            for (int64_t p = 0; p < lanes; ++p) {
                if (rows.at_max[p] == 0.0f || !rows.live[p] || tile[p] != rows.max[p]) continue;
                values[p] = at_first_max(rows, p);
                rows.at_max[p] = 0.0f;
            }
        }
        if (strides[1] == 1 && rows.size == lanes) {
#pragma omp simd
            for (int64_t p = 0; p < lanes; ++p) store(to + p, values[p]);
        } else {
            for (int64_t p = 0; p < rows.size; ++p) store(to + p * strides[1], values[p]);
        }
    }
}

// The records of the rows of a tile of a few classes from `from` on; exp_z is kept if it has a stride.
void gather_records(const float* tile, const float* max, const float* w, int64_t lanes, int64_t num_classes, float* exp_z,
                    int64_t exp_stride, Record* records) {
    alignas(kAlignment) float shift[kRows];
    for (int64_t p = 0; p < lanes; ++p) {
        shift[p] = max[p] == -kInf ? 0.0f : max[p];
        records[p] = {max[p], 0, 0, 0, 0, 0, 0};
    }
    for (int64_t from = 0; from < num_classes; from += kTileBlock) {
        const int64_t n = num_classes - from < kTileBlock ? num_classes - from : kTileBlock;
        TileSums sums;
        gather_tile(tile + from * lanes, shift, w ? w + from : nullptr, lanes, n, exp_z + from * exp_stride, exp_stride, &sums);
        const float* weight_sum = w ? sums.sum_weight : sums.count;
        const float* weight_sum_z = w ? sums.sum_weight_z : sums.sum_z;
        for (int64_t p = 0; p < lanes; ++p) {
            records[p].sum_exp += sums.sum_exp[p];
            records[p].sum_exp_z += sums.sum_exp_z[p];
            records[p].sum_z += sums.sum_z[p];
            records[p].count += sums.count[p];
            records[p].sum_weight += weight_sum[p];
            records[p].sum_weight_z += weight_sum_z[p];
        }
    }
}

template <class T>
double run_tile(const Job& job, const Options& options, double upstream, Rows& rows, Scratch& scratch) {
    const int64_t num_classes = job.num_classes, row_stride = job.logits_strides[1], class_stride = job.logits_strides[2];
    const T* f = static_cast<const T*>(job.logits) + rows.offset[0];
    T* g = static_cast<T*>(job.gradient) + (job.gradient ? rows.gradient_offset[0] : 0);
    const float* w = options.weighted_smoothing ? scratch.weight : nullptr;
    const bool gather = job.kind != STATISTICS_GRADIENT, whole = num_classes <= kTileClasses, keep_exp = gather && g && whole;
    const int64_t lanes = padded(rows.size);
    alignas(kAlignment) float max[kRows];
    Record records[kRows];
    double sum = 0;
    for (int64_t p = 0; p < rows.size; ++p)
        if (rows.y[p] >= 0) rows.target_logit[p] = load(f[p * row_stride + rows.y[p] * class_stride]);
    for (int64_t from = 0; gather && from < num_classes; from += kTileClasses) {
        const int64_t n = num_classes - from < kTileClasses ? num_classes - from : kTileClasses;
        load_tile(f + from * class_stride, job.logits_strides, rows, from, n, scratch.block, max);
        gather_records(scratch.block, max, w ? w + from : nullptr, lanes, n, scratch.exp_z, keep_exp ? lanes : 0, records);
        for (int64_t p = 0; p < lanes; ++p) rows.set_record(p, from == 0 ? records[p] : merge(rows.record(p), records[p]));
    }
    if (gather) sum = finish(job, options, upstream, rows);
    else resume(job, rows);
    for (int64_t from = 0; g && from < num_classes; from += kTileClasses) {
        const int64_t n = num_classes - from < kTileClasses ? num_classes - from : kTileClasses;
        if (!gather || !whole) load_tile(f + from * class_stride, job.logits_strides, rows, from, n, scratch.block, max);
        T* to = g + from * job.gradient_strides[2];
        if (keep_exp) scatter_tile<T, true>(scratch.block, scratch.exp_z, w, from, n, rows, job.gradient_strides, to);
        else scatter_tile<T, false>(scratch.block, scratch.exp_z, w, from, n, rows, job.gradient_strides, to);
    }
    return sum;
}

// ---- the whole job

#define CONCATENATE_(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_(a, b)

template <class T>
int64_t run(const Job& job) {
    const int64_t num_rows = job.outer * job.inner, num_classes = job.num_classes;
    double total_weight = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t y = job.target[row];
        if (y == job.ignore_index || (y == kElsewhere && job.kind != LOSS)) continue;
        if (y < 0 || y >= num_classes) return row;
        total_weight += job.weight ? job.weight[y] : 1.0f;
    }
    Options options = {};
    if (job.kind == LOSS) {
        const float lam = static_cast<float>(job.lam);
        options.lam = lam;
        options.lam_log_count = job.divergence == KL_QU ? lam : job.divergence == KL_UQ ? -lam : 0.0f;
        options.lam_e = job.divergence == SYMMETRIC ? lam / 2 : job.divergence == KL_QU ? lam : 0.0f;
        options.lam_a = job.divergence == SYMMETRIC ? -lam / 2 : job.divergence == KL_UQ ? -lam : 0.0f;
        options.hard_bias = static_cast<float>(job.hard_bias);
        options.keep = static_cast<float>(1 - job.label_smoothing);
        options.smoothing = static_cast<float>(job.label_smoothing);
        options.weighted_smoothing = job.weight && job.label_smoothing > 0;
    }
    const double upstream = job.mean ? job.upstream / total_weight : job.upstream;

    const bool tiled = !(job.logits_strides[2] == 1 && (!job.gradient || job.gradient_strides[2] == 1));
    int64_t rows_a_task = kRows < job.inner ? kRows : job.inner < 1 ? 1 : job.inner;
    if (!tiled) {
        rows_a_task = kElementsATask / (num_classes > 0 ? num_classes : 1);
        rows_a_task = rows_a_task < 1 ? 1 : rows_a_task > kRows ? kRows : rows_a_task;
        if (rows_a_task > kLanes) rows_a_task = rows_a_task / kLanes * kLanes;
    }
    // a tile lies within one outer row
    const int64_t span = tiled ? job.inner : num_rows, tasks_a_span = (span + rows_a_task - 1) / rows_a_task;
    const int64_t num_tasks = (tiled ? job.outer : 1) * tasks_a_span;
    int64_t num_threads = num_rows * num_classes / kElementsAThread;
    num_threads = num_threads < 1 ? 1 : num_threads > job.num_threads ? job.num_threads : num_threads;
    num_threads = num_threads > num_tasks ? num_tasks : num_threads;
    num_threads = num_threads < 1 ? 1 : num_threads;

    const int64_t lanes = padded(num_classes), num_blocks = (num_classes + kBlock - 1) / kBlock;
    const int64_t tile_classes = num_classes < kTileClasses ? num_classes : kTileClasses;
    const int64_t row_length = tiled ? padded(rows_a_task) * tile_classes : rows_a_task * lanes;
    const int64_t block_size = tiled || num_blocks <= 1 ? row_length : kBlock;
    const int64_t exp_size = job.gradient ? row_length : (block_size > kRows ? block_size : kRows);  // all multiples of kLanes
    const int64_t max_size = tiled ? 0 : rows_a_task * num_blocks, weight_size = options.weighted_smoothing ? lanes : 0;
    const int64_t scratch_size = exp_size + block_size + padded(max_size) + padded(sizeof(Rows) / sizeof(float) + 1);
    double* sums = static_cast<double*>(std::calloc(static_cast<size_t>(num_tasks + 1), sizeof(double)));
    void* allocated = std::malloc(static_cast<size_t>(num_threads * scratch_size + weight_size) * sizeof(float) + kAlignment);
    if (!sums || !allocated) {
        std::free(sums);
        std::free(allocated);
        return -2;
    }
    float* memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(allocated) + kAlignment - 1) / kAlignment * kAlignment);
    float* weight = memory + num_threads * scratch_size;
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
        float* mine = memory + thread * scratch_size;
        Scratch scratch = {mine, mine + exp_size, mine + exp_size + block_size, weight};
        // in the scratch too, where it is aligned; aligning it on the stack costs more than it saves
        Rows& rows = *reinterpret_cast<Rows*>(mine + exp_size + block_size + padded(max_size));
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
            }
            for (int64_t p = 0; p < padded(rows.size); ++p) {
                const int64_t y = p < rows.size ? job.target[rows.first + p] : job.ignore_index;
                rows.y[p] = y == job.ignore_index ? kIgnored : static_cast<int32_t>(y);
                rows.target_logit[p] = rows.upstream[p] = rows.at_max[p] = 0;
                rows.live[p] = 0;
                rows.target_weight[p] = job.weight && rows.y[p] >= 0 ? job.weight[y] : 1.0f;
                rows.set_record(p, empty_record());
            }
            sums[task] = tiled ? run_tile<T>(job, options, upstream, rows, scratch) : run_rows<T>(job, options, upstream, rows, scratch);
        }
    }
    double sum = 0;  // in the order of the rows, for any number of threads
    for (int64_t task = 0; task < num_tasks; ++task) sum += sums[task];
    if (job.reduced) *job.reduced = static_cast<float>(job.mean ? sum / total_weight : sum);
    std::free(sums);
    std::free(allocated);
    return -1;
}

}  // namespace

// Returns -1 for success, -2 without memory, or else the first row whose label is out of range (nothing was written).
EXPORT int64_t CONCATENATE(largemargin_run_, LARGEMARGIN_ISA)(const Job* job) { return job->is_bfloat16 ? run<BFloat16>(*job) : run<float>(*job); }

#endif
