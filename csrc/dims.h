// Loops over the dimensions of one embedding. Included once per instruction set, after rows.h: no include guard.

namespace sjd2 {
namespace SJD2_ISA {

typedef float Vector __attribute__((vector_size(64)));  // 16 floats, in as many registers as that takes

SJD2_FN int64_t block_count(const Dims &dims, int64_t i) { return dims.end - i < BLOCK ? dims.end - i : BLOCK; }

SJD2_FN void store_block(const float *values, int64_t type, int64_t i, int64_t count, void *row) {
    uint16_t narrow[BLOCK];
    if (type == SJD2_FLOAT32) {
        memcpy((float *)row + i, values, sizeof(float) * (size_t)count);
        return;
    }
    if (type == SJD2_BFLOAT16)
        for (int k = 0; k < BLOCK; ++k) narrow[k] = bfloat_of_float(values[k]);
    else
        for (int k = 0; k < BLOCK; ++k) narrow[k] = half_of_float(values[k]);
    memcpy((uint16_t *)row + i, narrow, sizeof(uint16_t) * (size_t)count);
}

// (x - mean) / std of one block in float32; what lies behind `count` is 0.
SJD2_FN void normalized_block(const Dims &dims, const void *x, int64_t i, int64_t count, float *out) {
    Lanes mean, std;
    load_block(x, dims.type, i, count, 0.0f, out);
    load_block(dims.mean, SJD2_FLOAT32, i, count, 0.0f, mean.v);
    load_block(dims.std, SJD2_FLOAT32, i, count, 1.0f, std.v);
    for (int k = 0; k < BLOCK; ++k) out[k] = (out[k] - mean.v[k]) / std.v[k];
}

SJD2_FN void store_denormalized(const Dims &dims, const float *e, int64_t i, int64_t count, void *out) {
    Lanes mean, std;
    load_block(dims.mean, SJD2_FLOAT32, i, count, 0.0f, mean.v);
    load_block(dims.std, SJD2_FLOAT32, i, count, 1.0f, std.v);
    for (int k = 0; k < BLOCK; ++k) mean.v[k] += e[k] * std.v[k];
    store_block(mean.v, dims.type, i, count, out);
}

static void denormalize(Dims dims, const float *e, void *out) {
    for (int64_t i = dims.begin; i < dims.end; i += BLOCK) {
        const int64_t count = block_count(dims, i);
        Lanes values;
        load_block(e, SJD2_FLOAT32, i, count, 0.0f, values.v);
        store_denormalized(dims, values.v, i, count, out);
    }
}

static void perturb(Dims dims, const void *x, bool noisy, float t, Key key, bool denormalize, void *out) {
    if (denormalize && !noisy) {
        memcpy(out, x, (size_t)(dims.end - dims.begin) * (dims.type == SJD2_FLOAT32 ? 4 : 2));
        return;
    }
    for (int64_t i = dims.begin; i < dims.end; i += BLOCK) {
        const int64_t count = block_count(dims, i);
        Lanes clean, noise;
        normalized_block(dims, x, i, count, clean.v);
        if (noisy) {
            normal_block(key, i / BLOCK, noise.v);
            for (int k = 0; k < BLOCK; ++k) clean.v[k] += t * (noise.v[k] - clean.v[k]);
        }
        if (denormalize) store_denormalized(dims, clean.v, i, count, out);
        else store_block(clean.v, SJD2_FLOAT32, i, count, out);
    }
}

static void denoise(Dims dims, const void *row, const float *e, float r, float *out) {
    for (int64_t i = dims.begin; i < dims.end; i += BLOCK) {
        const int64_t count = block_count(dims, i);
        Lanes target, old;
        normalized_block(dims, row, i, count, target.v);
        load_block(e, SJD2_FLOAT32, i, count, 0.0f, old.v);
        for (int k = 0; k < BLOCK; ++k) target.v[k] += r * (old.v[k] - target.v[k]);
        store_block(target.v, SJD2_FLOAT32, i, count, out);
    }
}

static void fresh(Dims dims, Key key, float *out) {
    for (int64_t i = dims.begin; i < dims.end; i += BLOCK) {
        Lanes noise;
        normal_block(key, i / BLOCK, noise.v);
        store_block(noise.v, SJD2_FLOAT32, i, block_count(dims, i), out);
    }
}

SJD2_FN void load_vector(const float *x, int64_t count, Vector *out) {
    *out = Vector{};
    if (count >= 16) memcpy(out, x, sizeof *out);
    else memcpy(out, x, sizeof(float) * (size_t)count);
}

// Products of `TILE` embeddings with two rows at a time, summed lane by lane: no tile changes a sum.
template <int TILE>
static void nearest_tile(const float *rows, int64_t count, int64_t dim, int32_t number,
                         const float *const *embeddings, Best *best) {
    for (int64_t row = 0; row < count; row += 2) {
        const float *one = rows + row * dim, *two = row + 1 < count ? one + dim : one;
        Vector first[TILE] = {}, second[TILE] = {};
        for (int64_t i = 0; i < dim; i += 16) {
            Vector a, b, e;
            load_vector(one + i, dim - i, &a);
            load_vector(two + i, dim - i, &b);
            for (int n = 0; n < TILE; ++n) {
                load_vector(embeddings[n] + i, dim - i, &e);
                first[n] += a * e;
                second[n] += b * e;
            }
        }
        for (int n = 0; n < TILE; ++n) {
            float sums[2] = {0.0f, 0.0f};
            for (int k = 0; k < 16; ++k) sums[0] += first[n][k], sums[1] += second[n][k];
            if (sums[0] > best[n].value) best[n] = Best{sums[0], number + (int32_t)row};
            if (sums[1] > best[n].value) best[n] = Best{sums[1], number + (int32_t)row + 1};
        }
    }
}

static void nearest(const float *rows, int64_t count, int64_t dim, int32_t number, const float *const *embeddings,
                    int tile, Best *best) {
    if (tile == 4) nearest_tile<4>(rows, count, dim, number, embeddings, best);
    if (tile == 3) nearest_tile<3>(rows, count, dim, number, embeddings, best);
    if (tile == 2) nearest_tile<2>(rows, count, dim, number, embeddings, best);
    if (tile == 1) nearest_tile<1>(rows, count, dim, number, embeddings, best);
}

#define SJD2_STRING_(name) #name
#define SJD2_STRING(name) SJD2_STRING_(name)
static const Kernels kernels = {SJD2_STRING(SJD2_ISA), sample_row, residual, random_row, denormalize,
                                perturb, denoise, fresh, nearest};
#undef SJD2_STRING
#undef SJD2_STRING_

}  // namespace SJD2_ISA
}  // namespace sjd2
