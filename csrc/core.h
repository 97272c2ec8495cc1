/* The arithmetic of one element, for host and device: random numbers, logarithm, exponential, half precision.
 *
 * Plain scalar code without branches, so that a compiler can vectorise any loop around it. Nothing here may be
 * contracted into fused multiply-adds (-ffp-contract=off): then every instruction set gives the same bits.
 *
 * cpu.cpp includes this file once per instruction set, each time with another SJD2_ISA as the namespace; that is
 * why there is no include guard.
 */
#include <stdint.h>
#include <string.h>

#ifndef SJD2_ISA
#define SJD2_ISA scalar
#endif

#ifndef SJD2_FN
#ifdef __CUDACC__
#define SJD2_FN __host__ __device__ __forceinline__
#else
#define SJD2_FN inline __attribute__((always_inline))
#endif
#endif

namespace sjd2 {
namespace SJD2_ISA {

/* What keys a draw: counter word 3 of Philox. */
enum Purpose : uint32_t { SAMPLE = 0, ACCEPT = 1, RESIDUAL = 2, NOISE = 3, INIT = 4 };

SJD2_FN uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

SJD2_FN float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* condition ? yes : no by bit masks: a branch here would keep compilers from vectorising the loop around it. */
SJD2_FN uint32_t select(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - (uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

SJD2_FN float select(bool condition, float yes, float no) {
    return float_of(select(condition, bits_of(yes), bits_of(no)));
}

SJD2_FN float infinity() { return float_of(0x7f800000u); }
SJD2_FN float not_a_number() { return float_of(0x7fc00000u); }

/* ------------------------------------------------------------------ random bits */

struct Words {
    uint32_t w[4];
};

/* Philox4x32-10 (Salmon et al., SC 2011) of the counter (c0, c1, c2, c3) under a 64-bit key. */
SJD2_FN Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

/* Float in [0, 1) from 32 random bits, bit for bit Triton's `uint_to_uniform_float`. */
SJD2_FN float uniform_of(uint32_t bits) {
    const int32_t s = (int32_t)bits;
    return (float)(s ^ (s >> 31)) * 4.6566127342e-10f;
}

/* ------------------------------------------------------------------ elementary functions */

/* Natural logarithm of a positive, finite, normal number, at most 1 ulp off: with x = 2^e m and m = 1 + f in
 * [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2/2 + f^3 P(f) for a minimax polynomial P. */
SJD2_FN float log_normal(float x) {
    const uint32_t shifted = bits_of(x) - 0x3f3504f3u; /* the bits of sqrt(1/2) */
    const float e = (float)((int32_t)shifted >> 23);
    const float f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float poly = 0.06746601f;
    poly = poly * f - 0.11675641f;
    poly = poly * f + 0.11888175f;
    poly = poly * f - 0.124055915f;
    poly = poly * f + 0.14219551f;
    poly = poly * f - 0.16667996f;
    poly = poly * f + 0.20002119f;
    poly = poly * f - 0.2500001f;
    poly = poly * f + 0.33333313f;
    const float square = f * f;
    const float tail = f * square * poly + e * -2.12194440e-4f; /* ln 2 = 0.693359375 - 2.1219444e-4 */
    return e * 0.693359375f + (f - (0.5f * square - tail));
}

/* Natural logarithm of anything that is not negative. */
SJD2_FN float log_of(float x) {
    const bool tiny = x < 1.17549435e-38f; /* denormals are scaled into the normal range by 2^25 first */
    const float result = log_normal(x * select(tiny, 33554432.0f, 1.0f)) - select(tiny, 17.3286795f, 0.0f);
    return select(x == 0.0f, -infinity(), select(x == infinity(), x, result));
}

/* exp(x) for x <= 0, at most 2 ulp off; 0 below -87.3, where floats become denormal. */
SJD2_FN float exp_of(float x) {
    const float bounded = select(x > -87.3f, x, -87.3f);
    const float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to an integer */
    const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float poly = 0.0013814538f;
    poly = poly * r + 0.008368745f;
    poly = poly * r + 0.04166839f;
    poly = poly * r + 0.16666521f;
    poly = poly * r + 0.49999994f;
    const float y = 1.0f + (r + r * r * poly);
    const float result = float_of(bits_of(y) + ((uint32_t)(int32_t)n << 23));
    return select(x > -87.3f, result, 0.0f);
}

/* -log1p(-u), a standard exponential, for u in [0, 1); a uniform of exactly 0 counts as 2^-33. */
SJD2_FN float exponential_of(float u) {
    const float v = select(u < 1.16415322e-10f, 1.16415322e-10f, u);
    const float w = 1.0f - v;
    const float lost = (1.0f - w) - v; /* to rounding; 0 for v >= 1/2, and of relevance only where 1/w ~ 1 + v */
    return -(log_normal(w) + lost * (1.0f + v));
}

/* Standard Gumbel noise -log(-log1p(-u)). */
SJD2_FN float gumbel_of(float u) { return -log_normal(exponential_of(u)); }

/* sin and cos of an angle in [0, 2 pi], at most 1e-7 off. */
SJD2_FN void sin_cos(float angle, float *sine, float *cosine) {
    const float n = (angle * 0.636619772f + 12582912.0f) - 12582912.0f; /* quarter turns, 0 … 4 */
    const int32_t quarter = (int32_t)n;
    /* pi/2 in three parts, the first two short enough for an exact product */
    const float r = ((angle - n * 1.5703125f) - n * 4.83751297e-4f) - n * 7.54978995e-8f;
    const float z = r * r;
    const float s = r + r * z * ((-0.00019516976f * z + 0.008332176f) * z - 0.16666655f);
    const float c = 1.0f - (0.5f * z - z * z * ((2.443809e-05f * z - 0.0013887364f) * z + 0.041666646f));
    const bool odd = (quarter & 1) != 0;
    *sine = float_of(bits_of(select(odd, c, s)) ^ ((uint32_t)(quarter & 2) << 30));
    *cosine = float_of(bits_of(select(odd, s, c)) ^ ((uint32_t)((quarter + 1) & 2) << 30));
}

/* Two standard normal numbers from two uniforms (Box-Muller). */
SJD2_FN void normal_pair(float u0, float u1, float *first, float *second) {
    const float radius = __builtin_sqrtf(2.0f * exponential_of(u0));
    float s, c;
    sin_cos(u1 * 6.28318531f, &s, &c);
    *first = radius * c;
    *second = radius * s;
}

/* ------------------------------------------------------------------ half precision, order */

SJD2_FN float float_of_bfloat(uint16_t h) { return float_of((uint32_t)h << 16); }

/* Round to nearest, ties to even; NaN stays NaN. */
SJD2_FN uint16_t bfloat_of_float(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)select(x == x, rounded, 0x7fc0u);
}

/* Exponent and mantissa are moved in place and rescaled by 2^112: exact, also for denormal halves. */
SJD2_FN float float_of_half(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const float value = float_of(magnitude) * 5.19229686e33f;
    const uint32_t finite = bits_of(value);
    const uint32_t special = magnitude | 0x7f800000u; /* infinity, NaN */
    return float_of(select(magnitude >= 0x0f800000u, special, finite) | ((uint32_t)(h & 0x8000u) << 16));
}

/* Round to nearest, ties to even; what is too large becomes infinity. */
SJD2_FN uint16_t half_of_float(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    /* Adding 1/2 leaves the denormal half in the low mantissa bits, rounded by the addition. */
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = select(magnitude < 0x38800000u, denormal, normal); /* 65520 and more rounds to 0x7c00 */
    const uint32_t special = select(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
    return (uint16_t)(select(magnitude >= 0x47800000u, special, finite) | sign);
}

/* An integer that orders as the floats do (not for NaN); its own inverse up to the type. */
SJD2_FN int32_t order_of(float x) {
    const int32_t s = (int32_t)bits_of(x);
    return s ^ ((s >> 31) & 0x7fffffff);
}

SJD2_FN float float_of_order(int32_t key) { return float_of((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

}  // namespace SJD2_ISA
}  // namespace sjd2
