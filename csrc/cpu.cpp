// The ops around the model on the CPU: random numbers, embeddings, sampling. The state machine is in window.cpp.

#include <float.h>

#include <cmath>

#include "checks.h"
#include "core.h"
#include "kernels.h"
#include "sjd2.h"
#include "threads.h"

using namespace sjd2;

int64_t sjd2_version(void) { return SJD2_VERSION; }

const char *sjd2_instruction_set(void) { return kernels().name; }

const char *sjd2_status_string(int64_t status) {
    switch (status) {
        case SJD2_OK: return "success";
        case SJD2_ERROR_STRUCT: return "the struct has a size that this version does not know";
        case SJD2_ERROR_NULL: return "a pointer that is needed is null";
        case SJD2_ERROR_SIZE: return "a size is negative, too large, or does not go with the others";
        case SJD2_ERROR_VALUE: return "a parameter is out of its range";
        case SJD2_ERROR_INDEX: return "a token, level, length or count in an array is out of its range";
        case SJD2_ERROR_WORKSPACE: return "the workspace is too small";
        default: return "unknown status";
    }
}

// ------------------------------------------------------------------ random numbers

int64_t sjd2_random(const sjd2_random_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_random_params &a = *params;
    SJD2_REQUIRE(sizes({a.batch, a.length, a.count}) && a.threads >= 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.distribution >= SJD2_UNIFORM && a.distribution <= SJD2_NORMAL, SJD2_ERROR_VALUE);
    SJD2_REQUIRE(a.purpose >= SJD2_SAMPLE && a.purpose <= SJD2_INIT, SJD2_ERROR_VALUE);
    SJD2_REQUIRE(given(a.batch * a.length * a.count, {a.seeds, a.positions, a.out}), SJD2_ERROR_NULL);
    const Kernels &k = kernels();
    parallel(a.count ? a.batch * a.length : 0, 2.0 * (double)a.count, a.threads, [&](int64_t unit, int64_t) {
        const Key key{(uint64_t)a.seeds[unit / a.length], (uint32_t)a.positions[unit], (uint32_t)a.iteration,
                      (uint32_t)a.purpose};
        k.random_row(key, a.distribution, a.count, a.out + unit * a.count);
    });
    return SJD2_OK;
}

// ------------------------------------------------------------------ embeddings

