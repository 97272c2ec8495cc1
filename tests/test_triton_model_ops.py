"""Triton `rms_norm`, `swiglu`, `qk_norm_rope_cache`, `kv_compact` against the reference: on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_mode import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from guarded import Guards
from precision import assert_as_close_as_plain

from sjd2_kernels import attention, cache, norm, reference
from sjd2_kernels.dispatch import NotSupported

# NaN, infinities and overflow are part of what is tested; the interpreter's numpy speaks of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Outputs of the wrappers start as NaN, and what lies around them stays as it was."""
    guards = Guards()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(tuple(shape), dtype, device))
        yield guards
        guards.check()


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def compare(got: Tensor, plain: Tensor, expected: Tensor, exact: Tensor) -> None:
    """float32: 1e-5 of the reference; halves: as close to float64 as plain torch in that dtype."""
    if got.dtype == F32:
        assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert_as_close_as_plain(got, plain, exact)


# -------------------------------------------------------------------- rms_norm, swiglu


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 11, 64), (2, 1280), (1, 8192), (70, 4096), (5, 7), (4, 1, 5120)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, guards: Guards) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    got = norm.rms_norm(x, weight, 1e-5, None)
    exact = plain_norm(x.double(), weight.double(), 1e-5)
    compare(got, plain_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5, None), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 64), (3, 1280), (2, 4096)], ids=str)
def test_rms_norm_with_residual(shape: tuple[int, ...], dtype: torch.dtype, guards: Guards) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=F32, seed=1)
    residual = guards.copy(random(*shape, dtype=dtype, seed=2))
    total = residual + x
    got = norm.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    exact = plain_norm(total.double(), weight.double(), 1e-5)
    expected = reference.rms_norm(total, weight, 1e-5, None)
    compare(got, plain_norm(total, weight.to(dtype), 1e-5), expected, exact)


def test_rms_norm_beside_a_wider_residual(guards: Guards) -> None:
    x, weight, residual = random(4, 100, dtype=BF16), random(100, seed=1), random(4, 100, seed=2)
    expected_residual = residual.clone()
    expected = reference.rms_norm(x, weight, 1e-5, expected_residual)
    got = norm.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, expected_residual)
    assert_as_close_as_plain(got, expected, plain_norm(residual.double(), weight.double(), 1e-5))


def test_rms_norm_of_tiny_rows_needs_its_epsilon(guards: Guards) -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    x[1] = 1e-4
    got = norm.rms_norm(x, weight, 1e-6, None)
    assert not got[0].any()
    torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-6, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 64), (33, 300), (9, 1280), (1, 11008)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, guards: Guards) -> None:
    gate_up = random(*shape[:-1], 2 * shape[-1], dtype=dtype) * 4
    gate_up[..., 0] = 90.0
    gate_up[..., 1] = -90.0
    got = norm.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    wide_gate, wide_up = gate_up.double().chunk(2, -1)
    plain, exact = torch.nn.functional.silu(gate) * up, torch.nn.functional.silu(wide_gate) * wide_up
    compare(got, plain, reference.swiglu(gate_up), exact)


# -------------------------------------------------------------------- qk_norm_rope_cache


