/* sjd2::Window, the decoders of sjd2.h behind one C++17 class: it owns the drafts, the caller owns the model.
 *
 *     sjd2::Options options;
 *     options.decoder = sjd2::Decoder::jacobi;
 *     sjd2::Window window(options, sjd2::Layout::raster(16, 16, 512), {seed});
 *     while (!window.done()) {
 *         my_model(window.input_tokens(), window.input_positions(), logits);  // [B, W] each -> [B, W, V]
 *         window.step(logits);                                 // then keep prompt_len - 1 + lengths()[b] entries
 *     }
 *     window.tokens(0);                                        // the ids of the first picture
 *
 * Same names, defaults and tokens as JacobiWindow in Python. Link the library that implements sjd2.h. Views stay
 * valid until the next call that is not const. Everything that fails throws sjd2::Error, before anything is changed.
 * A window is one decode: use as many as there are threads, but each from one thread at a time.
 */
#ifndef SJD2_HPP
#define SJD2_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sjd2.h"

namespace sjd2 {

/* What went wrong; `status` is that of the C function, or SJD2_ERROR_VALUE or SJD2_ERROR_SIZE of a check in here. */
class Error : public std::runtime_error {
public:
    Error(int64_t code, const std::string &message) : std::runtime_error(message), status(code) {}
    int64_t status;
};

inline void check(int64_t status, const char *function) {
    if (status != SJD2_OK) throw Error(status, std::string(function) + ": " + sjd2_status_string(status));
}

inline void expect(bool holds, int64_t status, const std::string &message) {
    if (!holds) throw Error(status, message);
}

/* A view of `size` neighbouring values; std::span before C++20. Made from anything with data() and size(). */
template <class T> class Span {
public:
    constexpr Span(T *data = nullptr, size_t size = 0) : data_(data), size_(size) {}
    template <class Container,
              class = std::enable_if_t<std::is_convertible_v<decltype(std::declval<Container &>().data()), T *>>>
    constexpr Span(Container &container) : data_(container.data()), size_(container.size()) {}
    constexpr T *data() const { return data_; }
    constexpr size_t size() const { return size_; }
    constexpr T *begin() const { return data_; }
    constexpr T *end() const { return data_ + size_; }
    constexpr T &operator[](size_t index) const { return data_[index]; }

private:
    T *data_;
    size_t size_;
};

enum class Decoder { ar, jacobi, sjd, coupled, sjd2 };
enum class Verification { match, ratio, paper };
enum class Coupling { gumbel, maximal, none };

/* The options of a decode; names and defaults are those of DecodeConfig. */
struct Options {
    Decoder decoder = Decoder::ar;
    int64_t window = 32;                              /* slots; `ar` always uses one */
    int64_t denoise_levels = 5;                       /* sjd2 */
    double t_min = 0.05;                              /* sjd2: the smallest noise level */
    double guidance_scale = 1.0;                      /* with unconditional logits */
    double temperature = 1.0;                         /* 0: always the likeliest token */
    int64_t top_k = 0;
    double top_p = 1.0;
    Verification verification = Verification::match;  /* sjd2 */
    Coupling coupling = Coupling::gumbel;             /* coupled, and sjd2 unless in match */
    int64_t repeat_distance = 0;                      /* first drafts repeat the token so many positions before */
    bool noise_warmup = false;                        /* sjd2: the first window starts as noise */
    int64_t threads = 1;
};

/* A picture: one entry of `forced` per position, -1 for an image token, else the id of a structure token (from
 * `vocab` on). Only ids in [legal_begin, legal_end) are drawn; legal_end 0 stands for `vocab`. */
struct Layout {
    std::vector<int64_t> forced;
    int64_t vocab = 0, legal_begin = 0, legal_end = 0;

