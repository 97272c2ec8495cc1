/* torch.ops.sjd2.* for C++ programs: the window's ops on CPU tensors, by the C core and without Python.
 *
 * Compile this file into a program or library that links libtorch and sjd2 (CMake: ${sjd2_TORCH_OPS_SOURCE} and
 * sjd2::sjd2). AOTInductor packages and TorchScript find the ops from then on. Only PyTorch's stable interface is
 * used, so that one binary serves PyTorch 2.10 and later. A Python process has the same ops from `sjd2_kernels`: a
 * library with this file must not be loaded there. The schemas are those of sjd2_kernels/ops.py.
 */
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "sjd2.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(int64_t status, const char *function) {
    STD_TORCH_CHECK(status == SJD2_OK, function, ": ", sjd2_status_string(status));
}

template <class T> constexpr ScalarType scalar_type();
template <> constexpr ScalarType scalar_type<int64_t>() { return ScalarType::Long; }
template <> constexpr ScalarType scalar_type<int32_t>() { return ScalarType::Int; }
template <> constexpr ScalarType scalar_type<float>() { return ScalarType::Float; }
template <> constexpr ScalarType scalar_type<uint8_t>() { return ScalarType::Bool; }

void expect_shape(const char *name, const Tensor &tensor, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU: the C core serves CPU tensors");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
    const auto sizes = tensor.sizes();
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
    std::string wanted;
    for (int64_t size : shape) wanted += " " + std::to_string(size);
    STD_TORCH_CHECK(same, name, " has another shape than expected, which is [", wanted, " ]");
}

/* The data of a dense CPU tensor of this type and shape. */
template <class T> T *data(const char *name, const Tensor &tensor, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.scalar_type() == scalar_type<T>(), name, " has another type than expected");
    expect_shape(name, tensor, shape);
    return static_cast<T *>(tensor.data_ptr());
}

template <class T> T *data(const char *name, const Optional &tensor, std::initializer_list<int64_t> shape) {
    return tensor ? data<T>(name, *tensor, shape) : nullptr;
}

/* The data of a tensor that may be float32, float16 or bfloat16. */
void *floats(const char *name, const Tensor &tensor, ScalarType type, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has another type than expected");
    expect_shape(name, tensor, shape);
    return tensor.data_ptr();
}

int64_t core_type(const char *name, const Tensor &tensor) {
    switch (tensor.scalar_type()) {
    case ScalarType::Float: return SJD2_FLOAT32;
    case ScalarType::Half: return SJD2_FLOAT16;
    case ScalarType::BFloat16: return SJD2_BFLOAT16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16"); return -1;
    }
}

