// The state machine of a window on the CPU: verify, commit, refine. It follows reference/decoding.py line by line.

#include <string.h>

#include "checks.h"
#include "core.h"
#include "kernels.h"
#include "sjd2.h"
#include "threads.h"

using namespace sjd2;

constexpr float KEEP_RATIO = 0.5f;      // PAPER: an unaccepted clean draft stays when p(x)/q(x) reaches this
constexpr int64_t DIMS_AT_A_TIME = 512;  // a unit of work of refine, a multiple of BLOCK
constexpr int64_t ROWS_AT_A_TIME = 256;  // directions searched by one unit of work
constexpr int64_t ROWS_IN_CACHE = 16;    // of those, how many meet all drafts before the next ones come

// ------------------------------------------------------------------ verify

// What the ratio test says about draft j of a row.
struct Test {
    bool open, tested, clean, kept;
    float p_x, q_x;
};

static Test test_draft(const sjd2_verify_params &a, int64_t row, int64_t j) {
    const int64_t draft = row * (a.window - 1) + j, position = a.lengths[row] + j;
    const int64_t id = least(a.drafts[draft], a.vocab - 1);
    const scalar::Words random = scalar::philox((uint64_t)a.seeds[row], 0, (uint32_t)position,
                                                (uint32_t)a.steps[row] + 1u, scalar::ACCEPT);
    Test test;
    test.p_x = a.p[(row * a.window + j) * a.vocab + id];
    test.q_x = a.q[draft * a.vocab + id];
    test.open = a.forced[position] < 0;
    test.clean = a.levels[draft] < 0;
    test.tested = test.open && a.status[draft] == SJD2_TRACKED;
    test.kept = test.tested && scalar::uniform_of(random.w[0]) * test.q_x < test.p_x;
    return test;
}

static int64_t replacement(const sjd2_verify_params &a, int64_t row, int64_t j) {
    const Key key{(uint64_t)a.seeds[row], (uint32_t)(a.lengths[row] + j), (uint32_t)a.steps[row] + 1u, SJD2_RESIDUAL};
    return kernels().residual(a.p + (row * a.window + j) * a.vocab, a.q + (row * (a.window - 1) + j) * a.vocab,
                              a.vocab, key);
}

// Each of these decides the drafts of a row and returns how many of them pass.

static int64_t scan_match(const sjd2_verify_params &a, int64_t row) {
    const int64_t drafts = a.window - 1, *decided = a.decided + row * a.window;
    int64_t run = 0;
    while (run < drafts && a.drafts[row * drafts + run] == decided[run] && a.levels[row * drafts + run] < 0) ++run;
    return run;
}

static int64_t scan_coupled(const sjd2_verify_params &a, int64_t row) {
    int64_t run = 0;
    for (; run < a.window - 1; ++run) {
        const Test test = test_draft(a, row, run);
        if (test.open && !(test.kept && test.clean)) break;
    }
    return run;
}

static int64_t scan_ratio(const sjd2_verify_params &a, int64_t row) {
    const int64_t drafts = a.window - 1, *draft = a.drafts + row * drafts;
    int64_t *decided = a.decided + row * a.window, run = 0;
    for (; run < drafts; ++run) {
        const Test test = test_draft(a, row, run);
        const bool testable = test.tested && (a.rule == SJD2_PAPER || test.clean);
        if (!test.open || a.status[row * drafts + run] == SJD2_SETTLED || (test.kept && testable)) {
            decided[run] = draft[run];
            continue;
        }
        if (testable) decided[run] = replacement(a, row, run);
        break;
    }
    if (a.rule == SJD2_PAPER)
        for (int64_t j = run + 1; j < drafts; ++j) {
            const Test test = test_draft(a, row, j);
            if (test.tested && test.clean && test.p_x >= KEEP_RATIO * test.q_x) decided[j] = draft[j];
        }
    return run;
}