    /* `height` rows of `width` image tokens, each followed by a forced end-of-line token of id `vocab`. */
    static Layout raster(int64_t height, int64_t width, int64_t vocab) {
        Layout layout;
        for (int64_t row = 0; row < height; ++row) {
            layout.forced.insert(layout.forced.end(), static_cast<size_t>(width), -1);
            layout.forced.push_back(vocab);
        }
        layout.vocab = vocab;
        return layout;
    }
};

/* The model's input rows, which sjd2 needs and embed() reads; the caller keeps them alive. */
struct Embedding {
    const void *table = nullptr;  /* [rows, dim]: image ids, then structure ids */
    const void *start = nullptr;  /* [B, dim]: each prompt's last token */
    int64_t rows = 0, dim = 0;
    int64_t type = SJD2_FLOAT32;  /* of both; sjd2 takes SJD2_FLOAT32 here, or asks for mean and std too */
    const float *mean = nullptr;  /* [dim] of the image rows; null: computed from the table */
    const float *std = nullptr;
};

class Window {
public:
    /* One picture per seed (0 ... 2^63 - 1). */
    Window(const Options &options, const Layout &layout, const std::vector<int64_t> &seeds,
           const Embedding &embedding = {})
        : options_(options), embedding_(embedding), seeds_(seeds), forced_(layout.forced),
          batch_(static_cast<int64_t>(seeds.size())), width_(options.decoder == Decoder::ar ? 1 : options.window),
          vocab_(layout.vocab), legal_begin_(layout.legal_begin),
          legal_end_(layout.legal_end ? layout.legal_end : layout.vocab),
          total_(static_cast<int64_t>(layout.forced.size())), padded_(total_ + width_) {
        expect(batch_ >= 1, SJD2_ERROR_SIZE, "sjd2::Window: no seed was given, expected one per picture");
        expect(width_ >= 1 && width_ <= 4096, SJD2_ERROR_SIZE, "sjd2::Window: window is not in 1 ... 4096");
        expect(total_ >= 1 && vocab_ >= 1, SJD2_ERROR_SIZE, "sjd2::Window: the layout has no positions, or no ids");
        expect(0 <= legal_begin_ && legal_begin_ < legal_end_ && legal_end_ <= vocab_, SJD2_ERROR_VALUE,
               "sjd2::Window: legal ids are not a range inside the vocabulary");
        forced_.resize(static_cast<size_t>(padded_), 0);  /* padding counts as forced */
        plan();
        allocate();
        first_drafts();
        if (noisy_) first_noise();
        prepare();
    }

    Window(Window &&) = default;  /* buffers keep their addresses; a copy's views would not */
    Window &operator=(Window &&) = default;

    int64_t batch() const { return batch_; }
    int64_t width() const { return width_; }
    int64_t total() const { return total_; }
    int64_t vocab() const { return vocab_; }

    /* Inputs of the next forward pass, [B, W]. Slot 0 is the last accepted token, the others are drafts. */
    Span<const int64_t> input_tokens() const { return inputs_; }        /* ids; -1: noisy, or the prompt's last token */
    Span<const int64_t> input_positions() const { return positions_; }  /* -1: the prompt's; N and more: padding */
    Span<const int32_t> input_levels() const { return input_levels_; }  /* noise levels; -1 = clean */

    /* The same as model inputs [B, W, dim] in the embedding's type. */
    void embed(void *out) const {
        sjd2_embed_window_params call = {};
        call.size = sizeof call, call.batch = batch_, call.window = width_, call.dim = embedding_.dim;
        call.rows = embedding_.rows, call.type = embedding_.type, call.threads = options_.threads;
        call.tokens = inputs_.data(), call.levels = input_levels_.data(), call.table = embedding_.table;
        call.start = embedding_.start, call.out = out;
        if (noisy_) call.noisy = noise_.data(), call.mean = embedding_.mean, call.std = embedding_.std;
        check(sjd2_embed_window(&call), "sjd2_embed_window");
    }

    /* Take the model's output in: logits [B, W, V], or [2, B, W, V] = (conditional, unconditional).
     * Returns how many tokens each picture won, [B]. */
    Span<const int32_t> step(Span<const float> logits) {
        const size_t count = static_cast<size_t>(batch_ * width_ * vocab_);
        expect(logits.size() == count || logits.size() == 2 * count, SJD2_ERROR_SIZE,
               "sjd2::Window::step: " + std::to_string(logits.size()) + " logits, expected B W V = " +
                   std::to_string(count) + ", or twice that for (conditional, unconditional)");
        return step(logits.data(), logits.size() > count ? logits.data() + count : nullptr, SJD2_FLOAT32);
    }

