"""Triton `embed_window` and `perturb` against the reference: on a GPU, else in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import guarded_call
from test_ops import arguments
from torch import Tensor
from triton_mode import DEVICE

from sjd2_kernels import backend, reference, rng
from sjd2_kernels.dispatch import NotSupported

embedding = pytest.importorskip("sjd2_kernels.embedding", reason="triton is not installed", exc_type=ImportError)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bound(exact: Tensor, plain: Tensor) -> float:
    """Twice the error of plain torch in the same dtype, and what adding and subtracting 0.3 changes."""
    rounding = ((plain + 0.3 - 0.3) - plain).abs().max().item()
    return 2 * (plain.double() - exact).abs().max().item() + 2 * rounding


@pytest.mark.parametrize("name", ["embed_window", "perturb", "refine"])
def test_contracts_with_pytorch(name: str) -> None:
    """What the op says it returns and mutates, and its gradient, hold for the kernel as for the reference."""
    args = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments(name))
    if name == "perturb":
        args[0].requires_grad_()
    with backend("triton"):
        torch.library.opcheck(getattr(torch.ops.sjd2, name), args)


# -------------------------------------------------------------------- embed_window


def window_case(batch: int, window: int, vocab: int, dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(batch * window + dim)
    tokens = torch.randint(vocab, (batch, window))
    tokens[::2, 0] = -1
    levels = torch.randint(-1, 3, (batch, window), dtype=torch.int32)
    tokens[:, 1:][levels[:, 1:] >= 0] = -1
    table, start = torch.randn(vocab, dim).to(dtype), torch.randn(batch, dim).to(dtype)
    noisy, mean, std = torch.randn(batch, window - 1, dim), torch.randn(dim), torch.rand(dim) + 0.5
    return tuple(x.to(DEVICE) for x in (tokens, levels, table, start, noisy, mean, std))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "window", "vocab", "dim"),
    [(1, 1, 5, 64), (2, 4, 257, 100), (16, 2, 1000, 1280), (1, 33, 7, 3), (3, 8, 5, 1025), (1, 2, 9, 8192)],
)
def test_embed_window(
    batch: int, window: int, vocab: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = window_case(batch, window, vocab, dim, dtype)
    got = guarded_call(monkeypatch, embedding.embed_window, *args)
    expected = reference.embed_window(*args)
    assert got.dtype == dtype and got.shape == expected.shape
    dirty = args[1] >= 0
    dirty[:, 0] = False
    assert torch.equal(got[~dirty], expected[~dirty])
    _, _, _, _, noisy, mean, std = args
    if dtype == torch.float32:
        # One fused multiply-add on a GPU, as in the reference; the interpreter rounds the product as well.
        rounding = 2.0**-23 * ((noisy * std).abs() + expected[:, 1:].abs())
        assert ((got - expected)[:, 1:].abs() <= rounding)[dirty[:, 1:]].all()
    else:
        exact = noisy.double() * std.double() + mean.double()
        plain = noisy.to(dtype) * std.to(dtype) + mean.to(dtype)
        error = (got[:, 1:].double() - exact).abs()[dirty[:, 1:]]
        assert error.numel() == 0 or error.max() <= bound(exact, plain)


@pytest.mark.parametrize("large", [False, True])
def test_embed_window_in_both_configurations(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "EMBED_LARGE_FROM", 0 if large else 99)
    args = window_case(2, 5, 11, 1300, torch.float32)
    assert torch.allclose(embedding.embed_window(*args), reference.embed_window(*args), atol=1e-6)


def test_embed_window_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, levels, table, start, *_ = window_case(3, 5, 11, 96, torch.bfloat16)
    args = tokens, levels, table, start.float(), None, None, None
    assert torch.equal(guarded_call(monkeypatch, embedding.embed_window, *args), reference.embed_window(*args))


def test_embed_window_of_no_rows() -> None:
    args = window_case(0, 4, 5, 64, torch.float32)
    assert embedding.embed_window(*args).shape == (0, 4, 64)


def test_embed_window_leaves_other_layouts_to_the_reference() -> None:
    tokens, levels, table, *rest = window_case(2, 4, 8, 64, torch.float32)
    for wrong in (
        (tokens.int(), levels, table, *rest),
        (tokens, levels, table.double(), *rest),
        (tokens, levels[:, :3], table, *rest),
        (tokens, levels, table.repeat(1, 2)[:, :64], *rest),
    ):
        with pytest.raises(NotSupported):
            embedding.embed_window(*wrong)


# -------------------------------------------------------------------- perturb


def noise_case(batch: int, length: int, dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(batch * length + dim)
    x, levels = torch.randn(batch, length, dim).to(dtype), torch.randint(-1, 4, (batch, length), dtype=torch.int32)
    positions = torch.randint(2**20, (batch, length))
    seeds = torch.randint(-(2**62), 2**62, (batch,))
    mean, std, times = torch.randn(dim), torch.rand(dim) + 0.5, torch.tensor([0.05, 0.3, 0.7, 1.0])
    return tuple(a.to(DEVICE) for a in (x, levels, positions, seeds, mean, std, times))


@pytest.mark.parametrize("denormalize", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32), (2, 5, 100, torch.float32), (3, 7, 1283, torch.float32),
        (1, 2, 8192, torch.float32), (16, 1, 3, torch.float32), (2, 9, 1280, torch.float16),
        (1, 4, 257, torch.bfloat16),
    ],
)  # fmt: skip
def test_perturb(
    batch: int, length: int, dim: int, dtype: torch.dtype, denormalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, levels, positions, seeds, mean, std, times = case = noise_case(batch, length, dim, dtype)
    args: tuple[Any, ...] = (*case, 5, denormalize)
    got = guarded_call(monkeypatch, embedding.perturb, *args)
    expected = reference.perturb(*args)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    clean = levels < 0
    assert torch.equal(got[clean], expected[clean])
    if got.dtype == torch.float32:
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-5)
    else:
        single = reference.perturb(x.float(), *args[1:])
        t = times[levels.clamp(min=0)].unsqueeze(-1).to(dtype)
        e = (x - mean.to(dtype)) / std.to(dtype)
        noise = rng.normals(seeds, positions, 5, dim).to(dtype)
        plain = (e + t * (noise - e)) * std.to(dtype) + mean.to(dtype)
        noisy = ~clean
        assert (got.double() - single)[noisy].abs().max() <= bound(single.double()[noisy], plain[noisy])


@pytest.mark.parametrize("large", [False, True])
def test_perturb_in_both_configurations(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PERTURB_LARGE_FROM", 0 if large else 999)
    args: tuple[Any, ...] = (*noise_case(3, 7, 1028, torch.float32), 0, False)
    got = guarded_call(monkeypatch, embedding.perturb, *args)
    assert torch.allclose(got, reference.perturb(*args), rtol=1e-6, atol=1e-5)


def test_perturb_takes_expanded_positions() -> None:
    x, levels, _, *rest = noise_case(3, 4, 64, torch.float32)
    positions = torch.arange(40, device=DEVICE)[10:34:6].expand(3, 4)
    args: tuple[Any, ...] = x, levels, positions, *rest, 1, False
    assert torch.allclose(embedding.perturb(*args), reference.perturb(*args), rtol=1e-6, atol=1e-5)


def test_perturb_of_nothing() -> None:
    for batch, length in ((0, 3), (2, 0)):
        args: tuple[Any, ...] = noise_case(batch, length, 64, torch.float32)
        assert embedding.perturb(*args, 0, True).shape == (batch, length, 64)


def test_perturb_leaves_other_layouts_to_the_reference() -> None:
    x, *rest = noise_case(2, 3, 64, torch.float32)
    for wrong in (x.double(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(NotSupported):
            embedding.perturb(wrong, *rest, 0, True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_offsets_beyond_32_bits() -> None:
    batch, length, dim = 2, 300, 2**31 // 600 + 64
    x = torch.zeros(batch, length, dim, dtype=torch.bfloat16, device=DEVICE)
    levels = torch.full((batch, length), -1, dtype=torch.int32, device=DEVICE)
    levels[-1, -1] = 0
    positions, seeds = torch.arange(length, device=DEVICE).expand(batch, -1), torch.tensor([1, 2], device=DEVICE)
    mean, std, times = torch.zeros(dim, device=DEVICE), torch.ones(dim, device=DEVICE), torch.ones(1, device=DEVICE)
    got = embedding.perturb(x, levels, positions, seeds, mean, std, times, 0, True)
    noise = rng.normals(seeds[1:], positions[1:, -1:], 0, dim)[0, 0]
    assert not got[0].any() and not got[1, :-1].any()
    assert torch.allclose(got[1, -1].float(), noise, rtol=2**-8, atol=1e-5)
