// Loops over one row of the vocabulary. Included once per instruction set, after lanes.h: no include guard.
//
// Every loop runs over blocks of 64 with an accumulator per lane, so that the order of all sums and the winner of
// every tie are the same for each vector width.

namespace sjd2 {
namespace SJD2_ISA {

struct Lanes {
    float v[BLOCK];
};

struct Argmax {
    float value[BLOCK];
    int32_t block[BLOCK];
};

SJD2_FN void fill(Lanes &lanes, float value) {
    for (int k = 0; k < BLOCK; ++k) lanes.v[k] = value;
}

static float sum_of(Lanes &lanes) {
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) lanes.v[k] += lanes.v[k + half];
    return lanes.v[0];
}

static float max_of(Lanes &lanes) {
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) lanes.v[k] = lanes.v[k] > lanes.v[k + half] ? lanes.v[k] : lanes.v[k + half];
    return lanes.v[0];
}

SJD2_FN void start(Argmax &argmax) {
    for (int k = 0; k < BLOCK; ++k) argmax.value[k] = -infinity(), argmax.block[k] = 0;
}

SJD2_FN void offer(Argmax &argmax, const Lanes &lanes, int32_t block) {
    for (int k = 0; k < BLOCK; ++k) {
        const bool better = lanes.v[k] > argmax.value[k];
        argmax.value[k] = better ? lanes.v[k] : argmax.value[k];
        argmax.block[k] = better ? block : argmax.block[k];
    }
}

// The first index of the largest value; 0 when everything was -infinity.
static int64_t winner(const Argmax &argmax) {
    Lanes lanes;
    for (int k = 0; k < BLOCK; ++k) lanes.v[k] = argmax.value[k];
    const float top = max_of(lanes);
    if (top == -infinity()) return 0;
    int64_t first = INT64_MAX;
    for (int k = 0; k < BLOCK; ++k) {
        const int64_t index = (int64_t)argmax.block[k] * BLOCK + k;
        first = argmax.value[k] == top && index < first ? index : first;
    }
    return first;
}

// ------------------------------------------------------------------ random numbers

// Uniforms of the indices 64 block … 64 block + 63.
SJD2_FN void uniform_block(Key key, int64_t block, float *out) {
    uint32_t bits[BLOCK];
    philox_block(key, block, bits);
    for (int k = 0; k < BLOCK; ++k) out[k] = uniform_of(bits[k]);
}

// Uniforms (2m, 2m+1) make normals (2m, 2m+1).
SJD2_FN void normal_block(Key key, int64_t block, float *out) {
    uniform_block(key, block, out);
    for (int m = 0; m < BLOCK / 2; ++m) normal_pair(out[2 * m], out[2 * m + 1], &out[2 * m], &out[2 * m + 1]);
}

static void random_row(Key key, int64_t distribution, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += BLOCK) {
        Lanes lanes;
        if (distribution == SJD2_NORMAL) normal_block(key, i / BLOCK, lanes.v);
        else uniform_block(key, i / BLOCK, lanes.v);
        if (distribution == SJD2_GUMBEL)
            for (int k = 0; k < BLOCK; ++k) lanes.v[k] = gumbel_of(lanes.v[k]);
        memcpy(out + i, lanes.v, sizeof(float) * (size_t)(count - i < BLOCK ? count - i : BLOCK));
    }
}

// ------------------------------------------------------------------ loading

template <class T>
SJD2_FN void widen(const T *from, int64_t type, float *out) {
    if (sizeof(T) == 4) memcpy(out, from, sizeof(float) * BLOCK);
    else if (type == SJD2_BFLOAT16)
        for (int k = 0; k < BLOCK; ++k) out[k] = float_of_bfloat((uint16_t)from[k]);
    else
        for (int k = 0; k < BLOCK; ++k) out[k] = float_of_half((uint16_t)from[k]);
}