    /* The same for logits of any type: SJD2_FLOAT32, SJD2_FLOAT16 or SJD2_BFLOAT16; `uncond` may be null. */
    Span<const int32_t> step(const void *logits, const void *uncond, int64_t type) {
        sample(logits, uncond, type);
        verify();
        commit();
        if (width_ > 1) refine();
        prepare();
        return accepted_;
    }

    /* Cache lengths [R * B] of the caller (conditional rows first), moved along by every step from now on. */
    void move_along(Span<int32_t> kv_lengths) {
        expect(kv_lengths.size() % seeds_.size() == 0, SJD2_ERROR_SIZE,
               "sjd2::Window::move_along: the number of lengths is no multiple of the pictures");
        kv_lengths_ = kv_lengths;
    }

    /* Whether every picture has ended. */
    bool done() const {
        return std::all_of(done_.begin(), done_.end(), [](int32_t flag) { return flag != 0; });
    }

    /* Tokens of one picture by position, structure tokens included; -1 where nothing is accepted yet. */
    Span<const int64_t> tokens(int64_t row) const {
        expect(row >= 0 && row < batch_, SJD2_ERROR_INDEX, "sjd2::Window::tokens: there is no such row");
        return {accepted_tokens_.data() + row * padded_, static_cast<size_t>(total_)};
    }

    Span<const int32_t> lengths() const { return lengths_; }          /* [B] accepted tokens */
    Span<const int32_t> steps() const { return steps_; }              /* [B] forward passes used */
    Span<const int32_t> failed() const { return failed_; }            /* [B] first position with bad logits, or -1 */
    Span<const int64_t> histogram() const { return histogram_; }      /* [B, W + 1] steps by accepted tokens */

private:
    void plan() {
        const bool sjd2 = options_.decoder == Decoder::sjd2, maximal = options_.coupling == Coupling::maximal;
        const bool ratio = options_.decoder == Decoder::coupled ||
                           (sjd2 && options_.verification == Verification::ratio);
        noisy_ = sjd2;
        paper_ = sjd2 && options_.verification == Verification::paper;
        expect(!paper_ || !maximal, SJD2_ERROR_VALUE, "sjd2::Window: paper redraws by its own rule, never maximally");
        rule_ = paper_ ? SJD2_PAPER : ratio && maximal ? SJD2_COUPLED
                : ratio || options_.decoder == Decoder::sjd ? SJD2_RATIO : SJD2_MATCH;
        per_position_ = rule_ == SJD2_MATCH || rule_ == SJD2_COUPLED ||
                        ((ratio || paper_) && options_.coupling == Coupling::gumbel);
    }

    void allocate() {
        const size_t b = seeds_.size(), w = static_cast<size_t>(width_), n = b * (w - 1);
        const size_t ids = rule_ == SJD2_MATCH ? 0 : static_cast<size_t>(vocab_);
        lengths_.assign(b, 0), steps_.assign(b, 0), done_.assign(b, 0);
        failed_.assign(b, -1), failed_step_.assign(b, -1), histogram_.assign(b * (w + 1), 0);
        accepted_tokens_.assign(b * forced_.size(), -1), initial_.assign(b * forced_.size(), 0);
        drafts_.assign(n, 0), status_.assign(n, SJD2_FRESH), levels_.assign(n, -1), q_.assign(n * ids, 0.0f);
        inputs_.assign(b * w, -1), positions_.assign(b * w, -1), input_levels_.assign(b * w, -1);
        drawn_.assign(b * w, 0), decided_.assign(b * w, 0), p_.assign(b * w * ids, 0.0f), bad_.assign(b * w, 0);
        accepted_.assign(b, 0), settled_.assign(b, 0), fault_.assign(b, 0);
        reserve(sjd2_sample_window_workspace(vocab_, std::max<int64_t>(options_.threads, 1)));
    }

