"""The C core against the reference: random numbers, embeddings, sampling; odd shapes, half precision, NaN, ties.

Outputs are allocated with poison inside and guards around. Logarithms differ from PyTorch's by an ulp, so a token may
differ where the two best scores are closer than NEAR; such slots are counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_cases import counters, guarded
from test_ops import arguments
from torch import Tensor

from sjd2_kernels import build, reference, rng
from sjd2_kernels.dispatch import NotSupported
from sjd2_kernels.reference import decoding

native: Any = pytest.importorskip(
    "sjd2_kernels.native", reason=build.why_unusable() or "the C core is not there", exc_type=ImportError
)

INF, NAN = float("inf"), float("nan")
NEAR = 1e-5
OPTIONS: dict[str, Any] = {
    "guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "begin": 0, "end": 0, "per_position": True,
    "need_p": True,
}  # fmt: skip


# -------------------------------------------------------------------- random numbers


def random(distribution: int, seeds: Tensor, positions: Tensor, iteration: int, purpose: int, count: int) -> Tensor:
    out = torch.full((*positions.shape, count), torch.nan)
    native._call["random"](
        *positions.shape, count, distribution, iteration, purpose, 1, seeds.data_ptr(), positions.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_random_numbers(count: int) -> None:
    seeds, positions = torch.tensor([0, 2**63 - 1]), torch.tensor([[0, 7, 2**31], [2**32 - 1, 1, 5]])
    for purpose, iteration in ((rng.SAMPLE, 0), (rng.INIT, 3), (rng.RESIDUAL, 2**31)):
        u = random(0, seeds, positions, iteration, purpose, count)
        assert torch.equal(u, rng.uniforms(seeds, positions, iteration, purpose, count))
        g = random(1, seeds, positions, iteration, purpose, count)
        assert torch.allclose(g, rng.gumbel(seeds, positions, iteration, purpose, count), atol=1e-6, rtol=1e-6)
    normals = random(2, seeds, positions, 4, rng.NOISE, count)
    assert torch.allclose(normals, rng.normals(seeds, positions, 4, count), atol=1e-6, rtol=1e-6)


# -------------------------------------------------------------------- embed_window, perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, window, dim", [(1, 1, 1), (2, 5, 64), (3, 4, 130), (0, 4, 8)])
def test_embed_window(batch: int, window: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    table, start = torch.randn(9, dim).to(dtype), torch.randn(batch, dim).to(dtype)
    tokens, levels = torch.randint(-1, 9, (batch, window)), torch.randint(-1, 2, (batch, window)).int()
    noisy, mean, std = torch.randn(batch, window - 1, dim) * 3, torch.randn(dim), torch.rand(dim) + 0.5
    for state in ((noisy, mean, std), (None, None, None)):
        got = guarded(native.embed_window, tokens, levels, table, start, *state)
        wanted = reference.embed_window(tokens, levels, table, start, *state)
        assert got.dtype == dtype and torch.allclose(
            got.float(), wanted.float(), rtol=1e-5 if dtype is torch.float32 else 8e-3
        )
        clean = levels < 0 if state[0] is not None else torch.ones_like(levels, dtype=torch.bool)
        assert torch.equal(got[clean], wanted[clean])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision(dtype: torch.dtype) -> None:
    """Every kind of number goes through std·e + mean with std = 1 and mean = 0: ties, denormals, overflow, NaN."""
    bits = torch.arange(0, 2**32, 262_139, dtype=torch.int64)
    halves = torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = torch.stack((halves, halves.nextafter(torch.tensor(INF)), halves * (1 + 2.0**-11), halves * (1 + 2.0**-8)))
    values = torch.cat((bits.to(torch.int32).view(torch.float32), ties.flatten()))
    dim = len(values)
    tokens, levels = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[-1, 0]]).int()
    table = torch.zeros(1, dim, dtype=dtype)
    noise = values.view(1, 1, dim), torch.zeros(dim), torch.ones(dim)
    got = native.embed_window(tokens, levels, table, table, *noise)[0, 1]
    wanted = values.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(3.0), wanted.nan_to_num(3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, length, dim", [(1, 1, 1), (2, 3, 66), (0, 2, 8)])
def test_perturb(batch: int, length: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, levels = torch.randn(batch, length, dim).to(dtype), torch.randint(-1, 3, (batch, length)).int()
    positions = torch.randint(0, 2**33, (batch, length))
    mean, std, times = torch.randn(dim), torch.rand(dim) + 0.5, torch.tensor([0.2, 0.6, 1.0])
    for denormalize in (True, False):
        args = x, levels, positions, counters(batch)[0], mean, std, times, 7, denormalize
        got, wanted = guarded(native.perturb, *args), reference.perturb(*args)
        tolerance = 1e-5 if got.dtype is torch.float32 else 1e-2
        assert got.dtype == wanted.dtype
        assert torch.allclose(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)
        if denormalize:
            assert torch.equal(got[levels < 0], x[levels < 0])


# -------------------------------------------------------------------- sample_window


def compare_samples(logits: Tensor, noise: Tensor | None = None, **options: Any) -> None:
    """Tokens, p and bad of the core are the reference's; near-ties are rare."""
    batch, _, vocab = logits.shape[-3:]
    scalars: dict[str, Any] = OPTIONS | {"end": vocab} | options
    state = logits, *counters(batch), noise
    wanted_tokens, wanted_p, wanted_bad = reference.sample_window(*state, *scalars.values())
    tokens, p, bad = guarded(native.sample_window, *state, *scalars.values())
    assert torch.equal(bad, wanted_bad) and p.shape == wanted_p.shape
    assert torch.allclose(p, wanted_p, rtol=2e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(p > 1e-30, wanted_p > 1e-30)
    differ = tokens != wanted_tokens
    if bool(differ.any()):
        gaps = score_gaps(state, scalars)[differ]
        assert bool((gaps < NEAR).all()) and len(gaps) <= 1 + tokens.numel() // 1000, f"{len(gaps)} near-ties: {gaps}"


def score_gaps(state: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Distance of the two best scores log p + noise of every slot, f64 [B, W]."""
    logits, seeds, lengths, steps, noise = state
    window, vocab = logits.shape[-2:]
    _, p, _ = reference.sample_window(*state, *(options | {"need_p": True}).values())
    positions = lengths[:, None] + torch.arange(window)
    drawn = rng.gumbel(seeds, positions, 0 if options["per_position"] else steps + 1, rng.SAMPLE, vocab)
    best = (p.double().log() + (drawn if noise is None else decoding._rows(noise, positions))).topk(2).values
    return best[..., 0] - best[..., 1]


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(3).to(dtype)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 1, 2), (2, 2, 3, 64), (3, 4, 257), (2, 1, 33, 1000), (0, 4, 8), (1, 2, 9001)]
)
def test_sample_window_of_odd_shapes(shape: tuple[int, ...]) -> None:
    for need_p in (True, False):
        compare_samples(random_logits(*shape), need_p=need_p)


SAMPLING = [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 3.0, "per_position": False}, {"guidance": 1.0},
    {"guidance": 0.0}, {"guidance": -1.5}, {"top_k": 1}, {"top_k": 5}, {"top_k": 299}, {"top_k": 300}, {"top_k": 9000},
    {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.9999}, {"top_k": 20, "top_p": 0.5, "temperature": 1.7},
    {"begin": 3, "end": 5}, {"begin": 64, "end": 128}, {"begin": 299},
    {"begin": 10, "end": 200, "top_k": 30, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_sample_window_with_options(options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare_samples(random_logits(2, 3, 7, 300, dtype=dtype), **options)
    compare_samples(random_logits(3, 7, 300), **options, need_p=False)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1e-30}], ids=str
)
def test_logits_that_are_not_finite(options: dict[str, Any], guided: bool) -> None:
    rows = random_logits(1, 9, 70)
    rows[0, 0, 5] = rows[0, 1, 69] = rows[0, 1, 3] = NAN
    rows[0, 2, 6] = rows[0, 2, 66] = INF
    rows[0, 3] = -INF
    rows[0, 4, :69] = -INF
    rows[0, 5] = NAN
    rows[0, 6, 1], rows[0, 6, 2] = NAN, INF
    rows[0, 7] = INF
    twin = rows.flip(1) if guided else None
    logits = rows if twin is None else torch.stack((rows, twin))
    for need_p in (True, False):
        compare_samples(logits, **options, need_p=need_p)
        compare_samples(logits, **options, need_p=need_p, begin=2, end=68)


def test_ties() -> None:
    """Equal logits: all of them stay in a top-k, and greedy takes the first."""
    logits = torch.randint(-3, 3, (1, 64, 130), generator=torch.Generator().manual_seed(0)).float()
    for top_k in (1, 2, 20, 60, 100, 129):
        compare_samples(logits, top_k=top_k)
        compare_samples(torch.stack((logits, -logits)).bfloat16(), top_k=top_k, top_p=0.8)
    compare_samples(logits, temperature=0.0)
    compare_samples(torch.zeros(1, 3, 70), top_k=3, top_p=0.3)
    compare_samples(torch.tensor([[[0.0, -0.0, -1.0, 0.0]]]), top_k=2)


def test_a_noise_table_is_used() -> None:
    noise = torch.randn(3, 40, 300)
    compare_samples(random_logits(3, 7, 300), noise)
    compare_samples(random_logits(3, 7, 300), noise, per_position=False)


def test_probabilities_over_a_wide_range() -> None:
    """Peaked and flat rows, logits far from 0: skipping what cannot win changes no draw."""
    for scale in (0.0, 1e-3, 1.0, 30.0, 1000.0):
        for shift in (0.0, -1e4, 1e4):
            logits = random_logits(2, 50, 1030) * scale + shift
            if abs(shift) < 1 or scale > 1:
                compare_samples(logits, need_p=False)
    compare_samples(torch.zeros(4, 100, 513), per_position=False)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = random_logits(3, 4, 300)
    seeds, lengths, steps = counters(3)
    options = None, 1.0, 0.9, 50, 0.9, 0, 300, True, True
    together = native.sample_window(logits, seeds, lengths, steps, *options)
    for row in range(3):
        part = slice(row, row + 1)
        alone = native.sample_window(logits[part], seeds[part], lengths[part], steps[part], *options)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, together))


# -------------------------------------------------------------------- what it does not serve


def test_what_it_cannot_serve_is_said_before_anything_is_touched() -> None:
    logits, *rest = arguments("sample_window")
    with pytest.raises(NotSupported, match="float64"):
        native.sample_window(logits.double(), *rest)
    with pytest.raises(NotSupported, match="non-contiguous"):
        native.sample_window(logits.transpose(1, 2), *rest)
    with pytest.raises(NotSupported, match=r"seeds is .*int32"):
        native.sample_window(logits, rest[0].int(), *rest[1:])
    values = list(arguments("refine"))
    before = [value.clone() for value in values[7:12]]
    values[6] = values[6][:, :-1]
    with pytest.raises(NotSupported, match="initial"):
        native.refine(*values)
    assert all(torch.equal(x, y) for x, y in zip(values[7:12], before))


def test_values_out_of_range_are_errors() -> None:
    tokens, *rest = arguments("embed_window")
    with pytest.raises(ValueError, match=r"sjd2_embed_window: a token.* out of its range \(status 5\)"):
        native.embed_window(tokens + 6, *rest)
    values = list(arguments("sample_window"))
    for index, value in ((6, -1.0), (6, NAN), (8, 0.0), (9, 5), (10, 6), (5, NAN)):
        with pytest.raises(ValueError, match="sjd2_sample_window: a parameter"):
            native.sample_window(*values[:index], value, *values[index + 1 :])
    with pytest.raises(ValueError, match="sjd2_verify: a parameter"):
        native.verify(*arguments("verify")[:-1], 9)
