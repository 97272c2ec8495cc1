"""Representative calls of every op, for `compile_report`: shapes of the models that the engine is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference

F32, F16, BF16, I32, I64 = torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64
PADDED = 2496  # positions of a picture with padding


class _OnGpu(Tensor):
    """A tensor without memory that a wrapper takes for one on a GPU."""

    is_cuda = True  # pyright: ignore[reportAssignmentType]


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(_OnGpu)


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments by position are made by `make(**options)`."""

    make: Callable[..., tuple[Any, ...]]
    options: dict[str, Any]

    @property
    def op(self) -> str:
        return self.make.__name__

    @property
    def name(self) -> str:
        return " ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in self.options.items())

    def arguments(self) -> tuple[Any, ...]:
        return self.make(**self.options)


def embed_window(
    batch: int = 1, window: int = 96, dim: int = 4096, dtype: torch.dtype = BF16, noise: bool = True
) -> tuple[Any, ...]:
    noisy = (_empty(F32, batch, window - 1, dim), _empty(F32, dim), _empty(F32, dim)) if noise else (None,) * 3
    integers = _empty(I64, batch, window), _empty(I32, batch, window)
    return *integers, _empty(dtype, 8192, dim), _empty(dtype, batch, dim), *noisy


def perturb(
    batch: int = 64, length: int = 2400, dim: int = 4096, dtype: torch.dtype = BF16, denormalize: bool = True
) -> tuple[Any, ...]:
    places = _empty(I32, batch, length), _empty(I64, length).expand(batch, -1), _empty(I64, batch)
    return _empty(dtype, batch, length, dim), *places, *(_empty(F32, n) for n in (dim, dim, 25)), 0, denormalize


def refine(
    batch: int = 1,
    window: int = 96,
    dim: int = 4096,
    ids: int = 8192,
    dtype: torch.dtype = BF16,
    noise: bool = True,
    nearest: bool = False,
) -> tuple[Any, ...]:
    count = window - 1
    counts = [_empty(I32, batch) for _ in range(3)]
    state = (
        _empty(I64, batch, count),
        _empty(I32, batch, count),
        _empty(I32, batch, count),
        _empty(F32, batch, count, ids),
    )
    constants: tuple[Tensor | None, ...] = (None,) * 5
    if noise:
        constants = _empty(F32, batch, count, dim), _empty(dtype, 8192, dim), *(_empty(F32, n) for n in (dim, dim, 25))
    return (
        _empty(I64, batch, window), _empty(F32, batch, window, ids), *counts, _empty(I64, PADDED),
        _empty(I64, batch, PADDED), *state, *constants, None, _empty(F32, 8192, dim) if nearest else None,
        _empty(I64, batch), 24,
    )  # fmt: skip


def sample_window(
    batch: int = 1,
    window: int = 96,
    ids: int = 8192,
    dtype: torch.dtype = BF16,
    guidance: bool = True,
    temperature: float = 0.9,
    top_k: int = 2000,
    top_p: float = 0.9,
    per_position: bool = True,
    need_p: bool = True,
) -> tuple[Any, ...]:
    sets = (2,) if guidance else ()
    rows = _empty(I64, batch), _empty(I32, batch), _empty(I32, batch)
    options = 3.0, temperature, top_k, top_p, 0, ids, per_position, need_p
    return _empty(dtype, *sets, batch, window, ids), *rows, None, *options


def verify(batch: int = 1, window: int = 96, ids: int = 8192, rule: int = reference.PAPER) -> tuple[Any, ...]:
    count = window - 1
    held = 0 if rule == reference.MATCH else ids
    drawn = _empty(I64, batch, window), _empty(F32, batch, window, held), _empty(torch.bool, batch, window)
    state = _empty(I64, batch, count), _empty(F32, batch, count, held), *(_empty(I32, batch, count) for _ in range(2))
    return *drawn, *state, _empty(I64, PADDED), *(_empty(I32, batch) for _ in range(3)), _empty(I64, batch), 2400, rule


def commit(batch: int = 1, window: int = 96, sets: int = 2) -> tuple[Any, ...]:
    decided = _empty(I64, batch, window), _empty(I32, batch), _empty(I32, batch)
    counters = *(_empty(I32, batch) for _ in range(5)), _empty(I64, batch, window + 1)
    return *decided, _empty(I64, batch, PADDED), *counters, _empty(I32, sets * batch), 2400


def rms_norm(rows: int = 192, dim: int = 4096, dtype: torch.dtype = BF16, residual: bool = True) -> tuple[Any, ...]:
    return _empty(dtype, rows, dim), _empty(dtype, dim), 1e-5, _empty(dtype, rows, dim) if residual else None


def swiglu(rows: int = 192, dim: int = 11008, dtype: torch.dtype = BF16) -> tuple[Any, ...]:
    return (_empty(dtype, rows, 2 * dim),)


