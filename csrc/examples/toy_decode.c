/* A whole decoder in C: sjd2.h, a toy model, nothing else.
 *
 *     cc -std=c99 -I csrc csrc/examples/toy_decode.c path/to/libsjd2.so -o toy_decode
 *     ./toy_decode jacobi 8 17 18        (decoder: ar, jacobi or sjd; slots of the window; one seed per picture)
 *
 * Prints one line per picture: how many forward passes it took, then its tokens. The same seeds give the tokens of
 * JacobiWindow in Python.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sjd2.h"

enum {
    HEIGHT = 4, WIDTH = 4,
    VOCAB = 16,                       /* image ids; id 16 is the end-of-line token */
    ROWS = VOCAB + 1,
    DIM = 2,
    TOTAL = HEIGHT * (WIDTH + 1),     /* every line of image tokens ends with a forced token */
    MAX_WINDOW = 32, MAX_BATCH = 8,
    PADDED = TOTAL + MAX_WINDOW
};

static void check(int64_t status, const char *what) {
    if (status == SJD2_OK) return;
    fprintf(stderr, "%s: %s\n", what, sjd2_status_string(status));
    exit(1);
}

/* ------------------------------------------------------------------ the model
 *
 * Its state is a hash of everything before; an input's first dimension is its symbol. As a real model it keeps what
 * it has read in a cache: entry 0 is the prompt's last token. Overwriting entries is all that a rollback takes. */

static uint32_t cache[MAX_BATCH][1 + PADDED];

static uint32_t mix(uint32_t state, uint32_t symbol) {
    state = (state ^ symbol) * 2654435761u + 0x9E3779B9u;
    return state ^ (state >> 15);
}

/* Logits of `window` inputs behind `length` accepted tokens. */
static void model(int64_t image, int32_t length, int64_t window, const float *embeds, float *logits) {
    uint32_t state = length > 0 ? cache[image][length - 1] : 0;
    for (int64_t slot = 0; slot < window; ++slot) {
        state = mix(state, (uint32_t)embeds[slot * DIM]);
        cache[image][length + slot] = state;
        for (uint32_t id = 0; id < VOCAB; ++id) logits[slot * VOCAB + id] = (float)(mix(state, id) >> 27) / 8.0f;
    }
}

/* ------------------------------------------------------------------ the window's state */

static int64_t seeds[MAX_BATCH], tokens[MAX_BATCH * PADDED], initial[MAX_BATCH * PADDED], forced[PADDED];
static int32_t lengths[MAX_BATCH], steps[MAX_BATCH], done[MAX_BATCH], failed[MAX_BATCH], failed_step[MAX_BATCH];
static int64_t drafts[MAX_BATCH * MAX_WINDOW], histogram[MAX_BATCH * (MAX_WINDOW + 1)];
static int32_t draft_status[MAX_BATCH * MAX_WINDOW], levels[MAX_BATCH * MAX_WINDOW];
static float q[MAX_BATCH * MAX_WINDOW * VOCAB];

/* What a step hands from op to op. */
static int64_t inputs[MAX_BATCH * MAX_WINDOW], drawn[MAX_BATCH * MAX_WINDOW], decided[MAX_BATCH * MAX_WINDOW];
static int32_t accepted[MAX_BATCH], settled[MAX_BATCH], fault[MAX_BATCH];
static float embeds[MAX_BATCH * MAX_WINDOW * DIM], logits[MAX_BATCH * MAX_WINDOW * VOCAB];
static float p[MAX_BATCH * MAX_WINDOW * VOCAB], table[ROWS * DIM], start[MAX_BATCH * DIM];
static uint8_t bad[MAX_BATCH * MAX_WINDOW];
static float workspace[4096];

static void begin(int64_t batch, int64_t window, int64_t padded) {
    static int64_t positions[MAX_BATCH * PADDED];
    static float uniforms[MAX_BATCH * PADDED];
    for (int64_t i = 0; i < padded; ++i) forced[i] = i >= TOTAL ? 0 : i % (WIDTH + 1) == WIDTH ? VOCAB : -1;
    for (int64_t row = 0; row < ROWS; ++row) table[row * DIM] = (float)(row + 1);
    for (int64_t image = 0; image < batch; ++image) {
        start[image * DIM] = (float)(100 + image);
        failed[image] = failed_step[image] = -1;
        for (int64_t i = 0; i < padded; ++i) positions[image * padded + i] = i, tokens[image * padded + i] = -1;
    }
    sjd2_random_params random = {0};
    random.size = sizeof random, random.batch = batch, random.length = padded, random.count = 1;
    random.distribution = SJD2_UNIFORM, random.purpose = SJD2_INIT;
    random.seeds = seeds, random.positions = positions, random.out = uniforms;
    check(sjd2_random(&random), "random");
    for (int64_t i = 0; i < batch * padded; ++i)
        initial[i] = forced[i % padded] >= 0 ? forced[i % padded] : (int64_t)(uniforms[i] * VOCAB);
    for (int64_t image = 0; image < batch; ++image)
        memcpy(drafts + image * (window - 1), initial + image * padded, sizeof(int64_t) * (size_t)(window - 1));
}