    void reserve(int64_t bytes) {
        expect(bytes >= 0, SJD2_ERROR_SIZE, "sjd2::Window: the library cannot serve sizes as large as these");
        workspace_.resize(std::max(workspace_.size(), static_cast<size_t>(bytes) / sizeof(Line) + 1));
    }

    /* Random numbers [B, length, count] of the first `length` positions. */
    std::vector<float> random(int64_t length, int64_t count, int64_t distribution, int64_t purpose) const {
        std::vector<float> out(static_cast<size_t>(batch_ * length * count));
        std::vector<int64_t> positions(static_cast<size_t>(batch_ * length));
        for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(i) % length;
        sjd2_random_params call = {};
        call.size = sizeof call, call.batch = batch_, call.length = length, call.count = count;
        call.distribution = distribution, call.purpose = purpose, call.threads = options_.threads;
        call.seeds = seeds_.data(), call.positions = positions.data(), call.out = out.data();
        check(sjd2_random(&call), "sjd2_random");
        return out;
    }

    void first_drafts() {
        const std::vector<float> u = random(padded_, 1, SJD2_UNIFORM, SJD2_INIT);
        const int64_t ids = legal_end_ - legal_begin_;
        for (size_t i = 0; i < initial_.size(); ++i) {
            const int64_t known = forced_[i % forced_.size()];
            const int64_t drawn = static_cast<int64_t>(u[i] * static_cast<float>(ids));
            initial_[i] = known >= 0 ? known : std::min(drawn, ids - 1) + legal_begin_;
        }
        for (int64_t row = 0; row < batch_; ++row)
            std::copy_n(initial_.data() + row * padded_, width_ - 1, drafts_.data() + row * (width_ - 1));
    }

    void first_noise() {
        expect(options_.denoise_levels >= 1 && options_.t_min > 0.0 && options_.t_min < 1.0, SJD2_ERROR_VALUE,
               "sjd2::Window: expected denoise_levels >= 1 and t_min between 0 and 1");
        expect(embedding_.table && embedding_.start && embedding_.rows >= vocab_ && embedding_.dim >= 1,
               SJD2_ERROR_NULL, "sjd2::Window: the decoder sjd2 denoises embeddings, give it the model's");
        if (!embedding_.mean || !embedding_.std) statistics();
        if (width_ > 1) noise_ = random(width_ - 1, embedding_.dim, SJD2_NORMAL, SJD2_NOISE);
        /* Karras-spaced times from t_min to 1, and how much of a draft stays from one level to the next. */
        const int64_t count = options_.denoise_levels;
        const double low = std::pow(options_.t_min, 1.0 / 7.0);
        std::vector<float> times(static_cast<size_t>(count), 1.0f);
        for (int64_t k = 0; k + 1 < count; ++k)
            times[static_cast<size_t>(k)] = static_cast<float>(
                std::pow(low + (1.0 - low) * static_cast<double>(k) / static_cast<double>(count - 1), 7.0));
        ratios_.assign(static_cast<size_t>(count), 0.0f);
        for (size_t k = 1; k < times.size(); ++k) ratios_[k] = times[k - 1] / times[k];
        if (options_.noise_warmup)
            for (int64_t i = 0; i < batch_ * (width_ - 1); ++i)
                if (forced_[static_cast<size_t>(i % (width_ - 1))] < 0)
                    levels_[static_cast<size_t>(i)] = static_cast<int32_t>(count - 1);
        if (paper_) directions();
    }