def rope_case(heads: int, kv_heads: int, dim: int, kind: int, shared: bool, dtype: torch.dtype) -> dict[str, Any]:
    width, front, lengths = 3, 2, i32(0, 7)
    angle = torch.arange(16)[:, None] * 50.0 ** -(torch.arange(dim // 2) / dim)
    weights = {
        f"{name}_{part}": random(1 if shared else count, dim, dtype=dtype, seed=seed) if kind >= needed else None
        for seed, (name, count, part, needed) in enumerate(
            ((n, c, p, k) for n, c in (("q", heads), ("k", kv_heads)) for p, k in (("weight", 1), ("bias", 2))), 1
        )
    }
    return {
        "qkv": random(2, width, heads + 2 * kv_heads, dim, dtype=dtype) + 0.5,
        "cos": torch.cat([angle.cos()] * 2, 1).to(DEVICE),
        "sin": torch.cat([-angle.sin(), angle.sin()], 1).to(DEVICE),
        "lengths": lengths,
        "keys": random(2, front + 12, kv_heads, dim, dtype=dtype, seed=6),
        "values": random(2, front + 12, kv_heads, dim, dtype=dtype, seed=7),
        **weights,
        "norm": kind,
        "eps": 1e-5,
        "front": front,
    }


def plain_rope(args: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys of all rows, computed in `dtype`."""
    positions = args["lengths"][:, None].long() + torch.arange(args["qkv"].shape[1], device=DEVICE)
    cos, sin = (args[name].to(dtype)[positions].unsqueeze(2) for name in ("cos", "sin"))
    kv_heads = args["keys"].shape[2]
    heads = args["qkv"].shape[2] - 2 * kv_heads
    out = []
    for x, name in zip(args["qkv"].to(dtype).split((heads, kv_heads, kv_heads), 2), "qk"):
        weight, bias = args[f"{name}_weight"], args[f"{name}_bias"]
        x = x - x.mean(-1, keepdim=True) if args["norm"] == reference.LAYER_NORM else x
        x = x if args["norm"] == reference.NO_NORM else plain_norm(x, weight.to(dtype), 1e-5)
        x = x if bias is None else x + bias.to(dtype)
        low, high = x.chunk(2, -1)
        out.append(x * cos + torch.cat((high, low), -1) * sin)
    return out[0], out[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "kind", "shared"),
    [
        (4, 4, 64, reference.NO_NORM, False),
        (3, 1, 80, reference.RMS_NORM, True),
        (8, 2, 128, reference.RMS_NORM, False),
        (5, 5, 100, reference.LAYER_NORM, False),
        (32, 8, 96, reference.LAYER_NORM, True),
        (2, 1, 12, reference.LAYER_NORM, False),
    ],
)
def test_qk_norm_rope_cache(
    heads: int, kv_heads: int, dim: int, kind: int, shared: bool, dtype: torch.dtype, guards: Guards
) -> None:
    args = rope_case(heads, kv_heads, dim, kind, shared, dtype)
    mine = dict(args, keys=guards.copy(args["keys"]), values=guards.copy(args["values"]))
    old = args["keys"].clone(), args["values"].clone()
    got = cache.qk_norm_rope_cache(**mine)
    expected = reference.qk_norm_rope_cache(**args)
    plain, exact = plain_rope(args, dtype), plain_rope(args, torch.float64)
    compare(got, plain[0], expected, exact[0])
    front, width = args["front"], got.shape[1]
    for row, length in enumerate(args["lengths"].tolist()):
        new = slice(front + length, front + length + width)
        compare(mine["keys"][row, new], plain[1][row], args["keys"][row, new], exact[1][row])
        assert torch.equal(mine["values"], args["values"])
        old[0][row, new] = mine["keys"][row, new]
    assert torch.equal(mine["keys"], old[0])


def test_qk_norm_rope_cache_of_another_dtype(guards: Guards) -> None:
    mine, theirs = (rope_case(4, 2, 16, reference.RMS_NORM, True, F32) for _ in range(2))
    for args in (mine, theirs):
        args.update({name: args[name].half() for name in ("keys", "values", "q_weight", "k_weight")})
    got, expected = cache.qk_norm_rope_cache(**mine), reference.qk_norm_rope_cache(**theirs)
    assert got.dtype == F32 and (got - expected).abs().max() <= 1e-5
    assert torch.equal(mine["values"], theirs["values"])
    assert (mine["keys"] - theirs["keys"]).abs().max() <= 2**-9 * theirs["keys"].abs().max()


# -------------------------------------------------------------------- kv_compact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(2, 4), (3, 100), (8, 128)], ids=str)
def test_kv_compact(columns: tuple[int, int], dtype: torch.dtype, guards: Guards) -> None:
    generator = torch.Generator().manual_seed(columns[0])
    longest, front, counts = 21, 2, (0, 1, 8, 17, 21)
    source = torch.full((len(counts), longest), 99, dtype=torch.int32)
    for row, count in enumerate(counts):
        source[row, :count] = torch.randperm(longest, generator=generator)[:count].sort().values
    lengths = i32(4, 0, 2, 1, 3)
    keys, values = (random(2, 5, 30, *columns, dtype=dtype, seed=seed) for seed in (0, 1))
    mine = guards.copy(keys), guards.copy(values)
    rest = lengths, source.to(DEVICE), i32(*counts), front
    cache.kv_compact(*mine, *rest)
    before = keys.clone()
    reference.kv_compact(keys, values, *rest)
    assert not torch.equal(before, keys)
    assert torch.equal(mine[0], keys) and torch.equal(mine[1], values)


# -------------------------------------------------------------------- offsets beyond 32 bits


@pytest.fixture
def far_caches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keys and values [2, 2^18, 64, 128]: the second row begins 2^31 cells behind the first.

    Most of it is never touched, so on a CPU it is address space only.
    """
    if DEVICE == "cpu":
        copy = torch.UntypedStorage.copy_

        def copy_others(self: Any, source: Any, *rest: Any) -> Any:
            """The interpreter copies arguments back: onto themselves on a CPU, which would touch every page."""
            return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

        monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_others)
    try:
        return [torch.empty((2, 2**18, 64, 128), dtype=F16, device=DEVICE) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"16 GiB of address space cannot be had: {error}")


def near_caches() -> list[Any]:
    return [torch.zeros(2, 8, 64, 128, dtype=F16, device=DEVICE) for _ in range(2)]


def test_caches_beyond_32_bit_offsets(far_caches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two entries into each row, attend to them, move the second: as in a cache of a few slots."""
    far, near = far_caches, near_caches()
    monkeypatch.setattr(attention, "CHUNK", 2**19)  # one split: the interpreter visits every program of the grid
    qkv, table = random(2, 2, 192, 128, dtype=F16), random(8, 128, seed=1)
    lengths = i32(1, 2)
    for keys, values in (far, near):
        keys[:, :3], values[:, :3] = 0.5, 0.25
    q, expected = (
        cache.qk_norm_rope_cache(qkv, table, table, lengths, keys, values, None, None, None, None, 0, 0.0, 1)
        for keys, values in (far, near)
    )
    assert torch.equal(q, expected)
    assert torch.equal(far[0][:, :5], near[0][:, :5]) and torch.equal(far[1][:, :5], near[1][:, :5])
    levels = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    out, expected = (
        attention.window_attention(q[:, :, :64].contiguous(), keys, values, lengths, levels, 1, 0.1)
        for keys, values in (far, near)
    )
    assert torch.equal(out, expected)
    source, counts = i32(1).view(1, 1), i32(1)
    for keys, values in (far, near):
        # As two layers of one row, and so the second layer lies far away.
        cache.kv_compact(keys.unsqueeze(1), values.unsqueeze(1), i32(2), source, counts, 1)
    assert torch.equal(far[0][:, :5], near[0][:, :5]) and torch.equal(far[1][:, :5], near[1][:, :5])
    assert torch.equal(near[0][:, 3], near[0][:, 4]) and bool(near[0][1, 3].any())


# -------------------------------------------------------------------- what is refused


def test_other_layouts_are_left_to_the_reference() -> None:
    x = random(4, 8)
    for args in ((x.T, x[0], 1e-5, None), (x, x[0, :4], 1e-5, None), (x, x[0], 1e-5, x.T), (x.double(), x[0], 0.0, x)):
        with pytest.raises(NotSupported):
            norm.rms_norm(*args)
    for gate_up in (x.T, x[:, :7].contiguous(), x.int()):
        with pytest.raises(NotSupported):
            norm.swiglu(gate_up)
    args = rope_case(4, 2, 8, reference.RMS_NORM, False, F32)
    changes: tuple[dict[str, Any], ...] = (
        {"keys": args["keys"][:, :, :1]},
        {"cos": args["cos"].double()},
        {"q_weight": args["q_weight"][:2]},
        {"norm": 3},
        {"lengths": args["lengths"].long()},
        {"qkv": args["qkv"][..., :7].contiguous(), "keys": args["keys"][..., :7].contiguous()},
    )
    for change in changes:
        before = args["values"].clone()
        with pytest.raises(NotSupported):
            cache.qk_norm_rope_cache(**args | change)
        assert torch.equal(args["values"], before)
    keys, two, source = random(1, 2, 9, 2, 4), i32(1, 1), i32(0, 0, 0, 0).view(2, 2)
    for caches in (
        (keys[:, :, ::2], keys, two, source, two, 1),
        (keys, keys, i32(0), source, two, 1),
        (keys, keys, two, source.long(), two, 1),
        (keys, keys, two, source, two.long(), 1),
    ):
        with pytest.raises(NotSupported):
            cache.kv_compact(*caches)
