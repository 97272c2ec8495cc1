"""Triton kernels that write into the static cache: new keys and values, and the compaction of a draft tree."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FLOATS, expect
from .dispatch import NotSupported
from .reference.model import LAYER_NORM, NO_NORM, RMS_NORM

ROPE: dict[str, Any] = {"BLOCK_H": 16, "num_warps": 4}
COMPACT: dict[str, Any] = {"ENTRIES": 8, "BLOCK": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["width", "slots", "front"])
def _qk_norm_rope_cache_kernel(
    qkv_ptr,  # [R, T, H + 2·Hkv, d]
    cos_ptr,  # f32 [positions, d]
    sin_ptr,  # f32 [positions, d]
    lengths_ptr,  # i32 [R]
    keys_ptr,  # [R, S, Hkv, d]
    values_ptr,  # [R, S, Hkv, d]
    q_weight_ptr,  # [H, d], [1, d] or None
    q_bias_ptr,  # [H, d], [1, d] or None
    k_weight_ptr,  # [Hkv, d], [1, d] or None
    k_bias_ptr,  # [Hkv, d], [1, d] or None
    out_ptr,  # [R, T, H, d]
    width,
    slots,
    front,
    eps,
    Q_WEIGHT_STRIDE: tl.constexpr,  # d, or 0 where all heads share one row
    Q_BIAS_STRIDE: tl.constexpr,
    K_WEIGHT_STRIDE: tl.constexpr,
    K_BIAS_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # d/2
    MEAN: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    row, step = token // width, token % width
    position = tl.load(lengths_ptr + row) + step
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]  # the two halves of a head go side by side, as the rotation pairs them
    there = (head < HEADS + 2 * KV_HEADS) & (column < HALF)
    queries, keys, values = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS), head >= HEADS + KV_HEADS

    source = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + column
    raw_low, raw_high = tl.load(source, mask=there, other=0.0), tl.load(source + HALF, mask=there, other=0.0)
    low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
    if MEAN:
        mean = (tl.sum(low + high, 1) / (2 * HALF))[:, None]
        low, high = tl.where(there, low - mean, 0.0), tl.where(there, high - mean, 0.0)
    if SCALE:
        square = tl.sum(low * low + high * high, 1) / (2 * HALF)
        scale = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
        low, high = low * scale, high * scale
    # Each kind of head multiplies by one and adds zero where the weights are the other's.
    own, other = queries & there, keys & there
    if q_weight_ptr is not None:
        low *= tl.load(q_weight_ptr + head * Q_WEIGHT_STRIDE + column, mask=own, other=1.0).to(tl.float32)
        high *= tl.load(q_weight_ptr + head * Q_WEIGHT_STRIDE + column + HALF, mask=own, other=1.0).to(tl.float32)
    if q_bias_ptr is not None:
        low += tl.load(q_bias_ptr + head * Q_BIAS_STRIDE + column, mask=own, other=0.0).to(tl.float32)
        high += tl.load(q_bias_ptr + head * Q_BIAS_STRIDE + column + HALF, mask=own, other=0.0).to(tl.float32)
    kv_head = head - HEADS
    if k_weight_ptr is not None:
        low *= tl.load(k_weight_ptr + kv_head * K_WEIGHT_STRIDE + column, mask=other, other=1.0).to(tl.float32)
        high *= tl.load(k_weight_ptr + kv_head * K_WEIGHT_STRIDE + column + HALF, mask=other, other=1.0).to(tl.float32)
    if k_bias_ptr is not None:
        low += tl.load(k_bias_ptr + kv_head * K_BIAS_STRIDE + column, mask=other, other=0.0).to(tl.float32)
        high += tl.load(k_bias_ptr + kv_head * K_BIAS_STRIDE + column + HALF, mask=other, other=0.0).to(tl.float32)

    angle = position * (2 * HALF) + column
    cos_low = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0)
    cos_high = tl.load(cos_ptr + angle + HALF, mask=column < HALF, other=0.0)
    sin_low = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0)
    sin_high = tl.load(sin_ptr + angle + HALF, mask=column < HALF, other=0.0)
    turned_low = low * cos_low + high * sin_low
    turned_high = high * cos_high + low * sin_high

    query = out_ptr + (token * HEADS + head) * (2 * HALF) + column
    tl.store(query, turned_low.to(out_ptr.dtype.element_ty), mask=own)
    tl.store(query + HALF, turned_high.to(out_ptr.dtype.element_ty), mask=own)
    entry = (row * slots + front + position) * KV_HEADS
    key = keys_ptr + (entry + kv_head) * (2 * HALF) + column
    tl.store(key, turned_low.to(keys_ptr.dtype.element_ty), mask=other)
    tl.store(key + HALF, turned_high.to(keys_ptr.dtype.element_ty), mask=other)
    value = values_ptr + (entry + kv_head - KV_HEADS) * (2 * HALF) + column
    tl.store(value, raw_low.to(values_ptr.dtype.element_ty), mask=values & there)
    tl.store(value + HALF, raw_high.to(values_ptr.dtype.element_ty), mask=values & there)


@triton.jit(do_not_specialize=["slots", "longest", "front"])
def _kv_compact_kernel(
    keys_ptr,  # [layers, R, S, Hkv·d]
    values_ptr,  # [layers, R, S, Hkv·d]
    lengths_ptr,  # i32 [R]
    source_ptr,  # i32 [R, M]
    counts_ptr,  # i32 [R]
    slots,
    longest,
    front,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, layer = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    count = tl.load(counts_ptr + row)
    begin = (tl.cast(layer, tl.int64) * tl.num_programs(1) + row) * slots + front + tl.load(lengths_ptr + row)
    # Sources rise and lie at or behind their targets, so what a step reads no earlier step has overwritten.
    for first in range(0, count, ENTRIES):
        target = first + tl.arange(0, ENTRIES)
        source = tl.load(source_ptr + row * longest + target, mask=target < count, other=0)
        moved = ((target < count) & (source != target))[:, None] & (column < COLUMNS)
        old = (begin + source)[:, None] * COLUMNS + column
        new = (begin + target)[:, None] * COLUMNS + column
        keys = tl.load(keys_ptr + old, mask=moved)
        values = tl.load(values_ptr + old, mask=moved)
        tl.debug_barrier()  # within a step another thread may own the entry that this one overwrites
        tl.store(keys_ptr + new, keys, mask=moved)
        tl.store(values_ptr + new, values, mask=moved)


def qk_norm_rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    front: int,
) -> Tensor:
    """As `reference.qk_norm_rope_cache`, for heads of an even number of dimensions."""
    rows, width, stacked, dim = qkv.shape
    slots, kv_heads = keys.shape[1:3]
    heads = stacked - 2 * kv_heads
    expect("qkv", qkv, FLOATS, rows, width, stacked, dim)
    expect("cos", cos, torch.float32, cos.shape[0], dim)
    expect("sin", sin, torch.float32, cos.shape[0], dim)
    expect("lengths", lengths, torch.int32, rows)
    expect("keys", keys, FLOATS, rows, slots, kv_heads, dim)
    expect("values", values, FLOATS, rows, slots, kv_heads, dim)
    if dim % 2 or norm not in (NO_NORM, RMS_NORM, LAYER_NORM):
        raise NotSupported(f"{dim} dimensions per head, norm {norm}: expected an even number, and a known norm")
    config = ROPE | {
        "Q_WEIGHT_STRIDE": _stride("q_weight", q_weight, heads, dim),
        "Q_BIAS_STRIDE": _stride("q_bias", q_bias, heads, dim),
        "K_WEIGHT_STRIDE": _stride("k_weight", k_weight, kv_heads, dim),
        "K_BIAS_STRIDE": _stride("k_bias", k_bias, kv_heads, dim),
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": dim // 2,
        "MEAN": norm == LAYER_NORM,
        "SCALE": norm != NO_NORM,
        "BLOCK_D": triton.next_power_of_2(dim // 2),
    }
    out = torch.empty((rows, width, heads, dim), dtype=qkv.dtype, device=qkv.device)
    grid = (rows * width, triton.cdiv(stacked, config["BLOCK_H"]))
    _qk_norm_rope_cache_kernel[grid](
        qkv, cos, sin, lengths, keys, values, q_weight, q_bias, k_weight, k_bias, out, width, slots, front, eps,
        **config,
    )  # fmt: skip
    return out


def kv_compact(keys: Tensor, values: Tensor, lengths: Tensor, source: Tensor, counts: Tensor, front: int) -> None:
    """As `reference.kv_compact`."""
    layers, rows, slots, kv_heads, dim = keys.shape
    longest = source.shape[1]
    expect("keys", keys, FLOATS, layers, rows, slots, kv_heads, dim)
    expect("values", values, FLOATS, layers, rows, slots, kv_heads, dim)
    expect("lengths", lengths, torch.int32, rows)
    expect("source", source, torch.int32, rows, longest)
    expect("counts", counts, torch.int32, rows)
    config: dict[str, Any] = COMPACT | {"COLUMNS": kv_heads * dim}
    grid = (triton.cdiv(kv_heads * dim, config["BLOCK"]), rows, layers)
    _kv_compact_kernel[grid](keys, values, lengths, source, counts, slots, longest, front, **config)


def _stride(name: str, weight: Tensor | None, heads: int, dim: int) -> int:
    if weight is None:
        return 0
    shared = weight.shape[0] == 1
    expect(name, weight, FLOATS, 1 if shared else heads, dim)
    return 0 if shared else dim
