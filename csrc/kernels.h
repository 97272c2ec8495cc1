// The loops over one row (vocabulary or embedding), as a table with one entry per loop: one table per instruction set.
#ifndef SJD2_KERNELS_H
#define SJD2_KERNELS_H

#include <stdint.h>

namespace sjd2 {

// Elements that a loop takes at a time: 16 Philox counters. Scratch rows are padded to a multiple of it.
constexpr int64_t BLOCK = 64;

inline int64_t padded_to_block(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

// What keys the random numbers of a row.
struct Key {
    uint64_t seed;
    uint32_t position, iteration, purpose;
};

// One slot of sample_window. `uncond`, `noise` and `p` may be null; x and e: scratch of padded_to_block(vocab).
struct SampleRow {
    const void *cond, *uncond;
    const float *noise;
    float *p, *x, *e;
    Key key;
    int64_t type, vocab, begin, end, top_k;
    float guidance, temperature, top_p;
};

struct Sampled {
    int64_t token;
    bool bad;
};

// A run of dimensions [begin, end) of one embedding, and the statistics of the space.
struct Dims {
    int64_t begin, end;
    const float *mean, *std;
    int64_t type;
};

struct Best {
    float value;
    int32_t index;
};

constexpr int NEAREST_TILE = 4;

struct Kernels {
    const char *name;
    Sampled (*sample_row)(const SampleRow &row);
    // A draw from max(p - q, 0), or from p where that is nothing.
    int64_t (*residual)(const float *p, const float *q, int64_t vocab, Key key);
    // Random numbers of one row: sjd2_random's distributions.
    void (*random_row)(Key key, int64_t distribution, int64_t count, float *out);
    // out = std * e + mean, in the type of the model.
    void (*denormalize)(Dims dims, const float *e, void *out);
    // out = (x - mean) / std, noised to time t where `noisy`; f32, or with `denormalize` back in model space.
    void (*perturb)(Dims dims, const void *x, bool noisy, float t, Key key, bool denormalize, void *out);
    // out = r e + (1 - r) (row - mean) / std. `out` may be e or lie before it.
    void (*denoise)(Dims dims, const void *row, const float *e, float r, float *out);
    // Standard normal numbers of the dimensions [begin, end); begin is a multiple of BLOCK.
    void (*fresh)(Dims dims, Key key, float *out);
    // best[i]: kept, or the first of these rows [count, dim] whose product with embeddings[i] is larger; i < tile.
    // `number` is the index of the first row.
    void (*nearest)(const float *rows, int64_t count, int64_t dim, int32_t number, const float *const *embeddings,
                    int tile, Best *best);
};

// The table for this processor.
const Kernels &kernels();

}  // namespace sjd2
#endif