Tensor empty(const Tensor &like, ScalarType type, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void expect_dims(const char *name, const Tensor &tensor, int64_t dims) {
    STD_TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, expected ", dims);
}

Tensor embed_window(Tensor tokens, Tensor levels, Tensor table, Tensor start, Optional noisy, Optional mean,
                    Optional std) {
    expect_dims("tokens", tokens, 2), expect_dims("table", table, 2);
    const int64_t batch = tokens.size(0), window = tokens.size(1), rows = table.size(0), dim = table.size(1);
    const ScalarType type = table.scalar_type();
    Tensor out = empty(table, type, {batch, window, dim});
    sjd2_embed_window_params call = {};
    call.size = sizeof call, call.batch = batch, call.window = window, call.dim = dim, call.rows = rows;
    call.type = core_type("table", table), call.threads = threads();
    call.tokens = data<int64_t>("tokens", tokens, {batch, window});
    call.levels = data<int32_t>("levels", levels, {batch, window});
    call.table = floats("table", table, type, {rows, dim}), call.start = floats("start", start, type, {batch, dim});
    if (noisy && mean && std) {
        call.noisy = data<float>("noisy", noisy, {batch, window - 1, dim});
        call.mean = data<float>("mean", mean, {dim}), call.std = data<float>("std", std, {dim});
    }
    call.out = out.data_ptr();
    check(sjd2_embed_window(&call), "sjd2::embed_window");
    return out;
}

Tensor perturb(Tensor x, Tensor levels, Tensor positions, Tensor seeds, Tensor mean, Tensor std, Tensor times,
               int64_t epoch, bool denormalize) {
    expect_dims("x", x, 3), expect_dims("times", times, 1);
    const int64_t batch = x.size(0), length = x.size(1), dim = x.size(2);
    const ScalarType type = x.scalar_type();
    Tensor out = empty(x, denormalize ? type : ScalarType::Float, {batch, length, dim});
    sjd2_perturb_params call = {};
    call.size = sizeof call, call.batch = batch, call.length = length, call.dim = dim, call.type = core_type("x", x);
    call.level_count = times.size(0), call.epoch = epoch, call.denormalize = denormalize, call.threads = threads();
    call.x = floats("x", x, type, {batch, length, dim});
    call.levels = data<int32_t>("levels", levels, {batch, length});
    call.positions = data<int64_t>("positions", positions, {batch, length});
    call.seeds = data<int64_t>("seeds", seeds, {batch});
    call.mean = data<float>("mean", mean, {dim}), call.std = data<float>("std", std, {dim});
    call.times = data<float>("times", times, {times.size(0)}), call.out = out.data_ptr();
    check(sjd2_perturb(&call), "sjd2::perturb");
    return out;
}

std::tuple<Tensor, Tensor, Tensor> sample_window(Tensor logits, Tensor seeds, Tensor lengths, Tensor steps,
                                                 Optional noise, double guidance, double temperature, int64_t top_k,
                                                 double top_p, int64_t legal_begin, int64_t legal_end,
                                                 bool per_position, bool need_p) {
    const bool guided = logits.dim() == 4;
    expect_dims("logits", logits, guided ? 4 : 3);
    const int64_t batch = logits.size(guided), window = logits.size(1 + guided), vocab = logits.size(2 + guided);
    Tensor tokens = empty(logits, ScalarType::Long, {batch, window});
    Tensor p = empty(logits, ScalarType::Float, {batch, window, need_p ? vocab : 0});
    Tensor bad = empty(logits, ScalarType::Bool, {batch, window});
    sjd2_sample_window_params call = {};
    call.size = sizeof call, call.batch = batch, call.window = window, call.vocab = vocab;
    call.type = core_type("logits", logits), call.top_k = top_k, call.top_p = top_p, call.threads = threads();
    call.legal_begin = legal_begin, call.legal_end = legal_end, call.per_position = per_position;
    call.guidance = guidance, call.temperature = temperature;
    if (guided) {
        expect_shape("logits", logits, {2, batch, window, vocab});
        const int64_t bytes = call.type == SJD2_FLOAT32 ? 4 : 2;
        call.uncond = static_cast<char *>(logits.data_ptr()) + batch * window * vocab * bytes;
    } else {
        expect_shape("logits", logits, {batch, window, vocab});
    }
    call.logits = logits.data_ptr(), call.seeds = data<int64_t>("seeds", seeds, {batch});
    call.lengths = data<int32_t>("lengths", lengths, {batch}), call.steps = data<int32_t>("steps", steps, {batch});
    if (noise) {
        call.padded = noise->size(1);
        call.noise = data<float>("noise", noise, {batch, call.padded, vocab});
    }
    call.tokens = static_cast<int64_t *>(tokens.data_ptr()), call.bad = static_cast<uint8_t *>(bad.data_ptr());
    call.p = need_p ? static_cast<float *>(p.data_ptr()) : nullptr;
    call.workspace_size = std::max<int64_t>(sjd2_sample_window_workspace(vocab, call.threads), 0);
    Tensor workspace = empty(logits, ScalarType::Byte, {call.workspace_size});
    call.workspace = workspace.data_ptr();
    check(sjd2_sample_window(&call), "sjd2::sample_window");
    return {tokens, p, bad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> verify(Tensor tokens, Tensor p, Tensor bad, Tensor drafts, Tensor q,
                                                  Tensor status, Tensor levels, Tensor forced, Tensor lengths,
                                                  Tensor steps, Tensor done, Tensor seeds, int64_t total,
                                                  int64_t rule) {
    expect_dims("tokens", tokens, 2), expect_dims("forced", forced, 1), expect_dims("p", p, 3);
    const int64_t batch = tokens.size(0), window = tokens.size(1);
    Tensor decided = empty(tokens, ScalarType::Long, {batch, window});
    Tensor counts[3] = {empty(tokens, ScalarType::Int, {batch}), empty(tokens, ScalarType::Int, {batch}),
                        empty(tokens, ScalarType::Int, {batch})};
    sjd2_verify_params call = {};
    call.size = sizeof call, call.batch = batch, call.window = window, call.padded = forced.size(0);
    call.total = total, call.rule = rule, call.threads = threads();
    if (rule != SJD2_MATCH) {
        call.vocab = p.size(2);
        call.p = data<float>("p", p, {batch, window, call.vocab});
        call.q = data<float>("q", q, {batch, window - 1, call.vocab});
    }
    call.tokens = data<int64_t>("tokens", tokens, {batch, window});
    call.bad = data<uint8_t>("bad", bad, {batch, window});
    call.drafts = data<int64_t>("drafts", drafts, {batch, window - 1});
    call.status = data<int32_t>("status", status, {batch, window - 1});
    call.levels = data<int32_t>("levels", levels, {batch, window - 1});
    call.forced = data<int64_t>("forced", forced, {call.padded});
    call.lengths = data<int32_t>("lengths", lengths, {batch}), call.steps = data<int32_t>("steps", steps, {batch});
    call.done = data<int32_t>("done", done, {batch}), call.seeds = data<int64_t>("seeds", seeds, {batch});
    call.decided = static_cast<int64_t *>(decided.data_ptr());
    call.accepted = static_cast<int32_t *>(counts[0].data_ptr());
    call.settled = static_cast<int32_t *>(counts[1].data_ptr());
    call.fault = static_cast<int32_t *>(counts[2].data_ptr());
    check(sjd2_verify(&call), "sjd2::verify");
    return {decided, counts[0], counts[1], counts[2]};
}

void commit(Tensor decided, Tensor accepted, Tensor fault, Tensor tokens, Tensor lengths, Tensor steps, Tensor done,
            Tensor failed, Tensor failed_step, Tensor histogram, Tensor kv_lengths, int64_t total) {
    expect_dims("decided", decided, 2), expect_dims("tokens", tokens, 2), expect_dims("kv_lengths", kv_lengths, 1);
    const int64_t batch = decided.size(0), window = decided.size(1);
    sjd2_commit_params call = {};
    call.size = sizeof call, call.batch = batch, call.window = window, call.padded = tokens.size(1);
    call.total = total, call.kv_rows = kv_lengths.size(0);
    call.decided = data<int64_t>("decided", decided, {batch, window});
    call.accepted = data<int32_t>("accepted", accepted, {batch});
    call.fault = data<int32_t>("fault", fault, {batch});
    call.tokens = data<int64_t>("tokens", tokens, {batch, call.padded});
    call.lengths = data<int32_t>("lengths", lengths, {batch}), call.steps = data<int32_t>("steps", steps, {batch});
    call.done = data<int32_t>("done", done, {batch}), call.failed = data<int32_t>("failed", failed, {batch});
    call.failed_step = data<int32_t>("failed_step", failed_step, {batch});
    call.histogram = data<int64_t>("histogram", histogram, {batch, window + 1});
    call.kv_lengths = data<int32_t>("kv_lengths", kv_lengths, {call.kv_rows});
    check(sjd2_commit(&call), "sjd2::commit");
}

void refine(Tensor decided, Tensor p, Tensor accepted, Tensor settled, Tensor lengths, Tensor forced, Tensor initial,
            Tensor drafts, Tensor status, Tensor levels, Tensor q, Optional noisy, Optional table, Optional mean,
            Optional std, Optional ratios, Optional noise, Optional directions, Tensor seeds, int64_t fresh_level) {
    expect_dims("decided", decided, 2), expect_dims("forced", forced, 1), expect_dims("q", q, 3);
    const int64_t batch = decided.size(0), window = decided.size(1), ids = q.size(2);
    sjd2_refine_params call = {};
    call.size = sizeof call, call.batch = batch, call.window = window, call.padded = forced.size(0);
    call.vocab = ids, call.fresh_level = fresh_level, call.threads = threads();
    call.decided = data<int64_t>("decided", decided, {batch, window});
    call.accepted = data<int32_t>("accepted", accepted, {batch});
    call.settled = data<int32_t>("settled", settled, {batch});
    call.lengths = data<int32_t>("lengths", lengths, {batch});
    call.forced = data<int64_t>("forced", forced, {call.padded});
    call.initial = data<int64_t>("initial", initial, {batch, call.padded});
    call.drafts = data<int64_t>("drafts", drafts, {batch, window - 1});
    call.status = data<int32_t>("status", status, {batch, window - 1});
    call.levels = data<int32_t>("levels", levels, {batch, window - 1});
    call.seeds = data<int64_t>("seeds", seeds, {batch});
    if (ids) call.p = data<float>("p", p, {batch, window, ids}), call.q = data<float>("q", q, {batch, window - 1, ids});
    Tensor workspace = empty(decided, ScalarType::Byte, {0});
    if (noisy) {
        STD_TORCH_CHECK(table && mean && std && ratios, "noisy drafts need table, mean, std and ratios");
        expect_dims("table", *table, 2), expect_dims("ratios", *ratios, 1);
        call.rows = table->size(0), call.dim = table->size(1), call.level_count = ratios->size(0);
        call.type = core_type("table", *table);
        call.table = floats("table", *table, table->scalar_type(), {call.rows, call.dim});
        call.noisy = data<float>("noisy", noisy, {batch, window - 1, call.dim});
        call.mean = data<float>("mean", mean, {call.dim}), call.std = data<float>("std", std, {call.dim});
        call.ratios = data<float>("ratios", ratios, {call.level_count});
        call.noise = data<float>("noise", noise, {batch, call.padded, call.dim});
        if (directions) {
            expect_dims("directions", *directions, 2);
            call.vocab = directions->size(0);
            STD_TORCH_CHECK(ids == 0 || ids == call.vocab, "directions and q differ in their vocabulary");
            call.directions = data<float>("directions", directions, {call.vocab, call.dim});
            call.workspace_size = std::max<int64_t>(sjd2_refine_workspace(batch, window, call.vocab), 0);
            workspace = empty(decided, ScalarType::Byte, {call.workspace_size});
            call.workspace = workspace.data_ptr();
        }
    }
    check(sjd2_refine(&call), "sjd2::refine");
}

}  // namespace

STABLE_TORCH_LIBRARY(sjd2, library) {
    library.def(
        "embed_window(Tensor tokens, Tensor levels, Tensor table, Tensor start, Tensor? noisy, Tensor? mean, "
        "Tensor? std) -> Tensor");
    library.def(
        "perturb(Tensor x, Tensor levels, Tensor positions, Tensor seeds, Tensor mean, Tensor std, Tensor times, "
        "int epoch, bool denormalize) -> Tensor");
    library.def(
        "sample_window(Tensor logits, Tensor seeds, Tensor lengths, Tensor steps, Tensor? noise, float guidance, "
        "float temperature, int top_k, float top_p, int legal_begin, int legal_end, bool per_position, "
        "bool need_p) -> (Tensor, Tensor, Tensor)");
    library.def(
        "verify(Tensor tokens, Tensor p, Tensor bad, Tensor drafts, Tensor q, Tensor status, Tensor levels, "
        "Tensor forced, Tensor lengths, Tensor steps, Tensor done, Tensor seeds, int total, int rule) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "commit(Tensor decided, Tensor accepted, Tensor fault, Tensor(a!) tokens, Tensor(b!) lengths, "
        "Tensor(c!) steps, Tensor(d!) done, Tensor(e!) failed, Tensor(f!) failed_step, Tensor(g!) histogram, "
        "Tensor(h!) kv_lengths, int total) -> ()");
    library.def(
        "refine(Tensor decided, Tensor p, Tensor accepted, Tensor settled, Tensor lengths, Tensor forced, "
        "Tensor initial, Tensor(a!) drafts, Tensor(b!) status, Tensor(c!) levels, Tensor(d!) q, "
        "Tensor(e!)? noisy, Tensor? table, Tensor? mean, Tensor? std, Tensor? ratios, Tensor? noise, "
        "Tensor? directions, Tensor seeds, int fresh_level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sjd2, CPU, library) {
    library.impl("embed_window", TORCH_BOX(&embed_window));
    library.impl("perturb", TORCH_BOX(&perturb));
    library.impl("sample_window", TORCH_BOX(&sample_window));
    library.impl("verify", TORCH_BOX(&verify));
    library.impl("commit", TORCH_BOX(&commit));
    library.impl("refine", TORCH_BOX(&refine));
}