template <class T>
SJD2_FN void load_typed(const T *from, int64_t type, int64_t count, float rest, float *out) {
    if (count >= BLOCK) return widen(from, type, out);
    T held[BLOCK] = {};
    memcpy(held, from, sizeof(T) * (size_t)count);
    widen(held, type, out);
    for (int64_t k = count; k < BLOCK; ++k) out[k] = rest;
}

// Float32 of the block at index i; what lies behind `count` is `rest`.
SJD2_FN void load_block(const void *row, int64_t type, int64_t i, int64_t count, float rest, float *out) {
    if (type == SJD2_FLOAT32) load_typed((const uint32_t *)row + i, type, count, rest, out);
    else load_typed((const uint16_t *)row + i, type, count, rest, out);
}

struct Extent {
    int64_t first, last;  // whole blocks that hold the legal ids
    float top;
    bool has_nan;
};

// The guided logits of the legal ids go to row.x, -infinity elsewhere in their blocks.
static Extent load_row(const SampleRow &row) {
    const int64_t first = row.begin / BLOCK * BLOCK, last = padded_to_block(row.end);
    const float guidance = row.guidance;
    Lanes top, x, other;
    int32_t nan[BLOCK] = {};
    fill(top, -infinity());
    for (int64_t i = first; i < last; i += BLOCK) {
        const int64_t count = row.vocab - i < BLOCK ? row.vocab - i : BLOCK;
        load_block(row.cond, row.type, i, count, -infinity(), x.v);
        if (row.uncond) {
            load_block(row.uncond, row.type, i, count, -infinity(), other.v);
            for (int k = 0; k < BLOCK; ++k) {
                const float c = x.v[k], u = other.v[k];
                // -infinity in either set masks, unless the other one is NaN; no && here, for it is a branch
                const int numbers = (c == c) & (u == u), hidden = (c == -infinity()) + (u == -infinity());
                x.v[k] = select((numbers & (hidden > 0)) != 0, -infinity(), u + guidance * (c - u));
            }
        }
        for (int64_t k = 0; k < row.begin - i && k < BLOCK; ++k) x.v[k] = -infinity();
        for (int64_t k = row.end - i > 0 ? row.end - i : 0; k < BLOCK; ++k) x.v[k] = -infinity();
        for (int k = 0; k < BLOCK; ++k) {
            nan[k] |= x.v[k] != x.v[k];
            top.v[k] = x.v[k] > top.v[k] ? x.v[k] : top.v[k];
        }
        memcpy(row.x + i, x.v, sizeof x.v);
    }
    int32_t any = 0;
    for (int k = 0; k < BLOCK; ++k) any |= nan[k];
    return Extent{first, last, max_of(top), any != 0};
}

// ------------------------------------------------------------------ truncation

struct Above {
    float count, weight;
};

// How many values lie above `bound`, and their sum.
static Above above(const float *y, const Extent &extent, float bound) {
    Lanes count, weight;
    fill(count, 0.0f), fill(weight, 0.0f);
    for (int64_t i = extent.first; i < extent.last; i += BLOCK)
        for (int k = 0; k < BLOCK; ++k) {
            const bool over = y[i + k] > bound;
            count.v[k] += select(over, 1.0f, 0.0f);
            weight.v[k] += select(over, y[i + k], 0.0f);
        }
    return Above{sum_of(count), sum_of(weight)};
}

static float smallest_above(const float *y, const Extent &extent, float bound) {
    Lanes smallest;
    fill(smallest, -infinity());
    for (int64_t i = extent.first; i < extent.last; i += BLOCK)
        for (int k = 0; k < BLOCK; ++k) {
            const float value = select(y[i + k] > bound, -y[i + k], -infinity());
            smallest.v[k] = value > smallest.v[k] ? value : smallest.v[k];
        }
    return -max_of(smallest);
}