int64_t sjd2_embed_window(const sjd2_embed_window_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_embed_window_params &a = *params;
    SJD2_REQUIRE(a.window >= 1 && sizes({a.batch, a.window, a.dim}) && sizes({a.rows, a.dim}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.rows >= 1 && a.threads >= 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(known_type(a.type), SJD2_ERROR_VALUE);
    const int64_t drafts = a.window - 1, count = a.batch * a.window * a.dim;
    SJD2_REQUIRE(given(count, {a.tokens, a.table, a.start, a.out}), SJD2_ERROR_NULL);
    if (a.noisy) SJD2_REQUIRE(given(count, {a.levels, a.mean, a.std}), SJD2_ERROR_NULL);
    if (count == 0) return SJD2_OK;
    SJD2_REQUIRE(within(a.tokens, a.batch * a.window, INT64_MIN, a.rows), SJD2_ERROR_INDEX);
    const Kernels &k = kernels();
    const int64_t stride = a.dim * bytes_of(a.type);
    const Dims dims{0, a.dim, a.mean, a.std, a.type};
    parallel(a.batch * a.window, 0.2 * (double)a.dim, a.threads, [&](int64_t unit, int64_t) {
        const int64_t row = unit / a.window, slot = unit % a.window, token = a.tokens[unit];
        char *out = (char *)a.out + unit * stride;
        if (slot > 0 && a.noisy && a.levels[unit] >= 0)
            return k.denormalize(dims, a.noisy + (row * drafts + slot - 1) * a.dim, out);
        const bool prompt = slot == 0 && token < 0;
        const char *source = prompt ? (const char *)a.start + row * stride
                                    : (const char *)a.table + (token > 0 ? token : 0) * stride;
        memcpy(out, source, (size_t)stride);
    });
    return SJD2_OK;
}

int64_t sjd2_perturb(const sjd2_perturb_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_perturb_params &a = *params;
    SJD2_REQUIRE(sizes({a.batch, a.length, a.dim}) && sizes({a.level_count}) && a.threads >= 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(known_type(a.type) && (a.denormalize == 0 || a.denormalize == 1), SJD2_ERROR_VALUE);
    const int64_t units = a.batch * a.length;
    SJD2_REQUIRE(given(units * a.dim, {a.x, a.levels, a.positions, a.seeds, a.mean, a.std, a.out}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(units * a.dim * a.level_count, {a.times}), SJD2_ERROR_NULL);
    if (units * a.dim == 0) return SJD2_OK;
    SJD2_REQUIRE(within(a.levels, units, INT32_MIN, a.level_count), SJD2_ERROR_INDEX);
    const Kernels &k = kernels();
    const int64_t in = a.dim * bytes_of(a.type), out = a.denormalize ? in : a.dim * 4;
    const Dims dims{0, a.dim, a.mean, a.std, a.type};
    parallel(units, 2.0 * (double)a.dim, a.threads, [&](int64_t unit, int64_t) {
        const int32_t level = a.levels[unit];
        const Key key{(uint64_t)a.seeds[unit / a.length], (uint32_t)a.positions[unit], (uint32_t)a.epoch, SJD2_NOISE};
        k.perturb(dims, (const char *)a.x + unit * in, level >= 0, level >= 0 ? a.times[level] : 0.0f, key,
                  a.denormalize == 1, (char *)a.out + unit * out);
    });
    return SJD2_OK;
}

// ------------------------------------------------------------------ sampling

int64_t sjd2_sample_window_workspace(int64_t vocab, int64_t threads) {
    if (vocab < 1 || vocab > LARGEST_VOCAB || threads < 0) return -1;
    const int64_t workers = least(threads > 1 ? threads : 1, MAX_THREADS);
    return workers * 2 * padded_to_block(vocab) * (int64_t)sizeof(float);
}

static int64_t check_sample_window(const sjd2_sample_window_params &a) {
    SJD2_REQUIRE(a.vocab >= 1 && a.vocab <= LARGEST_VOCAB && a.threads >= 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.window >= 1 && sizes({a.batch, a.window, a.vocab}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(!a.noise || (a.padded >= a.window && sizes({a.batch, a.padded, a.vocab})), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(known_type(a.type) && (a.per_position == 0 || a.per_position == 1), SJD2_ERROR_VALUE);
    SJD2_REQUIRE(0 <= a.legal_begin && a.legal_begin < a.legal_end && a.legal_end <= a.vocab, SJD2_ERROR_VALUE);
    SJD2_REQUIRE(a.temperature == 0.0 || (a.temperature >= FLT_MIN && a.temperature <= FLT_MAX), SJD2_ERROR_VALUE);
    SJD2_REQUIRE(a.top_p > 0.0 && std::isfinite(a.top_p) && std::isfinite(a.guidance), SJD2_ERROR_VALUE);
    SJD2_REQUIRE(given(a.batch, {a.logits, a.seeds, a.lengths, a.steps, a.tokens, a.bad, a.workspace}),
                 SJD2_ERROR_NULL);
    if (a.batch == 0) return SJD2_OK;
    SJD2_REQUIRE(a.workspace_size >= sjd2_sample_window_workspace(a.vocab, a.threads), SJD2_ERROR_WORKSPACE);
    if (a.noise) SJD2_REQUIRE(within(a.lengths, a.batch, 0, a.padded - a.window + 1), SJD2_ERROR_INDEX);
    return SJD2_OK;
}

int64_t sjd2_sample_window(const sjd2_sample_window_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_sample_window_params &a = *params;
    const int64_t status = check_sample_window(a);
    if (status != SJD2_OK) return status;
    const Kernels &k = kernels();
    const int64_t stride = a.vocab * bytes_of(a.type), scratch = padded_to_block(a.vocab);
    parallel(a.batch * a.window, 1.2 * (double)a.vocab, a.threads, [&](int64_t unit, int64_t worker) {
        const int64_t image = unit / a.window, position = a.lengths[image] + unit % a.window;
        SampleRow row;
        row.cond = (const char *)a.logits + unit * stride;
        row.uncond = a.uncond ? (const char *)a.uncond + unit * stride : nullptr;
        row.noise = a.noise && a.per_position ? a.noise + (image * a.padded + position) * a.vocab : nullptr;
        row.p = a.p ? a.p + unit * a.vocab : nullptr;
        row.x = (float *)a.workspace + worker * 2 * scratch;
        row.e = row.x + scratch;
        row.key = Key{(uint64_t)a.seeds[image], (uint32_t)position,
                      a.per_position ? 0u : (uint32_t)a.steps[image] + 1u, SJD2_SAMPLE};
        row.type = a.type, row.vocab = a.vocab, row.begin = a.legal_begin, row.end = a.legal_end;
        row.top_k = a.top_k, row.top_p = (float)a.top_p;
        row.guidance = (float)a.guidance, row.temperature = (float)a.temperature;
        const Sampled sampled = k.sample_row(row);
        a.tokens[unit] = sampled.token;
        a.bad[unit] = sampled.bad;
    });
    return SJD2_OK;
}
