// A block of Philox on x86, where compilers find no use for the 32 x 32 -> 64 bit multiplication by themselves.
// Included once per instruction set, after core.h: no include guard. SJD2_WIDTH is the vector width in bits, or 0.

namespace sjd2 {
namespace SJD2_ISA {

#if SJD2_WIDTH

#if SJD2_WIDTH == 512
#define SJD2_OP(op) _mm512_##op
#define SJD2_BITS(op) _mm512_##op##_si512
typedef __m512i Counters;
SJD2_FN Counters all(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
SJD2_FN Counters first_counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
#elif SJD2_WIDTH == 256
#define SJD2_OP(op) _mm256_##op
#define SJD2_BITS(op) _mm256_##op##_si256
typedef __m256i Counters;
SJD2_FN Counters all(uint64_t x) { return _mm256_set1_epi64x((int64_t)x); }
SJD2_FN Counters first_counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }
#else
#define SJD2_OP(op) _mm_##op
#define SJD2_BITS(op) _mm_##op##_si128
typedef __m128i Counters;
SJD2_FN Counters all(uint64_t x) { return _mm_set1_epi64x((int64_t)x); }
SJD2_FN Counters first_counters() { return _mm_set_epi64x(1, 0); }
#endif

// Two words of each counter side by side.
SJD2_FN Counters pair(Counters low, Counters high) {
    return SJD2_BITS(or)(SJD2_BITS(and)(low, all(0xffffffffu)), SJD2_OP(slli_epi64)(high, 32));
}

// Words of the counters 16 block … 16 block + 15: out[4 c + w] is word w of counter c.
//
// A counter has 64 bits for each of its words; what gathers in the upper halves is never looked at. The counters
// are dealt such that interleaving two vectors of word pairs puts them in order.
SJD2_FN void philox_block(Key key, int64_t block, uint32_t *out) {
    constexpr int COUNTERS = SJD2_WIDTH / 64;
    const Counters m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
    for (int part = 0; part < BLOCK / 4 / COUNTERS; ++part) {
        const uint64_t number = (uint64_t)block * (BLOCK / 4) + (uint64_t)(part * COUNTERS);
        uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
        Counters c0 = SJD2_OP(add_epi64)(first_counters(), all(number));
        Counters c1 = all(key.position), c2 = all(key.iteration), c3 = all(key.purpose);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const Counters a = SJD2_OP(mul_epu32)(c0, m0), b = SJD2_OP(mul_epu32)(c2, m1);
            c0 = SJD2_BITS(xor)(SJD2_BITS(xor)(SJD2_OP(srli_epi64)(b, 32), c1), all(k0));
            c2 = SJD2_BITS(xor)(SJD2_BITS(xor)(SJD2_OP(srli_epi64)(a, 32), c3), all(k1));
            c1 = b;
            c3 = a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const Counters front = pair(c0, c1), back = pair(c2, c3);
        Counters *place = (Counters *)(out + part * COUNTERS * 4);
        SJD2_BITS(storeu)(place, SJD2_OP(unpacklo_epi64)(front, back));
        SJD2_BITS(storeu)(place + 1, SJD2_OP(unpackhi_epi64)(front, back));
    }
}

#undef SJD2_OP
#undef SJD2_BITS

#else

SJD2_FN void philox_block(Key key, int64_t block, uint32_t *out) {
    constexpr int COUNTERS = BLOCK / 4;
    uint32_t words[4][COUNTERS];
    for (int c = 0; c < COUNTERS; ++c) {
        const uint32_t counter = (uint32_t)block * COUNTERS + (uint32_t)c;
        const Words random = philox(key.seed, counter, key.position, key.iteration, key.purpose);
        for (int w = 0; w < 4; ++w) words[w][c] = random.w[w];
    }
    for (int c = 0; c < COUNTERS; ++c)
        for (int w = 0; w < 4; ++w) out[4 * c + w] = words[w][c];
}

#endif

}  // namespace SJD2_ISA
}  // namespace sjd2