// The smallest value t in y such that what lies above t is less than `limit`: with MASS its sum (the nucleus), else
// its number (the k-th largest value). `top` is the largest value, `all` what everything amounts to.
//
// The answer is in (low, high], on the order of floats; guesses alternate between interpolation and bisection until
// a single value is left there.
template <bool MASS>
static float threshold(const float *y, const Extent &extent, float top, float all, float limit) {
    int64_t low = (int64_t)order_of(MASS ? 0.0f : -infinity()) - 1, high = order_of(top);
    Above at_low{infinity(), all}, at_high{0.0f, 0.0f};
    for (int pass = 0; high - low > 1 && at_low.count - at_high.count > 1.0f; ++pass) {
        const float from = float_of_order((int32_t)low), to = float_of_order((int32_t)high);
        const float rest = MASS ? at_low.weight - limit : at_low.count - limit;
        const float range = MASS ? at_low.weight - at_high.weight : at_low.count - at_high.count;
        float guess = from + (to - from) * (rest / range);
        const bool inside = guess > from && guess < to && order_of(guess) > low;
        if (pass % 2 || !inside) guess = float_of_order((int32_t)(low + (high - low) / 2));
        const Above at_guess = above(y, extent, guess);
        if ((MASS ? at_guess.weight : at_guess.count) < limit) high = order_of(guess), at_high = at_guess;
        else low = order_of(guess), at_low = at_guess;
    }
    return high - low > 1 ? smallest_above(y, extent, float_of_order((int32_t)low)) : float_of_order((int32_t)high);
}

// Tokens whose y lies below the threshold leave: x = -infinity.
static void mask_below(const Extent &extent, const float *y, float least, float *x) {
    for (int64_t i = extent.first; i < extent.last; ++i) x[i] = y[i] >= least ? x[i] : -infinity();
}

// e = exp(x - top); returns the sum.
static float exponentials(const Extent &extent, const float *__restrict x, float *__restrict e) {
    Lanes sum;
    fill(sum, 0.0f);
    const float top = extent.top;
    for (int64_t i = extent.first; i < extent.last; i += BLOCK)
        for (int k = 0; k < BLOCK; ++k) {
            e[i + k] = exp_of(x[i + k] - top);
            sum.v[k] += e[i + k];
        }
    return sum_of(sum);
}

// ------------------------------------------------------------------ drawing

// Whether any of these tokens can beat the best score so far. A score log(w) + g beats the bar b when the exponential
// behind its Gumbel noise is below w exp(-b); the exponential is at least the uniform number that it is made of.
SJD2_FN bool any_can_win(const float *u, const float *w, float exp_of_minus_bar) {
    int32_t any = 0;
    for (int k = 0; k < BLOCK; ++k) any |= u[k] < w[k] * exp_of_minus_bar;
    return any != 0;
}

// exp(shift - bar) for the best score so far, with room for the rounding of scores of this size.
static float odds(const Argmax &best, float shift) {
    Lanes values;
    for (int k = 0; k < BLOCK; ++k) values.v[k] = best.value[k];
    const float bar = max_of(values);
    return expf(shift - bar + 1e-3f + 1e-6f * fabsf(bar));
}

// argmax(x + Gumbel noise), where e = exp(x - top). Only blocks that can still win pay for the noise's logarithms.
static int64_t draw(const SampleRow &row, const Extent &extent) {
    Argmax best;
    start(best);
    float limit = infinity();
    for (int64_t i = extent.first; i < extent.last; i += BLOCK) {
        Lanes g;
        if (row.noise) {
            load_block(row.noise, SJD2_FLOAT32, i, row.vocab - i < BLOCK ? row.vocab - i : BLOCK, 0.0f, g.v);
        } else {
            uniform_block(row.key, i / BLOCK, g.v);
            if (!any_can_win(g.v, row.e + i, limit)) continue;
            for (int k = 0; k < BLOCK; ++k) g.v[k] = gumbel_of(g.v[k]);
        }
        for (int k = 0; k < BLOCK; ++k) g.v[k] += row.x[i + k];
        offer(best, g, (int32_t)(i / BLOCK));
        limit = odds(best, extent.top);
    }
    return winner(best);
}

