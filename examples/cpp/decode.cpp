/* A whole decoder in C++: sjd2.hpp and a toy model, nothing else. CMakeLists.txt beside it says how to build it.
 *
 *     decode jacobi 8 17 18        (decoder, slots of the window, one seed per picture)
 *
 * Decoders: ar, jacobi, sjd, coupled, coupled:maximal, sjd2, sjd2:ratio, sjd2:paper. Prints one line per picture:
 * how many forward passes it took, then its tokens. The same seeds give the tokens of JacobiWindow in Python.
 */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "sjd2.hpp"

/* A model as the loop sees it: inputs behind a cache in, logits out. What it has read is a hash of everything before,
 * kept per picture and position, so that a rollback is nothing but reading an earlier entry. */
class ToyModel {
public:
    static constexpr int64_t kVocab = 16, kDim = 2, kRows = kVocab + 1;

    ToyModel(int64_t batch, int64_t positions, uint32_t prompt)
        : prompt_(prompt), stride_(positions + 1), cache_(static_cast<size_t>(batch * stride_)) {}

    /* Row `id` of the input table. */
    static float embedding(int64_t id, int64_t dim) {
        return dim == 0 ? static_cast<float>(id + 1) : static_cast<float>(id * 7 % 16) / 4.0f;
    }

    /* Logits [W, V] of W inputs [W, D] behind `length` accepted tokens of one picture. */
    void operator()(int64_t row, int64_t length, const sjd2::Window &window, const float *embeds, float *logits) {
        uint32_t *cache = cache_.data() + row * stride_;
        uint32_t state = length > 0 ? cache[length - 1] : prompt_;
        for (int64_t slot = 0; slot < window.width(); ++slot) {
            const int32_t level = window.input_levels()[static_cast<size_t>(row * window.width() + slot)];
            state = mix(state, symbol(embeds[slot * kDim], level));
            cache[length + slot] = state;
            for (uint32_t id = 0; id < kVocab; ++id)
                logits[slot * kVocab + id] = static_cast<float>(mix(state, id) >> 27) / 8.0f;
        }
    }

private:
    static uint32_t mix(uint32_t state, uint32_t symbol) {
        state = (state ^ symbol) * 2654435761u + 0x9E3779B9u;
        return state ^ (state >> 15);
    }

    /* Noisy inputs (level >= 0) have symbols of their own. */
    static uint32_t symbol(float value, int32_t level) {
        if (level < 0) return static_cast<uint32_t>(value);
        return static_cast<uint32_t>(static_cast<int32_t>(std::floor(value * 8.0f)) + 10000 * (level + 1));
    }

    uint32_t prompt_;
    int64_t stride_;
    std::vector<uint32_t> cache_;
};

static sjd2::Options options_for(const std::string &name, int64_t window) {
    sjd2::Options options;
    options.window = window;
    options.guidance_scale = 1.5;
    options.temperature = 0.9;
    options.top_k = 12;
    options.repeat_distance = 5;
    const std::string decoder = name.substr(0, name.find(':'));
    if (decoder == "jacobi") options.decoder = sjd2::Decoder::jacobi;
    else if (decoder == "sjd") options.decoder = sjd2::Decoder::sjd;
    else if (decoder == "coupled") options.decoder = sjd2::Decoder::coupled;
    else if (decoder == "sjd2") options.decoder = sjd2::Decoder::sjd2;
    else if (decoder != "ar") throw std::invalid_argument("unknown decoder " + name);
    if (name == "coupled:maximal") options.coupling = sjd2::Coupling::maximal;
    else if (name == "sjd2:ratio") options.verification = sjd2::Verification::ratio;
    else if (name == "sjd2:paper") options.verification = sjd2::Verification::paper;
    else if (name != decoder) throw std::invalid_argument("unknown decoder " + name);
    return options;
}

static void decode(const std::string &decoder, int64_t slots, const std::vector<int64_t> &seeds) {
    const int64_t batch = static_cast<int64_t>(seeds.size());
    std::vector<float> table, start;
    for (int64_t id = 0; id < ToyModel::kRows; ++id)
        for (int64_t dim = 0; dim < ToyModel::kDim; ++dim) table.push_back(ToyModel::embedding(id, dim));
    for (int64_t row = 0; row < batch; ++row) start.insert(start.end(), {static_cast<float>(100 + row), 0.0f});

    sjd2::Embedding embedding;
    embedding.table = table.data(), embedding.start = start.data();
    embedding.rows = ToyModel::kRows, embedding.dim = ToyModel::kDim;
    sjd2::Window window(options_for(decoder, slots), sjd2::Layout::raster(4, 4, ToyModel::kVocab), seeds, embedding);

    /* Guidance: the same inputs behind two prompts. */
    const int64_t positions = window.total() + window.width();
    ToyModel conditional(batch, positions, 1), unconditional(batch, positions, 2);
    const int64_t inputs = window.width() * ToyModel::kDim, outputs = window.width() * ToyModel::kVocab;
    std::vector<float> embeds(static_cast<size_t>(batch * inputs)), logits(static_cast<size_t>(2 * batch * outputs));
    while (!window.done()) {
        window.embed(embeds.data());
        for (int64_t row = 0; row < batch; ++row) {
            const int64_t length = window.lengths()[static_cast<size_t>(row)];
            const float *given = embeds.data() + row * inputs;
            conditional(row, length, window, given, logits.data() + row * outputs);
            unconditional(row, length, window, given, logits.data() + (batch + row) * outputs);
        }
        window.step(logits);
    }
    for (int64_t row = 0; row < batch; ++row) {
        std::printf("%d", static_cast<int>(window.steps()[static_cast<size_t>(row)]));
        for (int64_t token : window.tokens(row)) std::printf(" %d", static_cast<int>(token));
        std::printf("\n");
    }
}

int main(int count, char **arguments) {
    std::vector<int64_t> seeds;
    for (int i = 3; i < count; ++i) seeds.push_back(std::strtoll(arguments[i], nullptr, 10));
    if (seeds.empty()) {
        std::fprintf(stderr, "usage: %s DECODER WINDOW SEED...\n", arguments[0]);
        return 2;
    }
    try {
        decode(arguments[1], std::strtoll(arguments[2], nullptr, 10), seeds);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