static void start_from_the_draws(const sjd2_verify_params &a, int64_t row) {
    for (int64_t i = 0; i < a.window; ++i) {
        const int64_t known = a.forced[a.lengths[row] + i];
        a.decided[row * a.window + i] = known < 0 ? a.tokens[row * a.window + i] : known;
    }
}

// Counts of one row, once its drafts are decided and `run` of them pass.
static void count_row(const sjd2_verify_params &a, int64_t row, int64_t run) {
    a.fault[row] = -1;
    for (int64_t i = a.window - 1; i >= 0; --i)
        if (a.bad[row * a.window + i] && a.forced[a.lengths[row] + i] < 0 && a.done[row] == 0)
            a.fault[row] = (int32_t)(a.lengths[row] + i);
    const bool stopped = a.fault[row] >= 0 || a.done[row] != 0;
    const int64_t settled = stopped ? 0 : least(run + 1, a.total - a.lengths[row]);
    int64_t trusted = a.window - 1;
    if (a.rule == SJD2_PAPER) {
        // Keys and values of noisy inputs are wrong: what lies behind the first of them waits for a clean pass.
        trusted = 0;
        while (trusted < a.window - 1 && (trusted >= run || a.levels[row * (a.window - 1) + trusted] < 0)) ++trusted;
    }
    a.settled[row] = (int32_t)settled;
    a.accepted[row] = (int32_t)least(settled, trusted + 1);
}

