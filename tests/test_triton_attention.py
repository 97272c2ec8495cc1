"""Triton `window_attention` against the reference and plain torch: on a GPU, else in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_mode import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from guarded import Guards
from precision import assert_as_close_as_plain

from sjd2_kernels import attention, reference
from sjd2_kernels.dispatch import NotSupported

# NaN, infinities and overflow are part of what is tested; the interpreter's numpy speaks of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `lengths` gives the rows."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    front: int
    lengths: tuple[int, ...]
    spare: int = 3  # slots behind the longest row

    def __str__(self) -> str:
        return f"T{self.width}-H{self.heads}on{self.kv_heads}-d{self.dim}-front{self.front}-{self.lengths}"

    @property
    def slots(self) -> int:
        return self.front + max(self.lengths) + self.width + self.spare


# Between them: one and several splits of 128 keys, one and several tiles, whole and padded dimensions, rows without a
# cache, lengths on both sides of a split's border.
CASES = [
    Case(1, 4, 4, 64, 0, (0, 127, 128, 129)),
    Case(2, 6, 2, 80, 3, (0, 200)),
    Case(16, 8, 2, 128, 4, (300, 1)),
    Case(16, 3, 3, 96, 1, (250,)),
    Case(33, 5, 1, 100, 0, (7, 131)),
    Case(96, 2, 2, 64, 5, (0, 120)),
    Case(96, 4, 2, 16, 2, (250, 33)),
    Case(128, 3, 3, 12, 0, (129, 0)),
    Case(128, 1, 1, 128, 25, (70,)),
    Case(130, 2, 1, 16, 2, (0, 140)),  # more queries than a window has, as in a prefill
]


def arguments(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Random arguments with garbage in every slot that no query sees."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(case.lengths)
    q = torch.randn(rows, case.width, case.heads, case.dim, generator=generator)
    caches = torch.randn(2, rows, case.slots, case.kv_heads, case.dim, generator=generator)
    levels = torch.randint(-1, max(case.front, 1), (rows, case.width), dtype=torch.int32, generator=generator)
    slot = torch.arange(case.slots)
    for row, length in enumerate(case.lengths):
        used = (slot >= case.front) & (slot < case.front + length + case.width) | torch.isin(slot, levels[row])
        for cache, garbage in zip(caches, (torch.nan, torch.inf)):
            cache[row, ~used if case.front else ~used | (slot >= case.front + length + case.width)] = garbage
    keys, values = caches.to(dtype)
    return {
        "q": q.to(DEVICE, dtype),
        "keys": keys.to(DEVICE),
        "values": values.to(DEVICE),
        "lengths": torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE),
        "levels": levels.to(DEVICE) if case.front else None,
        "front": case.front,
        "scale": case.dim**-0.5,
    }


def attended(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, chunk: int = 128) -> Tensor:
    """The kernels' result, with poison in all they allocate and guards around it."""
    guards = Guards()
    before = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor)}
    with monkeypatch.context() as patch:
        patch.setattr(attention, "CHUNK", chunk)
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(tuple(shape), dtype, device))
        out = attention.window_attention(**args)
    guards.check()
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(), args[name].nan_to_num()), f"{name} was written to"
    return out


