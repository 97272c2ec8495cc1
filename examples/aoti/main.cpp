/* Text in, picture out, without Python: the packages of export.py, and the loop around them.
 *
 *     decode PACKAGES "a red circle left of a blue square" SEED [PICTURE.ppm]
 *
 * Prints how many forward passes the picture took, then its tokens: those of the Python engine for the same seed.
 */
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;
using Tensors = std::vector<at::Tensor>;

/* The state's first entries, in the order of STATE in export.py; the rest only passes through. */
enum { KV_LENGTHS, DONE, TOKENS, LENGTHS, STEPS, FAILED };

class Model {
public:
    explicit Model(const std::string &folder)
        : begin_(folder + "/begin.pt2"), decoder_(folder + "/decoder.pt2"), step_(folder + "/step.pt2"),
          pixels_(folder + "/pixels.pt2"), facts_(begin_.get_metadata()),
          device_(facts_.at("device") == "cuda" ? at::kCUDA : at::kCPU) {
        std::istringstream words(facts_.at("words"));
        int64_t id = number("first_word");
        for (std::string word; words >> word;) ids_[word] = id++;
        if (number("batch") != 1) throw std::runtime_error("the packages decode several pictures at once, expected 1");
    }

    /* Ids of a prompt: lower-case words between two marks. */
    std::vector<int64_t> encode(const std::string &text) const {
        std::vector<int64_t> ids = {number("begin")};
        std::string word;
        for (const char letter : text + " ") {
            const auto code = static_cast<unsigned char>(letter);
            if (std::isalnum(code)) {
                word += static_cast<char>(std::tolower(code));
            } else if (!word.empty()) {
                const auto found = ids_.find(word);
                if (found == ids_.end()) throw std::runtime_error("the model does not know the word " + word);
                ids.push_back(found->second);
                word.clear();
            }
        }
        if (static_cast<int64_t>(ids.size()) - 1 > number("max_words")) throw std::runtime_error("too many words");
        ids.push_back(number("begin_image"));
        return ids;
    }

    /* Decode one picture; afterwards `state` holds its tokens and counters. */
    void decode(const std::string &prompt, int64_t seed) {
        const at::Tensor seeds = at::full({1}, seed, at::kLong).to(device_);
        Tensors outputs = begin_.run({seeds});
        at::Tensor inputs = outputs[0];
        const at::Tensor keys = outputs[1], values = outputs[2];
        state.assign(outputs.begin() + 3, outputs.end());
        prefill({encode(prompt), encode("")}, inputs, keys, values);
        while (!state[DONE].all().item<bool>()) {
            const at::Tensor logits = decoder_.run({inputs, state[KV_LENGTHS], keys, values})[0];
            Tensors arguments = {logits, seeds};
            arguments.insert(arguments.end(), state.begin(), state.end());
            inputs = step_.run(arguments)[0];
        }
        if (state[FAILED].item<int>() >= 0) throw std::runtime_error("the model gave NaN or infinite logits");
    }

    /* Pixels uint8 [height, width, 3] of the picture. */
    at::Tensor picture() { return pixels_.run({state[TOKENS].clamp_min(0)})[0][0].cpu(); }

    at::Tensor tokens() const { return state[TOKENS][0].narrow(0, 0, number("total")).cpu(); }

    Tensors state;

private:
    int64_t number(const std::string &name) const { return std::stoll(facts_.at(name)); }

    /* Read the prompts but for their last tokens, a window at a time: what pads a row is overwritten later on. */
    void prefill(std::vector<std::vector<int64_t>> prompts, const at::Tensor &inputs, const at::Tensor &keys,
                 const at::Tensor &values) {
        const int64_t rows = inputs.size(0), window = inputs.size(1);
        prompts.resize(static_cast<size_t>(rows));
        at::Tensor lengths = at::zeros({rows}, at::kInt);
        for (bool more = true; more;) {
            at::Tensor chunk = at::zeros({rows, window}, at::kLong), taken = at::zeros({rows}, at::kInt);
            more = false;
            for (int64_t row = 0; row < rows; ++row) {
                const std::vector<int64_t> &ids = prompts[static_cast<size_t>(row)];
                const int64_t first = lengths[row].item<int>(), left = static_cast<int64_t>(ids.size()) - 1 - first;
                const int64_t count = std::min(window, left);
                for (int64_t i = 0; i < count; ++i) chunk[row][i] = ids[static_cast<size_t>(first + i)];
                taken[row] = count;
                more |= left > window;
            }
            decoder_.run({chunk.to(device_), lengths.to(device_), keys, values});
            lengths.add_(taken);
        }
        state[KV_LENGTHS].copy_(lengths);
    }

    AOTIModelPackageLoader begin_, decoder_, step_, pixels_;
    std::unordered_map<std::string, std::string> facts_;
    at::Device device_;
    std::unordered_map<std::string, int64_t> ids_;
};

static void write_ppm(const std::string &path, const at::Tensor &pixels) {
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << pixels.size(1) << " " << pixels.size(0) << "\n255\n";
    file.write(reinterpret_cast<const char *>(pixels.const_data_ptr<uint8_t>()), pixels.numel());
    if (!file) throw std::runtime_error("cannot write " + path);
}

int main(int count, char **arguments) {
    if (count < 4) {
        std::fprintf(stderr, "usage: %s PACKAGES PROMPT SEED [PICTURE.ppm]\n", arguments[0]);
        return 2;
    }
    try {
        const c10::InferenceMode guard;
        Model model(arguments[1]);
        model.decode(arguments[2], std::strtoll(arguments[3], nullptr, 10));
        std::printf("%d", model.state[STEPS].item<int>());
        const at::Tensor tokens = model.tokens();
        for (int64_t i = 0; i < tokens.numel(); ++i) std::printf(" %d", static_cast<int>(tokens[i].item<int64_t>()));
        std::printf("\n");
        if (count > 4) write_ppm(arguments[4], model.picture());
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