/* Slot 0: the last accepted token, or -1 for the prompt's; then the drafts. */
static void gather_inputs(int64_t batch, int64_t window, int64_t padded) {
    for (int64_t image = 0; image < batch; ++image) {
        inputs[image * window] = lengths[image] ? tokens[image * padded + lengths[image] - 1] : -1;
        memcpy(inputs + image * window + 1, drafts + image * (window - 1), sizeof(int64_t) * (size_t)(window - 1));
    }
}

static void step(int64_t batch, int64_t window, int64_t rule) {
    const int64_t padded = TOTAL + window;

    sjd2_embed_window_params embed = {0};
    embed.size = sizeof embed, embed.batch = batch, embed.window = window, embed.dim = DIM, embed.rows = ROWS;
    embed.type = SJD2_FLOAT32, embed.tokens = inputs, embed.table = table, embed.start = start, embed.out = embeds;
    gather_inputs(batch, window, padded);
    check(sjd2_embed_window(&embed), "embed_window");

    for (int64_t image = 0; image < batch; ++image)
        model(image, lengths[image], window, embeds + image * window * DIM, logits + image * window * VOCAB);

    sjd2_sample_window_params sample = {0};
    sample.size = sizeof sample, sample.batch = batch, sample.window = window, sample.vocab = VOCAB;
    sample.type = SJD2_FLOAT32, sample.legal_end = VOCAB, sample.per_position = rule == SJD2_MATCH;
    sample.guidance = 1.0, sample.temperature = 1.0, sample.top_p = 1.0, sample.logits = logits;
    sample.seeds = seeds, sample.lengths = lengths, sample.steps = steps, sample.tokens = drawn, sample.bad = bad;
    sample.p = rule == SJD2_MATCH ? NULL : p;
    sample.workspace = workspace, sample.workspace_size = sizeof workspace;
    check(sjd2_sample_window(&sample), "sample_window");

    sjd2_verify_params verify = {0};
    verify.size = sizeof verify, verify.batch = batch, verify.window = window, verify.vocab = VOCAB;
    verify.padded = padded, verify.total = TOTAL, verify.rule = rule, verify.tokens = drawn, verify.p = p;
    verify.bad = bad, verify.drafts = drafts, verify.q = q, verify.status = draft_status, verify.levels = levels;
    verify.forced = forced, verify.lengths = lengths, verify.steps = steps, verify.done = done, verify.seeds = seeds;
    verify.decided = decided, verify.accepted = accepted, verify.settled = settled, verify.fault = fault;
    check(sjd2_verify(&verify), "verify");

    sjd2_commit_params commit = {0};
    commit.size = sizeof commit, commit.batch = batch, commit.window = window, commit.padded = padded;
    commit.total = TOTAL, commit.decided = decided, commit.accepted = accepted, commit.fault = fault;
    commit.tokens = tokens, commit.lengths = lengths, commit.steps = steps, commit.done = done;
    commit.failed = failed, commit.failed_step = failed_step, commit.histogram = histogram;
    check(sjd2_commit(&commit), "commit");

    sjd2_refine_params refine = {0};
    refine.size = sizeof refine, refine.batch = batch, refine.window = window, refine.padded = padded;
    refine.decided = decided, refine.accepted = accepted, refine.settled = settled, refine.lengths = lengths;
    refine.forced = forced, refine.initial = initial, refine.drafts = drafts, refine.status = draft_status;
    refine.levels = levels, refine.vocab = VOCAB;
    if (rule != SJD2_MATCH) refine.p = p, refine.q = q;
    check(sjd2_refine(&refine), "refine");
}

int main(int count, char **arguments) {
    const int64_t batch = count - 3, window = count > 2 ? strtol(arguments[2], NULL, 10) : 0;
    if (batch < 1 || batch > MAX_BATCH || window < 1 || window > MAX_WINDOW) {
        fprintf(stderr, "usage: %s ar|jacobi|sjd WINDOW SEED…   (window up to %d, up to %d seeds)\n", arguments[0],
                MAX_WINDOW, MAX_BATCH);
        return 2;
    }
    const int64_t rule = strcmp(arguments[1], "sjd") ? SJD2_MATCH : SJD2_RATIO;
    const int64_t slots = strcmp(arguments[1], "ar") ? window : 1, padded = TOTAL + slots;
    for (int64_t image = 0; image < batch; ++image) seeds[image] = strtoll(arguments[3 + image], NULL, 10);
    for (int64_t image = 0; image < batch * slots; ++image) levels[image] = -1;

    begin(batch, slots, padded);
    for (int64_t working = batch; working > 0;) {
        step(batch, slots, rule);
        working = 0;
        for (int64_t image = 0; image < batch; ++image) working += !done[image];
    }
    for (int64_t image = 0; image < batch; ++image) {
        printf("%d", (int)steps[image]);
        for (int64_t i = 0; i < TOTAL; ++i) printf(" %d", (int)tokens[image * padded + i]);
        printf("\n");
    }
    return 0;
}