static void write_p(const SampleRow &row, float scale) {
    const float *__restrict e = row.e;
    float *__restrict p = row.p;
    memset(row.p, 0, sizeof(float) * (size_t)row.begin);
    for (int64_t i = row.begin; i < row.end; ++i) p[i] = e[i] * scale;
    memset(row.p + row.end, 0, sizeof(float) * (size_t)(row.vocab - row.end));
}

// Largest logit: the first NaN if there is one, else the first maximum; 0 when no logit is finite.
static int64_t greedy(const SampleRow &row, const Extent &extent) {
    for (int64_t i = row.begin; i < row.end; ++i) {
        const float x = row.x[i];
        if (extent.has_nan ? x != x : x == extent.top && x != -infinity()) return i;
    }
    return 0;
}

static Sampled sample_row(const SampleRow &row) {
    Extent extent = load_row(row);
    const bool bad = extent.has_nan || extent.top == infinity() || extent.top == -infinity();
    if (row.temperature == 0.0f) {
        const int64_t token = greedy(row, extent);
        if (row.p) {
            memset(row.p, 0, sizeof(float) * (size_t)row.vocab);
            row.p[token] = 1.0f;
        }
        return Sampled{token, bad};
    }
    if (row.temperature != 1.0f && !bad) {
        const float temperature = row.temperature;
        for (int64_t i = extent.first; i < extent.last; ++i) row.x[i] /= temperature;
        extent.top /= temperature;
    }
    if (bad || extent.top == infinity() || extent.top == -infinity()) {
        if (row.p)
            for (int64_t i = 0; i < row.vocab; ++i) row.p[i] = not_a_number();
        return Sampled{greedy(row, extent), bad};
    }
    const float ids = (float)(row.end - row.begin), top_k = (float)row.top_k;
    if (0.0f < top_k && top_k < ids)
        mask_below(extent, row.x, threshold<false>(row.x, extent, extent.top, ids, top_k), row.x);
    float sum = exponentials(extent, row.x, row.e);
    if (row.top_p < 1.0f) {
        mask_below(extent, row.e, threshold<true>(row.e, extent, 1.0f, sum, row.top_p * sum), row.x);
        sum = exponentials(extent, row.x, row.e);
    }
    if (row.p) write_p(row, 1.0f / sum);
    return Sampled{draw(row, extent), bad};
}

static int64_t residual(const float *p, const float *q, int64_t vocab, Key key) {
    int32_t some = 0, nan = 0, p_nan = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        const float excess = p[i] - q[i];
        some |= excess > 0.0f;
        nan |= excess != excess;
        p_nan |= p[i] != p[i];
    }
    if (p_nan)
        for (int64_t i = 0; i < vocab; ++i)
            if (p[i] != p[i]) return i;
    const bool use_p = nan || !some;
    Argmax best;
    start(best);
    float limit = infinity();
    for (int64_t i = 0; i < vocab; i += BLOCK) {
        const int64_t count = vocab - i < BLOCK ? vocab - i : BLOCK;
        Lanes weight, draft, g;
        load_block(p, SJD2_FLOAT32, i, count, 0.0f, weight.v);
        load_block(q, SJD2_FLOAT32, i, count, 0.0f, draft.v);
        for (int k = 0; k < BLOCK; ++k) {
            const float excess = weight.v[k] - draft.v[k];
            weight.v[k] = select(use_p, weight.v[k], select(excess > 0.0f, excess, 0.0f));
        }
        uniform_block(key, i / BLOCK, g.v);
        if (!any_can_win(g.v, weight.v, limit)) continue;
        for (int k = 0; k < BLOCK; ++k) g.v[k] = gumbel_of(g.v[k]) + log_of(weight.v[k]);
        offer(best, g, (int32_t)(i / BLOCK));
        limit = odds(best, 0.0f);
    }
    return winner(best);
}

}  // namespace SJD2_ISA
}  // namespace sjd2