def qk_norm_rope_cache(
    width: int = 96,
    heads: int = 32,
    kv_heads: int = 32,
    head: int = 128,
    dtype: torch.dtype = BF16,
    norm: int = reference.LAYER_NORM,
    slots: int = 4096,
) -> tuple[Any, ...]:
    cache = _empty(dtype, 2, slots, kv_heads, head), _empty(dtype, 2, slots, kv_heads, head)
    shapes = () if norm == reference.NO_NORM else (heads, heads, kv_heads, kv_heads)
    weights: list[Tensor | None] = [_empty(dtype, n, head) for n in shapes] or [None] * 4
    if norm == reference.RMS_NORM:
        weights[1] = weights[3] = None
    tables = _empty(F32, slots, head), _empty(F32, slots, head), _empty(I32, 2)
    return _empty(dtype, 2, width, heads + 2 * kv_heads, head), *tables, *cache, *weights, norm, 1e-5, 25


def window_attention(
    rows: int = 2,
    width: int = 96,
    heads: int = 32,
    kv_heads: int = 32,
    head: int = 128,
    dtype: torch.dtype = BF16,
    levels: bool = True,
    slots: int = 4096,
) -> tuple[Any, ...]:
    cache = _empty(dtype, rows, slots, kv_heads, head), _empty(dtype, rows, slots, kv_heads, head)
    known = _empty(I32, rows), _empty(I32, rows, width) if levels else None
    return _empty(dtype, rows, width, heads, head), *cache, *known, 25, head**-0.5


def kv_compact(layers: int = 32, rows: int = 2, longest: int = 64, dtype: torch.dtype = BF16) -> tuple[Any, ...]:
    cache = _empty(dtype, layers, rows, 4096, 32, 128), _empty(dtype, layers, rows, 4096, 32, 128)
    return *cache, _empty(I32, rows), _empty(I32, rows, longest), _empty(I32, rows), 25


def _cases(*calls: tuple[Callable[..., tuple[Any, ...]], dict[str, Any]]) -> tuple[Case, ...]:
    return tuple(Case(make, options) for make, options in calls)


CASES = _cases(
    # One image of a 7B model with guidance, and what takes most registers and shared memory.
    (embed_window, {}),
    (perturb, {}),
    (sample_window, {}),
    (sample_window, {"ids": 16384, "temperature": 1.0}),
    (sample_window, {"ids": 32768, "top_p": 1.0}),
    (sample_window, {"ids": 184622}),
    (verify, {}),
    (verify, {"ids": 65536, "rule": reference.COUPLED}),
    (verify, {"ids": 184622}),
    (commit, {}),
    (refine, {}),
    (rms_norm, {}),
    (swiglu, {}),
    (qk_norm_rope_cache, {}),
    (window_attention, {}),
    (window_attention, {"width": 512, "head": 100, "levels": False}),
    (window_attention, {"dtype": F32}),
    (kv_compact, {}),
    # Other types, sizes, rules and options.
    (embed_window, {"dtype": F32}),
    (embed_window, {"dtype": F16, "dim": 1280, "window": 32}),
    (embed_window, {"batch": 16}),
    (embed_window, {"noise": False}),
    (perturb, {"dtype": F32, "denormalize": False}),
    (perturb, {"dtype": F16, "batch": 2, "length": 272, "dim": 1280}),
    (sample_window, {"dtype": F32}),
    (sample_window, {"dtype": F16, "ids": 500, "guidance": False}),
    (sample_window, {"ids": 32768, "top_k": 0}),
    (sample_window, {"ids": 65536, "top_k": 0, "top_p": 1.0}),
    (sample_window, {"ids": 65536, "per_position": False}),
    (sample_window, {"temperature": 0.0, "top_k": 0, "top_p": 1.0}),
    (sample_window, {"ids": 65536, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "need_p": False}),
    (sample_window, {"need_p": False}),
    (verify, {"rule": reference.MATCH}),
    (verify, {"rule": reference.RATIO}),
    (verify, {"rule": reference.COUPLED}),
    (verify, {"ids": 500, "window": 32}),
    (verify, {"ids": 65536, "rule": reference.RATIO}),
    (commit, {"batch": 16, "window": 32, "sets": 0}),
    (refine, {"dtype": F32, "batch": 16, "ids": 184622}),
    (refine, {"dtype": F16, "window": 32, "dim": 1280, "nearest": True}),
    (refine, {"noise": False, "ids": 65536}),
    (rms_norm, {"residual": False}),
    (rms_norm, {"dim": 1280, "dtype": F32}),
    (rms_norm, {"dim": 8192, "dtype": F16}),
    (swiglu, {"dim": 3420, "dtype": F32}),
    (swiglu, {"rows": 8192, "dtype": F16}),
    (qk_norm_rope_cache, {"norm": reference.RMS_NORM, "kv_heads": 8}),
    (qk_norm_rope_cache, {"norm": reference.NO_NORM, "head": 100, "dtype": F32}),
    (qk_norm_rope_cache, {"norm": reference.NO_NORM, "head": 64, "width": 1, "dtype": F16}),
    (qk_norm_rope_cache, {"head": 80, "heads": 16, "kv_heads": 16}),
    (window_attention, {"width": 1}),
    (window_attention, {"width": 33, "kv_heads": 8}),
    (window_attention, {"width": 32, "head": 64, "heads": 20, "kv_heads": 20, "dtype": F16}),
    (window_attention, {"width": 16, "head": 80, "levels": False}),
    (window_attention, {"width": 64, "head": 96}),
    (window_attention, {"width": 16, "head": 64, "dtype": F32, "levels": False, "slots": 600}),
    (kv_compact, {"dtype": F32, "longest": 16}),
)