static int64_t check_verify(const sjd2_verify_params &a) {
    SJD2_REQUIRE(a.rule >= SJD2_MATCH && a.rule <= SJD2_PAPER, SJD2_ERROR_VALUE);
    SJD2_REQUIRE(a.window >= 1 && sizes({a.batch, a.window, a.vocab}) && a.threads >= 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.vocab <= LARGEST_VOCAB && a.total >= 1 && sizes({a.padded}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.padded - a.window >= a.total, SJD2_ERROR_SIZE);
    const int64_t drafts = a.batch * (a.window - 1);
    const bool ratio = a.rule != SJD2_MATCH && drafts > 0;
    SJD2_REQUIRE(!ratio || a.vocab >= 1, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(given(a.batch, {a.tokens, a.bad, a.forced, a.lengths, a.steps, a.done, a.seeds}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(a.batch, {a.decided, a.accepted, a.settled, a.fault}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(drafts, {a.drafts, a.status, a.levels}), SJD2_ERROR_NULL);
    if (ratio) SJD2_REQUIRE(given(drafts, {a.p, a.q}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(within(a.lengths, a.batch, 0, a.total + 1), SJD2_ERROR_INDEX);
    if (ratio) SJD2_REQUIRE(within(a.drafts, drafts, 0, INT64_MAX), SJD2_ERROR_INDEX);
    return SJD2_OK;
}

int64_t sjd2_verify(const sjd2_verify_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_verify_params &a = *params;
    const int64_t status = check_verify(a);
    if (status != SJD2_OK) return status;
    const int64_t drafts = a.window - 1;
    const double row_cost = 100.0 * (double)a.window + (a.rule == SJD2_MATCH ? 0.0 : 0.6 * (double)a.vocab);
    parallel(a.batch, 20.0 * (double)a.window, a.threads, [&](int64_t row, int64_t) { start_from_the_draws(a, row); });
    if (a.rule == SJD2_COUPLED)
        parallel(a.batch * drafts, 0.3 * (double)a.vocab, a.threads, [&](int64_t unit, int64_t) {
            const int64_t row = unit / drafts, j = unit % drafts;
            const Test test = test_draft(a, row, j);
            if (test.tested) a.decided[row * a.window + j] = test.kept ? a.drafts[unit] : replacement(a, row, j);
        });
    parallel(a.batch, row_cost, a.threads, [&](int64_t row, int64_t) {
        const int64_t run = a.rule == SJD2_MATCH     ? scan_match(a, row)
                            : a.rule == SJD2_COUPLED ? scan_coupled(a, row)
                                                     : scan_ratio(a, row);
        count_row(a, row, run);
    });
    return SJD2_OK;
}

// ------------------------------------------------------------------ commit

static int64_t check_commit(const sjd2_commit_params &a) {
    SJD2_REQUIRE(a.window >= 1 && sizes({a.batch, a.window}) && sizes({a.batch, a.padded}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.total >= 1 && a.padded - a.window >= a.total, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.kv_rows >= 0 && a.kv_rows <= LARGEST_SIZE, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.batch ? a.kv_rows % a.batch == 0 : a.kv_rows == 0, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(given(a.batch, {a.decided, a.accepted, a.fault, a.tokens, a.lengths, a.steps, a.done, a.failed}),
                 SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(a.batch, {a.failed_step, a.histogram}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(a.kv_rows, {a.kv_lengths}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(within(a.accepted, a.batch, 0, a.window + 1), SJD2_ERROR_INDEX);
    SJD2_REQUIRE(within(a.lengths, a.batch, 0, a.total + 1), SJD2_ERROR_INDEX);
    return SJD2_OK;
}

int64_t sjd2_commit(const sjd2_commit_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_commit_params &a = *params;
    const int64_t status = check_commit(a);
    if (status != SJD2_OK) return status;
    for (int64_t row = 0; row < a.batch; ++row) {
        const int32_t accepted = a.accepted[row];
        const bool live = a.done[row] == 0, failing = a.fault[row] >= 0;
        memcpy(a.tokens + row * a.padded + a.lengths[row], a.decided + row * a.window,
               sizeof(int64_t) * (size_t)accepted);
        a.histogram[row * (a.window + 1) + accepted] += live;
        if (failing) a.failed[row] = a.fault[row], a.failed_step[row] = a.steps[row];
        a.lengths[row] += accepted;
        a.steps[row] += live;
        a.done[row] |= failing || a.lengths[row] >= a.total;
    }
    for (int64_t i = 0; i < a.kv_rows; ++i) a.kv_lengths[i] += a.accepted[i % a.batch];
    return SJD2_OK;
}

// ------------------------------------------------------------------ refine

// What becomes of draft j of a row after the shift.
struct Shifted {
    int64_t source;            // slot of its prediction, and the draft it was before, where there are such
    int64_t position, token;
    bool predicted, carried;   // whether there is a prediction, an embedding from before
    bool settled, certain;     // settled: accepted while noisy; certain: has no more noise to lose
};

static Shifted shifted(const sjd2_refine_params &a, int64_t row, int64_t j) {
    Shifted s;
    s.source = a.accepted[row] + j;
    s.position = a.lengths[row] + j;
    s.predicted = s.source < a.window;
    s.carried = s.source < a.window - 1;
    s.settled = s.predicted && s.source < a.settled[row];
    const int64_t known = a.forced[s.position];
    s.certain = known >= 0 || s.settled;
    s.token = known >= 0    ? known
              : s.predicted ? a.decided[row * a.window + s.source]
                            : a.initial[row * a.padded + s.position];
    return s;
}

static void shift_q(const sjd2_refine_params &a) {
    const int64_t drafts = a.window - 1;
    parallel(a.batch * drafts, 0.15 * (double)a.vocab, a.threads, [&](int64_t unit, int64_t) {
        const int64_t row = unit / drafts, source = least(a.accepted[row] + unit % drafts, drafts);
        memcpy(a.q + unit * a.vocab, a.p + (row * a.window + source) * a.vocab, sizeof(float) * (size_t)a.vocab);
    });
}

// Denoise and refill. Drafts move towards the front, so in ascending order none is overwritten before it is read.
static void shift_embeddings(const sjd2_refine_params &a) {
    const int64_t drafts = a.window - 1, parts = (a.dim + DIMS_AT_A_TIME - 1) / DIMS_AT_A_TIME;
    const double cost = 0.5 * (double)drafts * (double)least(a.dim, DIMS_AT_A_TIME);
    const Kernels &k = kernels();
    parallel(a.batch * parts, cost, a.threads, [&](int64_t unit, int64_t) {
        const int64_t row = unit / parts, begin = unit % parts * DIMS_AT_A_TIME;
        const Dims dims{begin, least(begin + DIMS_AT_A_TIME, a.dim), a.mean, a.std, a.type};
        float *noisy = a.noisy + row * drafts * a.dim;
        for (int64_t j = 0; j < drafts; ++j) {
            const Shifted s = shifted(a, row, j);
            float *out = noisy + j * a.dim;
            if (s.carried) {
                const int32_t level = a.levels[row * drafts + s.source];
                k.denoise(dims, (const char *)a.table + s.token * a.dim * bytes_of(a.type), noisy + s.source * a.dim,
                          a.ratios[level > 0 ? level : 0], out);
            } else if (a.noise) {
                memcpy(out + begin, a.noise + (row * a.padded + s.position) * a.dim + begin,
                       sizeof(float) * (size_t)(dims.end - begin));
            } else {
                k.fresh(dims, Key{(uint64_t)a.seeds[row], (uint32_t)s.position, 0, SJD2_NOISE}, out);
            }
        }
    });
}

static void shift_counters(const sjd2_refine_params &a, int64_t row) {
    const int64_t drafts = a.window - 1;
    int32_t *levels = a.levels + row * drafts;
    for (int64_t j = 0; j < drafts; ++j) {
        const Shifted s = shifted(a, row, j);
        a.drafts[row * drafts + j] = s.token;
        a.status[row * drafts + j] = s.predicted ? (a.noisy && s.settled ? SJD2_SETTLED : SJD2_TRACKED) : SJD2_FRESH;
        if (!a.noisy) continue;
        const int32_t lower = !s.carried ? (int32_t)a.fresh_level : levels[s.source] > 0 ? levels[s.source] - 1 : -1;
        levels[j] = s.certain ? -1 : lower;
    }
}

int64_t sjd2_refine_workspace(int64_t batch, int64_t window, int64_t vocab) {
    if (window < 1 || vocab < 1 || vocab > LARGEST_VOCAB || !sizes({batch, window, vocab})) return -1;
    return batch * (window - 1) * ((vocab + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME) * (int64_t)sizeof(Best);
}

// The best of rows [begin, end) for every noisy draft, into best[draft * stride].
static void search(const sjd2_refine_params &a, int64_t begin, int64_t end, int64_t stride, Best *best) {
    const int64_t drafts = a.batch * (a.window - 1);
    const Kernels &k = kernels();
    for (int64_t draft = 0; draft < drafts; ++draft) best[draft * stride] = Best{-scalar::infinity(), 0};
    for (int64_t first = begin; first < end; first += ROWS_IN_CACHE) {
        const float *embeddings[NEAREST_TILE];
        Best *places[NEAREST_TILE], found[NEAREST_TILE];
        int tile = 0;
        for (int64_t draft = 0; draft < drafts; ++draft) {
            if (a.levels[draft] >= 0) {
                embeddings[tile] = a.noisy + draft * a.dim;
                places[tile] = best + draft * stride;
                found[tile] = *places[tile];
                ++tile;
            }
            if (tile == 0 || (tile < NEAREST_TILE && draft + 1 < drafts)) continue;
            k.nearest(a.directions + first * a.dim, least(ROWS_IN_CACHE, end - first), a.dim, (int32_t)first,
                      embeddings, tile, found);
            for (int n = 0; n < tile; ++n) *places[n] = found[n];
            tile = 0;
        }
    }
}

// Noisy drafts take the token whose row is nearest by angle; the first of equals.
static void take_nearest(const sjd2_refine_params &a) {
    const int64_t drafts = a.batch * (a.window - 1), parts = (a.vocab + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    Best *best = (Best *)a.workspace;
    const double cost = 0.1 * (double)drafts * (double)a.dim * (double)least(a.vocab, ROWS_AT_A_TIME);
    parallel(parts, cost, a.threads, [&](int64_t part, int64_t) {
        search(a, part * ROWS_AT_A_TIME, least((part + 1) * ROWS_AT_A_TIME, a.vocab), parts, best + part);
    });
    for (int64_t draft = 0; draft < drafts; ++draft) {
        if (a.levels[draft] < 0) continue;
        Best top = best[draft * parts];
        for (int64_t part = 1; part < parts; ++part)
            if (best[draft * parts + part].value > top.value) top = best[draft * parts + part];
        a.drafts[draft] = top.index;
    }
}

static int64_t check_refine(const sjd2_refine_params &a) {
    SJD2_REQUIRE(a.window >= 1 && sizes({a.batch, a.window, a.vocab}) && a.vocab <= LARGEST_VOCAB, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(sizes({a.batch, a.padded}) && a.padded >= a.window && a.threads >= 0, SJD2_ERROR_SIZE);
    const int64_t drafts = a.window - 1, count = a.batch * drafts;
    SJD2_REQUIRE(given(count, {a.decided, a.accepted, a.settled, a.lengths, a.forced, a.initial}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(given(count, {a.drafts, a.status, a.levels}), SJD2_ERROR_NULL);
    SJD2_REQUIRE((a.p && a.vocab) || !a.q, SJD2_ERROR_NULL);
    if (count == 0) return SJD2_OK;
    SJD2_REQUIRE(within(a.accepted, a.batch, 0, a.window + 1), SJD2_ERROR_INDEX);
    SJD2_REQUIRE(within(a.lengths, a.batch, 0, a.padded - drafts + 1), SJD2_ERROR_INDEX);
    if (!a.noisy) return SJD2_OK;
    SJD2_REQUIRE(sizes({a.batch, a.window, a.dim}) && sizes({a.rows, a.dim}) && a.dim >= 1, SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.level_count >= 1 && sizes({a.level_count}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(!a.noise || sizes({a.batch, a.padded, a.dim}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(known_type(a.type), SJD2_ERROR_VALUE);
    SJD2_REQUIRE(a.fresh_level >= -1 && a.fresh_level < a.level_count, SJD2_ERROR_VALUE);
    SJD2_REQUIRE(given(1, {a.table, a.mean, a.std, a.ratios, a.seeds}), SJD2_ERROR_NULL);
    SJD2_REQUIRE(within(a.levels, count, INT32_MIN, a.level_count), SJD2_ERROR_INDEX);
    for (int64_t draft = 0; draft < count; ++draft) {
        const int64_t token = shifted(a, draft / drafts, draft % drafts).token;
        SJD2_REQUIRE(token >= 0 && token < a.rows, SJD2_ERROR_INDEX);
    }
    if (!a.directions) return SJD2_OK;
    SJD2_REQUIRE(a.vocab >= 1 && sizes({a.vocab, a.dim}), SJD2_ERROR_SIZE);
    SJD2_REQUIRE(a.workspace, SJD2_ERROR_NULL);
    SJD2_REQUIRE(a.workspace_size >= sjd2_refine_workspace(a.batch, a.window, a.vocab), SJD2_ERROR_WORKSPACE);
    return SJD2_OK;
}

int64_t sjd2_refine(const sjd2_refine_params *params) {
    SJD2_REQUIRE_STRUCT(params);
    const sjd2_refine_params &a = *params;
    const int64_t status = check_refine(a);
    if (status != SJD2_OK || a.batch * (a.window - 1) == 0) return status;
    if (a.q) shift_q(a);
    if (a.noisy) shift_embeddings(a);
    for (int64_t row = 0; row < a.batch; ++row) shift_counters(a, row);
    if (a.noisy && a.directions) take_nearest(a);
    return SJD2_OK;
}