def plain(args: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The same by scaled-dot-product attention with a mask, computed in `dtype`."""
    q, keys, values, front = args["q"].to(dtype), args["keys"].to(dtype), args["values"].to(dtype), args["front"]
    slot = torch.arange(keys.shape[1], device=q.device)
    step = torch.arange(q.shape[1], device=q.device)[:, None]
    mask = (slot >= front) & (slot <= front + args["lengths"][:, None, None] + step)
    if args["levels"] is not None:
        mask |= (slot < front) & (slot == args["levels"][..., None])
    unseen = ~mask.any(1)[:, :, None, None]
    keys, values = keys.masked_fill(unseen, 0.0), values.masked_fill(unseen, 0.0)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, mask[:, None], scale=args["scale"], enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(case, torch.float32)
    got = attended(args, monkeypatch)
    assert (got - reference.window_attention(**args)).abs().max() <= 1e-5
    assert (got - plain(args, torch.float64)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(case, dtype)
    got = attended(args, monkeypatch)
    assert_as_close_as_plain(got, plain(args, dtype), plain(args, torch.float64))


def test_chunks_of_the_default_size(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(Case(3, 2, 1, 16, 2, (attention.CHUNK - 2, 2 * attention.CHUNK + 50, 9)), torch.float32)
    got = attended(args, monkeypatch, attention.CHUNK)
    assert (got - reference.window_attention(**args)).abs().max() <= 1e-5


def test_long_chunks_where_tiles_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG_CHUNK", 64)
    args = arguments(Case(65, 24, 24, 16, 2, (60,)), torch.float16)
    got = attended(args, monkeypatch, chunk=4096)
    assert_as_close_as_plain(got, plain(args, torch.float16), plain(args, torch.float64))
    monkeypatch.setattr(attention, "LONG_CHUNK", 4096)
    assert not torch.equal(got, attended(args, monkeypatch, chunk=64))  # another order of the sums


def test_the_tiles_of_large_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "HALF_TILES", attention.LARGE_TILES)
    for case in (Case(33, 2, 2, 32, 2, (200, 3)), Case(96, 1, 1, 64, 2, (100,))):
        args = arguments(case, torch.float16)
        got = attended(args, monkeypatch)
        assert_as_close_as_plain(got, plain(args, torch.float16), plain(args, torch.float64))


def test_logits_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of hundreds: only the largest one's exponential may be one."""
    args = arguments(Case(5, 2, 2, 32, 2, (200,)), torch.float32)
    args["q"] *= 100.0
    args["keys"] += 10.0
    got = attended(args, monkeypatch)
    assert_as_close_as_plain(got, plain(args, torch.float32), plain(args, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_repeats_bit_for_bit_whatever_the_batch_and_the_capacity(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(5, 4, 2, 32, 3, (0, 130, 290, 17))
    args = arguments(case, dtype)
    got = attended(args, monkeypatch)
    assert torch.equal(got, attended(args, monkeypatch))
    for row, length in enumerate(case.lengths):
        alone: dict[str, Any] = {name: x[row : row + 1] if isinstance(x, Tensor) else x for name, x in args.items()}
        assert torch.equal(attended(alone, monkeypatch)[0], got[row])
        # A cache of just the slots that are needed: for the short rows one split, and no combination.
        end = case.front + length + case.width
        snug = alone | {"keys": alone["keys"][:, :end].clone(), "values": alone["values"][:, :end].clone()}
        assert torch.equal(attended(snug, monkeypatch)[0], got[row])


def test_no_levels_is_the_same_as_levels_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(Case(4, 2, 2, 16, 3, (150, 2)), torch.float32)
    without = attended(args | {"levels": None}, monkeypatch)
    assert torch.equal(without, attended(args | {"levels": torch.full_like(args["levels"], -1)}, monkeypatch))
    assert not torch.equal(without, attended(args, monkeypatch))


def test_levels_without_timestep_slots_see_none(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(Case(4, 2, 2, 16, 0, (150, 2)), torch.float32)
    with_levels: dict[str, Any] = args | {"levels": torch.ones(2, 4, dtype=torch.int32, device=DEVICE)}
    got = attended(with_levels, monkeypatch)
    assert torch.equal(got, attended(args, monkeypatch))
    assert (got - reference.window_attention(**with_levels)).abs().max() <= 1e-5


def test_other_layouts_are_left_to_the_reference() -> None:
    args = arguments(Case(2, 4, 2, 16, 2, (3, 4)), torch.float32)
    wrong = [
        {"q": args["q"].half()},
        {"q": args["q"].transpose(1, 2).contiguous().transpose(1, 2)},
        {"q": args["q"][:, :, :3].contiguous()},
        {"keys": args["keys"].transpose(0, 1)},
        {"values": args["values"][:, :-1].contiguous()},
        {"lengths": args["lengths"].long()},
        {"levels": args["levels"][:, :1]},
        {"scale": -1.0},
        {name: torch.cat([args[name]] * 16, -1) for name in ("q", "keys", "values")},
    ]
    for change in wrong:
        with pytest.raises(NotSupported):
            attention.window_attention(**args | change)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_captured_in_a_graph_it_follows_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(16, 32, 8, 128, 4, (1200, 700), spare=400)
    args = arguments(replace(case, lengths=(1600, 1600)), torch.float16)
    args["keys"].nan_to_num_()
    args["values"].nan_to_num_(posinf=0.0)
    attention.window_attention(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.window_attention(**args)
    for lengths in ((1200, 700), (0, 1600)):
        args["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, attention.window_attention(**args))
        assert_as_close_as_plain(out, plain(args, torch.float16), plain(args, torch.float64))