    /* Mean and standard deviation of every dimension over the image rows. */
    void statistics() {
        expect(embedding_.type == SJD2_FLOAT32, SJD2_ERROR_VALUE,
               "sjd2::Window: statistics are computed from float32 tables only, give mean and std");
        const float *table = static_cast<const float *>(embedding_.table);
        mean_.resize(static_cast<size_t>(embedding_.dim)), std_.resize(mean_.size());
        for (int64_t d = 0; d < embedding_.dim; ++d) {
            double sum = 0.0, squares = 0.0;
            for (int64_t id = 0; id < vocab_; ++id) sum += static_cast<double>(table[id * embedding_.dim + d]);
            const double mean = sum / static_cast<double>(vocab_);
            for (int64_t id = 0; id < vocab_; ++id) {
                const double off = static_cast<double>(table[id * embedding_.dim + d]) - mean;
                squares += off * off;
            }
            mean_[static_cast<size_t>(d)] = static_cast<float>(mean);
            std_[static_cast<size_t>(d)] =
                std::max(static_cast<float>(std::sqrt(squares / static_cast<double>(vocab_))), 1e-6f);
        }
        embedding_.mean = mean_.data(), embedding_.std = std_.data();
    }

    /* Unit rows of the normalised vocabulary: in paper mode the token of a noisy draft is the nearest. */
    void directions() {
        expect(embedding_.type == SJD2_FLOAT32, SJD2_ERROR_VALUE, "sjd2::Window: paper takes float32 tables only");
        const int64_t dim = embedding_.dim;
        directions_.assign(static_cast<const float *>(embedding_.table),
                           static_cast<const float *>(embedding_.table) + vocab_ * dim);
        for (int64_t id = 0; id < vocab_; ++id) {
            float *row = directions_.data() + id * dim, squares = 0.0f;
            for (int64_t d = 0; d < dim; ++d) {
                row[d] = (row[d] - embedding_.mean[d]) / embedding_.std[d];
                squares += row[d] * row[d];
            }
            const float norm = std::max(std::sqrt(squares), 1e-12f);
            for (int64_t d = 0; d < dim; ++d) row[d] /= norm;
        }
        reserve(sjd2_refine_workspace(batch_, width_, vocab_));
    }

    /* Inputs of the next pass. */
    void prepare() {
        for (int64_t row = 0; row < batch_; ++row) {
            const int64_t length = lengths_[static_cast<size_t>(row)];
            for (int64_t slot = 0; slot < width_; ++slot) {
                const size_t i = static_cast<size_t>(row * width_ + slot);
                const size_t draft = static_cast<size_t>(row * (width_ - 1) + slot - 1);
                positions_[i] = length - 1 + slot;
                if (slot == 0) {
                    inputs_[i] = length ? accepted_tokens_[static_cast<size_t>(row * padded_ + length - 1)] : -1;
                } else {
                    input_levels_[i] = levels_[draft];
                    inputs_[i] = levels_[draft] >= 0 ? -1 : drafts_[draft];
                }
            }
        }
    }

    void sample(const void *logits, const void *uncond, int64_t type) {
        sjd2_sample_window_params call = {};
        call.size = sizeof call, call.batch = batch_, call.window = width_, call.vocab = vocab_, call.type = type;
        call.top_k = options_.top_k, call.legal_begin = legal_begin_, call.legal_end = legal_end_;
        call.per_position = per_position_, call.threads = options_.threads, call.guidance = options_.guidance_scale;
        call.temperature = options_.temperature, call.top_p = options_.top_p;
        call.logits = logits, call.uncond = uncond;
        call.seeds = seeds_.data(), call.lengths = lengths_.data(), call.steps = steps_.data();
        call.tokens = drawn_.data(), call.p = p_.empty() ? nullptr : p_.data(), call.bad = bad_.data();
        call.workspace = workspace_.data(), call.workspace_size = workspace_bytes();
        check(sjd2_sample_window(&call), "sjd2_sample_window");
    }

    void verify() {
        sjd2_verify_params call = {};
        call.size = sizeof call, call.batch = batch_, call.window = width_, call.vocab = p_.empty() ? 0 : vocab_;
        call.padded = padded_, call.total = total_, call.rule = rule_, call.threads = options_.threads;
        call.tokens = drawn_.data(), call.p = p_.data(), call.bad = bad_.data(), call.drafts = drafts_.data();
        call.q = q_.data(), call.status = status_.data(), call.levels = levels_.data(), call.forced = forced_.data();
        call.lengths = lengths_.data(), call.steps = steps_.data(), call.done = done_.data();
        call.seeds = seeds_.data(), call.decided = decided_.data(), call.accepted = accepted_.data();
        call.settled = settled_.data(), call.fault = fault_.data();
        check(sjd2_verify(&call), "sjd2_verify");
    }

