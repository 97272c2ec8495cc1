"""Triton `refine` against the reference: on a GPU, else in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import Guards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_mode import DEVICE

from sjd2_kernels import reference
from sjd2_kernels.dispatch import NotSupported

refinement = pytest.importorskip("sjd2_kernels.refinement", reason="triton is not installed", exc_type=ImportError)

STATE = ("drafts", "status", "levels", "q", "noisy")
LEVELS = 4


def case(
    batch: int,
    window: int,
    vocab: int = 5,
    dim: int = 8,
    *,
    accepted: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    noise: bool = False,
    nearest: bool = False,
    total: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `refine` by name: every fourth position forced, mixed levels, rows anywhere in the picture."""
    generator = torch.Generator().manual_seed(seed + 1000 * window + batch)

    def ints(low: int, high: int, *shape: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, dtype=kind, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    moved = ints(0, window + 1, batch) if accepted is None else torch.tensor(accepted, dtype=torch.int32)
    padded, count = total + window, window - 1
    forced = torch.where(ints(0, 4, padded) == 0, vocab, -1).long()
    forced[total:] = 0
    args = {
        "decided": ints(0, vocab + 1, batch, window, kind=torch.int64),
        "p": normal(batch, window, vocab).softmax(-1),
        "accepted": moved,
        "settled": torch.minimum(moved + ints(0, 3, batch), torch.tensor(window)).int(),
        "lengths": ints(0, total + 1, batch),
        "forced": forced,
        "initial": ints(0, vocab, batch, padded, kind=torch.int64),
        "drafts": ints(0, vocab, batch, count, kind=torch.int64),
        "status": ints(0, 3, batch, count),
        "levels": ints(-1, LEVELS, batch, count),
        "q": normal(batch, count, vocab).softmax(-1),
        "noisy": normal(batch, count, dim),
        "table": normal(vocab + 1, dim).to(dtype),
        "mean": normal(dim),
        "std": torch.rand(dim, generator=generator) + 0.5,
        "ratios": torch.tensor([0.0, 0.2, 0.5, 0.8]),
        "noise": normal(batch, padded, dim) if noise else None,
        "directions": torch.nn.functional.normalize(normal(vocab, dim), dim=-1) if nearest else None,
        "seeds": ints(-(2**62), 2**62, batch, kind=torch.int64),
        "fresh_level": LEVELS - 1,
    }
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in args.items()}


def both(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state after the kernel, inside guards, and after the reference."""
    guards = Guards()
    state = {name: args[name] for name in STATE}
    got: dict[str, Any] = args | {name: None if x is None else guards.copy(x) for name, x in state.items()}
    expected: dict[str, Any] = args | {name: None if x is None else x.clone() for name, x in state.items()}
    inputs = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor) and name not in STATE}
    refinement.refine(**got)
    reference.refine(**expected)
    guards.check()
    assert all(torch.equal(got[name], x) for name, x in inputs.items())
    return got, expected


def agree(args: dict[str, Any]) -> None:
    got, expected = both(args)
    for name in ("drafts", "status", "levels", "q"):
        assert torch.equal(got[name], expected[name]), name
    if args["noisy"] is None:
        return
    count = args["levels"].shape[1]
    slots = torch.arange(count, device=DEVICE)
    carried = slots + args["accepted"][:, None] < count
    if args["noise"] is not None:
        carried[:] = True
    assert torch.equal(got["noisy"][carried], expected["noisy"][carried])
    assert torch.allclose(got["noisy"], expected["noisy"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "window", "vocab", "dim"),
    [
        (1, 2, 5, 64), (2, 5, 257, 100), (16, 3, 7, 3), (1, 96, 11, 70), (2, 33, 5, 40), (1, 128, 5, 32),
        (1, 3, 5003, 1280),
    ],
)  # fmt: skip
@pytest.mark.parametrize("noise", [False, True])
def test_shapes(batch: int, window: int, vocab: int, dim: int, noise: bool) -> None:
    agree(case(batch, window, vocab, dim, noise=noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_tables(dtype: torch.dtype) -> None:
    agree(case(2, 6, dim=36, dtype=dtype))


@pytest.mark.parametrize("window", [2, 7])
def test_every_shift(window: int) -> None:
    """From rows that are done (0) to a window that moves on as a whole."""
    agree(case(window + 1, window, accepted=list(range(window + 1))))


def test_every_change_of_level() -> None:
    args = case(4, LEVELS + 2, accepted=[0, 1, 2, 3])
    args["levels"][:] = torch.arange(-1, LEVELS, device=DEVICE)
    args["forced"][:20] = -1
    args["lengths"][:] = torch.tensor([0, 3, 8, 14])
    args["settled"][:] = args["accepted"]
    got, _ = both(args)
    assert got["levels"].tolist() == [[-1, -1, 0, 1, 2], [-1, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]
    agree(args)


@pytest.mark.parametrize("window", [4, 131])
def test_groups_and_windows_longer_than_one_group(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of slots: what an earlier group writes is no source of a later one."""
    monkeypatch.setattr(refinement, "DENOISE_LONG_UP_TO", 0)
    if window == 4:
        monkeypatch.setitem(refinement.DENOISE_SHORT, "SLOTS", 2)
    agree(case(3, window, dim=4, accepted=[1, window // 2, 0], total=200))


def test_without_probabilities() -> None:
    args = case(3, 6)
    args["p"], args["q"] = args["p"][..., :0], args["q"][..., :0]
    agree(args)


def test_without_noise() -> None:
    """Token drafts: the levels stay what they are."""
    args = case(3, 6)
    for name in ("noisy", "table", "mean", "std", "ratios"):
        args[name] = None
    agree(args)
    levels = args["levels"].clone()
    refinement.refine(**args)
    assert torch.equal(args["levels"], levels)


def test_nearest_rows() -> None:
    """With the noise at hand, products and maxima are the reference's own; drawn noise may turn a near-tie."""
    agree(case(3, 9, vocab=257, dim=24, noise=True, nearest=True))
    args = case(3, 9, vocab=257, dim=24, nearest=True)
    got, expected = both(args)
    top = (expected["noisy"] @ args["directions"].T).topk(2).values
    near = top[..., 0] - top[..., 1] < 1e-5
    assert near.sum() <= 1
    assert torch.equal(got["drafts"][~near], expected["drafts"][~near])


@pytest.mark.parametrize(("batch", "window"), [(0, 4), (2, 1)])
def test_nothing_to_do(batch: int, window: int) -> None:
    refinement.refine(**case(batch, window))


def test_wrong_layouts_are_refused_before_anything_is_written() -> None:
    args = case(2, 4)
    wrong = {
        "decided": args["decided"].int(),
        "q": args["q"].double(),
        "p": args["p"][:, :3],
        "noisy": args["noisy"].transpose(0, 1).contiguous().transpose(0, 1),
        "table": None,
        "seeds": args["seeds"].int(),
    }
    before = {name: args[name].clone() for name in STATE}
    for name, value in wrong.items():
        with pytest.raises(NotSupported, match=name):
            refinement.refine(**(args | {name: value}))
    assert all(torch.equal(args[name], before[name]) for name in STATE)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, window = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    rows = draw(st.lists(st.integers(0, window), min_size=batch, max_size=batch))
    return case(
        batch, window, vocab=draw(st.integers(2, 9)), dim=draw(st.integers(1, 9)), accepted=rows,
        noise=draw(st.booleans()), total=draw(st.integers(1, 12)), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_case(args: dict[str, Any]) -> None:
    agree(args)
