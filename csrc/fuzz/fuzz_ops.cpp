// Fuzz target for the C boundary: every op with sizes, values, indices and pointers that are right, odd or wrong.
//
// Arrays are allocated to the byte, so that a sanitizer sees any access beside them. What must hold: a call that is
// refused writes nothing, one that is not leaves tokens, counts and levels in their ranges.
//
//   clang++ -g -fsanitize=fuzzer,address,undefined -I csrc csrc/*.cpp csrc/fuzz/fuzz_ops.cpp
//   g++ -g -fsanitize=address,undefined -I csrc csrc/*.cpp csrc/fuzz/fuzz_ops.cpp csrc/fuzz/driver.cpp

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "sjd2.h"

uint64_t fuzz_outcomes[7][7];  // calls by op and status

#define REQUIRE(condition)                                                          \
    do {                                                                            \
        if (!(condition)) fprintf(stderr, "violated: %s\n", #condition), abort();   \
    } while (0)

namespace {

enum Op { RANDOM, EMBED, PERTURB, SAMPLE, VERIFY, COMMIT, REFINE };

// Sizes may be nonsense: their sums and products wrap.
int64_t plus(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
int64_t minus(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
int64_t times(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }

struct Case {
    const uint8_t *data;
    size_t size;
    uint64_t state = 0x9E3779B97F4A7C15u;
    std::vector<std::unique_ptr<uint8_t[]>> arrays;
    struct Output {
        uint8_t *at;
        std::vector<uint8_t> before;
    };
    std::vector<Output> outputs;

    // The next byte of the input; when it is used up, a sequence that depends on all of it.
    uint8_t byte() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        if (size == 0) return (uint8_t)(state >> 56);
        --size;
        state ^= *data;
        return *data++;
    }
    bool chance(int in_256) { return byte() < in_256; }
    int64_t below(int64_t limit) { return limit > 0 ? (byte() | byte() << 8) % limit : 0; }

    // Mostly a size from `low` on; now and then one that cannot be.
    int64_t dimension(int64_t low, int64_t high) {
        static const int64_t WRONG[] = {-1, INT64_MIN, INT64_MAX, INT64_C(1) << 40};
        return chance(3) ? WRONG[byte() % 4] : low + below(high - low + 1);
    }
    int64_t choice(int64_t count) { return chance(3) ? 77 : below(count); }

    float number() {
        static const uint32_t SPECIAL[] = {0, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 1, 0x7f7fffffu};
        uint32_t bits = SPECIAL[byte() % 7];
        if (!chance(20)) return (float)(below(4096) - 2048) / 256.0f;
        if (chance(40))
            for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }

    // An array of exactly `count` elements (of a size that makes sense), now and then null.
    template <class T, class Make>
    T *array(int64_t count, const Make &make) {
        const int64_t held = count < 0 || count > 1 << 20 ? 0 : count;
        arrays.emplace_back(new uint8_t[sizeof(T) * (size_t)held]);
        T *at = (T *)arrays.back().get();
        for (int64_t i = 0; i < held; ++i) at[i] = make();
        return chance(1) ? nullptr : at;
    }
    template <class T>
    T *output(int64_t count, int64_t low, int64_t high) {
        T *at = integers<T>(count, low, high);
        if (at) {
            const uint8_t *bytes = arrays.back().get();
            const int64_t held = count < 0 || count > 1 << 20 ? 0 : count;
            outputs.push_back({arrays.back().get(), {bytes, bytes + sizeof(T) * (size_t)held}});
        }
        return at;
    }
    template <class T>
    T *integers(int64_t count, int64_t low, int64_t high) {
        const int wrong = chance(8) ? 40 : 0;  // whether this array holds any at all
        const int64_t range = minus(high, low);
        return array<T>(count,
                        [&] { return (T)(chance(wrong) ? below(3) * 1000000007 - 9 : plus(low, below(range))); });
    }
    float *floats(int64_t count) {
        return array<float>(count, [&] { return number(); });
    }
    float *float_output(int64_t count) {
        int32_t *at = output<int32_t>(count, 0, 65536);
        return (float *)at;
    }
    void *halves_or_floats(int64_t count, int64_t type) {
        if (type == SJD2_FLOAT32) return floats(count);
        return array<uint16_t>(count, [&] { return (uint16_t)(byte() | byte() << 8); });
    }
    // Rows of probabilities, some of them zero, one-hot or anything else.
    float *probabilities(int64_t rows, int64_t vocab) {
        const int64_t cells = times(rows, vocab);
        float *at = floats(cells);
        if (!at || rows < 0 || rows > 99 || vocab < 0 || vocab > 999) return at;
        for (int64_t row = 0; row < rows; ++row) {
            const int kind = byte() % 8;
            for (int64_t id = 0; id < vocab && kind < 7; ++id) {
                const float share = kind == 1 ? (float)(id == row % vocab) : (float)byte() / 256.0f;
                at[row * vocab + id] = kind == 0 ? 0.0f : share;
            }
        }
        return at;
    }

    bool unchanged() const {
        for (const Output &output : outputs)
            if (!output.before.empty() && memcmp(output.at, output.before.data(), output.before.size())) return false;
        return true;
    }
    bool judge(Op op, int64_t status) const {
        REQUIRE(status >= SJD2_OK && status <= SJD2_ERROR_WORKSPACE && sjd2_status_string(status));
        ++fuzz_outcomes[op][status];
        REQUIRE(status == SJD2_OK || unchanged());
        return status == SJD2_OK;
    }
    size_t struct_size(size_t right) { return chance(2) ? right + (size_t)below(64) - 32 : right; }
};

template <class T>
bool within(const T *values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] < low || values[i] >= high) return false;
    return true;
}

void fuzz_random(Case &c) {
    sjd2_random_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.length = c.dimension(0, 3);
    a.count = c.dimension(0, 70), a.distribution = c.choice(3), a.iteration = c.below(9), a.purpose = c.choice(5);
    a.threads = c.dimension(0, 3), a.seeds = c.integers<int64_t>(a.batch, -9, 9);
    a.positions = c.integers<int64_t>(times(a.batch, a.length), -9, 9);
    a.out = c.float_output(times(times(a.batch, a.length), a.count));
    if (c.judge(RANDOM, sjd2_random(&a)))
        for (int64_t i = 0; i < a.batch * a.length * a.count; ++i)
            REQUIRE(a.distribution != SJD2_UNIFORM || (a.out[i] >= 0.0f && a.out[i] < 1.0f));
}

void fuzz_embed(Case &c) {
    sjd2_embed_window_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.window = c.dimension(1, 4);
    a.dim = c.dimension(0, 70), a.rows = c.dimension(1, 4), a.type = c.choice(3), a.threads = c.dimension(0, 3);
    const int64_t slots = times(a.batch, a.window);
    a.tokens = c.integers<int64_t>(slots, -1, a.rows), a.levels = c.integers<int32_t>(slots, -1, 3);
    a.table = c.halves_or_floats(times(a.rows, a.dim), a.type);
    a.start = c.halves_or_floats(times(a.batch, a.dim), a.type);
    if (c.chance(128)) {
        a.noisy = c.floats(times(minus(slots, a.batch), a.dim));
        a.mean = c.floats(a.dim), a.std = c.floats(a.dim);
    }
    const int64_t cells = times(slots, a.dim);
    a.out = a.type == SJD2_FLOAT32 ? (void *)c.output<float>(cells, 0, 9) : (void *)c.output<uint16_t>(cells, 0, 9);
    c.judge(EMBED, sjd2_embed_window(&a));
}

void fuzz_perturb(Case &c) {
    sjd2_perturb_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.length = c.dimension(0, 3);
    a.dim = c.dimension(0, 70), a.type = c.choice(3), a.level_count = c.dimension(0, 3), a.epoch = c.below(5);
    a.denormalize = c.choice(2), a.threads = c.dimension(0, 3);
    const int64_t rows = times(a.batch, a.length), cells = times(rows, a.dim);
    a.x = c.halves_or_floats(cells, a.type);
    a.levels = c.integers<int32_t>(rows, -1, a.level_count);
    a.positions = c.integers<int64_t>(rows, 0, 99), a.seeds = c.integers<int64_t>(a.batch, 0, 99);
    a.mean = c.floats(a.dim), a.std = c.floats(a.dim), a.times = c.floats(a.level_count);
    if (a.denormalize && a.type != SJD2_FLOAT32) a.out = c.output<uint16_t>(cells, 0, 9);
    else a.out = c.output<float>(cells, 0, 9);
    c.judge(PERTURB, sjd2_perturb(&a));
}

void fuzz_sample(Case &c) {
    sjd2_sample_window_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.window = c.dimension(1, 3);
    a.vocab = c.dimension(1, 140), a.type = c.choice(3), a.padded = plus(c.dimension(0, 4), a.window % 8);
    a.top_k = c.below(200) - 5, a.legal_end = c.chance(200) ? a.vocab : c.dimension(0, 140);
    a.legal_begin = c.chance(200) ? 0 : c.dimension(0, 140), a.per_position = c.choice(2);
    a.threads = c.dimension(0, 3), a.guidance = c.number(), a.top_p = c.chance(128) ? 1.0 : c.number() / 8.0;
    a.temperature = c.chance(128) ? 1.0 : c.number();
    const int64_t slots = times(a.batch, a.window), cells = times(slots, a.vocab);
    a.logits = c.halves_or_floats(cells, a.type);
    if (c.chance(128)) a.uncond = c.halves_or_floats(cells, a.type);
    a.seeds = c.integers<int64_t>(a.batch, 0, 99), a.steps = c.integers<int32_t>(a.batch, 0, 99);
    const int64_t room = a.window > 0 && a.padded > a.window ? a.padded - a.window : 0;
    a.lengths = c.integers<int32_t>(a.batch, 0, 1 + room % 8);
    if (c.chance(60)) a.noise = c.floats(times(times(a.batch, a.padded), a.vocab));
    a.tokens = c.output<int64_t>(slots, 0, 9), a.bad = c.output<uint8_t>(slots, 0, 9);
    if (c.chance(128)) a.p = c.float_output(cells);
    const int64_t needed = sjd2_sample_window_workspace(a.vocab, a.threads);
    a.workspace_size = c.chance(4) ? needed - 1 : needed;
    a.workspace = c.array<uint8_t>(a.workspace_size, [&] { return c.byte(); });
    if (!c.judge(SAMPLE, sjd2_sample_window(&a)) || slots == 0) return;
    REQUIRE(within(a.tokens, slots, 0, a.vocab) && within(a.bad, slots, 0, 2));
    for (int64_t slot = 0; slot < slots; ++slot)
        REQUIRE(a.bad[slot] || (a.tokens[slot] >= a.legal_begin && a.tokens[slot] < a.legal_end) ||
                a.temperature < 1e-30 || a.noise || a.guidance != 1.0);
    for (int64_t i = 0; i < cells && a.p; ++i) REQUIRE(!(a.p[i] < 0.0f || a.p[i] > 1.0001f));
}

void fuzz_verify(Case &c) {
    sjd2_verify_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.window = c.dimension(1, 4);
    a.vocab = c.dimension(0, 140), a.total = c.dimension(1, 5);
    a.padded = c.chance(3) ? c.dimension(0, 9) : plus(a.total, a.window);
    a.rule = c.choice(4), a.threads = c.dimension(0, 3);
    const int64_t slots = times(a.batch, a.window), drafts = times(a.batch, plus(a.window, -1));
    a.tokens = c.integers<int64_t>(slots, 0, a.vocab), a.bad = c.integers<uint8_t>(slots, 0, 2);
    a.p = c.probabilities(slots, a.vocab), a.q = c.probabilities(drafts, a.vocab);
    a.drafts = c.integers<int64_t>(drafts, 0, a.vocab), a.status = c.integers<int32_t>(drafts, 0, 3);
    a.levels = c.integers<int32_t>(drafts, -1, 1), a.forced = c.integers<int64_t>(a.padded, -1, 1);
    a.lengths = c.integers<int32_t>(a.batch, 0, plus(a.total, 1)), a.steps = c.integers<int32_t>(a.batch, 0, 9);
    a.done = c.integers<int32_t>(a.batch, 0, 2), a.seeds = c.integers<int64_t>(a.batch, 0, 9);
    a.decided = c.output<int64_t>(slots, 0, 9), a.accepted = c.output<int32_t>(a.batch, 0, 9);
    a.settled = c.output<int32_t>(a.batch, 0, 9), a.fault = c.output<int32_t>(a.batch, 0, 9);
    if (!c.judge(VERIFY, sjd2_verify(&a))) return;
    for (int64_t row = 0; row < a.batch; ++row) {
        REQUIRE(a.accepted[row] >= 0 && a.accepted[row] <= a.settled[row] && a.settled[row] <= a.window);
        REQUIRE(a.lengths[row] + a.accepted[row] <= a.total && a.fault[row] < a.total + a.window);
    }
}

void fuzz_commit(Case &c) {
    sjd2_commit_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.window = c.dimension(1, 4);
    a.total = c.dimension(1, 5), a.padded = c.chance(3) ? c.dimension(0, 9) : plus(a.total, a.window);
    a.kv_rows = c.chance(200) ? times(2, a.batch) : c.dimension(0, 5);
    const int64_t slots = times(a.batch, a.window);
    a.decided = c.integers<int64_t>(slots, 0, 9), a.accepted = c.integers<int32_t>(a.batch, 0, plus(a.window, 1));
    a.fault = c.integers<int32_t>(a.batch, -1, 2), a.tokens = c.output<int64_t>(times(a.batch, a.padded), 0, 9);
    a.lengths = c.output<int32_t>(a.batch, 0, plus(a.total, 1)), a.steps = c.output<int32_t>(a.batch, 0, 9);
    a.done = c.output<int32_t>(a.batch, 0, 2), a.failed = c.output<int32_t>(a.batch, -1, 0);
    a.failed_step = c.output<int32_t>(a.batch, -1, 0);
    a.histogram = c.output<int64_t>(plus(slots, a.batch), 0, 9), a.kv_lengths = c.output<int32_t>(a.kv_rows, 0, 9);
    if (c.judge(COMMIT, sjd2_commit(&a)))
        REQUIRE(within(a.lengths, a.batch, 0, a.padded + 1));
}

void fuzz_refine(Case &c) {
    sjd2_refine_params a = {};
    a.size = c.struct_size(sizeof a), a.batch = c.dimension(0, 3), a.window = c.dimension(1, 5);
    a.padded = plus(c.dimension(0, 4), a.window % 8), a.vocab = c.dimension(0, 70), a.dim = c.dimension(1, 70);
    a.rows = c.dimension(1, 9), a.type = c.choice(3), a.level_count = c.dimension(1, 3);
    a.fresh_level = c.chance(250) ? plus(a.level_count, -1) : c.dimension(0, 9), a.threads = c.dimension(0, 3);
    const int64_t slots = times(a.batch, a.window), drafts = times(a.batch, plus(a.window, -1));
    a.decided = c.integers<int64_t>(slots, 0, a.rows), a.accepted = c.integers<int32_t>(a.batch, 0, plus(a.window, 1));
    a.settled = c.integers<int32_t>(a.batch, 0, plus(a.window, 1));
    a.lengths = c.integers<int32_t>(a.batch, 0, plus(minus(a.padded, a.window) % 8, 2));
    a.forced = c.integers<int64_t>(a.padded, -1, 1);
    a.initial = c.integers<int64_t>(times(a.batch, a.padded), 0, a.rows);
    a.drafts = c.output<int64_t>(drafts, 0, 9), a.status = c.output<int32_t>(drafts, 0, 3);
    a.levels = c.output<int32_t>(drafts, -1, a.level_count);
    if (c.chance(128)) {
        a.p = c.probabilities(slots, a.vocab), a.q = c.float_output(times(drafts, a.vocab));
    }
    const bool noisy = c.chance(128), nearest = c.chance(128);
    if (noisy) {
        a.noisy = c.float_output(times(drafts, a.dim)), a.table = c.halves_or_floats(times(a.rows, a.dim), a.type);
        a.mean = c.floats(a.dim), a.std = c.floats(a.dim), a.ratios = c.floats(a.level_count);
        a.seeds = c.integers<int64_t>(a.batch, 0, 9);
        if (c.chance(60)) a.noise = c.floats(times(times(a.batch, a.padded), a.dim));
    }
    if (noisy && nearest) {
        const int64_t needed = sjd2_refine_workspace(a.batch, a.window, a.vocab);
        a.directions = c.floats(times(a.vocab, a.dim));
        a.workspace_size = c.chance(4) ? needed - 1 : needed;
        a.workspace = c.array<uint8_t>(a.workspace_size, [&] { return c.byte(); });
    }
    if (!c.judge(REFINE, sjd2_refine(&a))) return;
    REQUIRE(within(a.status, drafts, 0, 3));
    if (a.noisy) REQUIRE(within(a.levels, drafts, -1, a.level_count));
    for (int64_t i = 0; i < drafts && a.noisy && a.directions; ++i)
        REQUIRE(a.levels[i] < 0 || (a.drafts[i] >= 0 && a.drafts[i] < a.vocab));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const OPS[])(Case &) = {fuzz_random, fuzz_embed,  fuzz_perturb, fuzz_sample,
                                          fuzz_verify, fuzz_commit, fuzz_refine};
    Case c{data, size, 0x9E3779B97F4A7C15u, {}, {}};
    OPS[c.byte() % 7](c);
    return 0;
}