    void commit() {
        sjd2_commit_params call = {};
        call.size = sizeof call, call.batch = batch_, call.window = width_, call.padded = padded_, call.total = total_;
        call.decided = decided_.data(), call.accepted = accepted_.data(), call.fault = fault_.data();
        call.tokens = accepted_tokens_.data(), call.lengths = lengths_.data(), call.steps = steps_.data();
        call.done = done_.data(), call.failed = failed_.data(), call.failed_step = failed_step_.data();
        call.histogram = histogram_.data(), call.kv_lengths = kv_lengths_.data();
        call.kv_rows = static_cast<int64_t>(kv_lengths_.size());
        check(sjd2_commit(&call), "sjd2_commit");
    }

    void refine() {
        repeat();
        sjd2_refine_params call = {};
        call.size = sizeof call, call.batch = batch_, call.window = width_, call.padded = padded_;
        call.threads = options_.threads, call.decided = decided_.data(), call.accepted = accepted_.data();
        call.settled = settled_.data(), call.lengths = lengths_.data(), call.forced = forced_.data();
        call.initial = initial_.data(), call.drafts = drafts_.data(), call.status = status_.data();
        call.levels = levels_.data(), call.seeds = seeds_.data(), call.fresh_level = -1;
        if (!p_.empty()) call.vocab = vocab_, call.p = p_.data(), call.q = q_.data();
        if (noisy_) {
            call.dim = embedding_.dim, call.rows = embedding_.rows, call.type = embedding_.type;
            call.level_count = options_.denoise_levels, call.fresh_level = options_.denoise_levels - 1;
            call.noisy = noise_.data(), call.table = embedding_.table, call.mean = embedding_.mean;
            call.std = embedding_.std, call.ratios = ratios_.data();
            if (paper_) call.vocab = vocab_, call.directions = directions_.data();
            call.workspace = workspace_.data(), call.workspace_size = workspace_bytes();
        }
        check(sjd2_refine(&call), "sjd2_refine");
    }

    /* Token drafts to come repeat what was accepted `repeat_distance` positions before them. */
    void repeat() {
        const int64_t distance = options_.repeat_distance;
        if (distance <= 0 || distance >= total_) return;
        for (int64_t i = distance; i < total_; ++i) {
            if (forced_[static_cast<size_t>(i)] >= 0 || forced_[static_cast<size_t>(i - distance)] >= 0) continue;
            for (int64_t row = 0; row < batch_; ++row) {
                const int64_t token = accepted_tokens_[static_cast<size_t>(row * padded_ + i - distance)];
                if (token >= 0) initial_[static_cast<size_t>(row * padded_ + i)] = token;
            }
        }
    }

    struct alignas(64) Line { unsigned char bytes[64]; };
    int64_t workspace_bytes() const { return static_cast<int64_t>(workspace_.size() * sizeof(Line)); }

    Options options_;
    Embedding embedding_;
    std::vector<int64_t> seeds_, forced_;
    int64_t batch_, width_, vocab_, legal_begin_, legal_end_, total_, padded_;
    int64_t rule_ = SJD2_MATCH;
    bool per_position_ = true, noisy_ = false, paper_ = false;

    /* The picture, the counters, the drafts. */
    std::vector<int64_t> accepted_tokens_, initial_, drafts_, histogram_;
    std::vector<int32_t> lengths_, steps_, done_, failed_, failed_step_, status_, levels_;
    std::vector<float> q_, noise_, mean_, std_, ratios_, directions_;
    Span<int32_t> kv_lengths_;

    /* What one step hands from op to op, and the inputs of the next pass. */
    std::vector<int64_t> inputs_, positions_, drawn_, decided_;
    std::vector<int32_t> input_levels_, accepted_, settled_, fault_;
    std::vector<float> p_;
    std::vector<uint8_t> bad_;
    std::vector<Line> workspace_;
};

}  // namespace sjd2

#endif
