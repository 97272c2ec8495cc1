"""Triton kernels of `window_attention`: a few queries per row against a long static cache, keys split into chunks.

Queries of all heads that share a key/value head form one tile, so that each key is read once per tile. A chunk is
a fixed number of keys: what a query gets does not depend on the batch, the cache's capacity or the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FLOATS, expect
from .dispatch import NotSupported

# Keys per split. A tile of 128 queries fills a multiprocessor, and 2 rows × 32 heads × 2,400 keys make 128 programs for
# 132 of them; smaller tiles share one, and gain from more and shorter programs.
CHUNK = 640
LONG_CHUNK = 1280
LONG_FROM = 24  # tiles of 128 queries per row
LONGEST_SPLIT = 128  # more queries than this fill the device without splitting the keys
LARGEST_HEAD = 128


@dataclass(frozen=True)
class Tile:
    """Keys per step of a program's loop, and how it runs."""

    keys: int
    warps: int
    stages: int


# By queries per tile. With 128 dimensions these need at most 90 KiB of shared memory and spill nothing.
HALF_TILES = {16: Tile(64, 4, 3), 32: Tile(64, 4, 3), 64: Tile(32, 4, 4), 128: Tile(32, 8, 4)}
# Tensor cores that read shared memory want more keys at once; these GPUs have the room (at most 128 KiB).
LARGE_TILES = {**HALF_TILES, 64: Tile(64, 4, 3), 128: Tile(64, 8, 3)}
LARGE_FROM = 200 * 1024  # bytes of shared memory that a program can have: Hopper and data-centre Blackwell
# Exact float32 products are made outside the tensor cores, from registers.
FLOAT_TILES = {16: Tile(16, 8, 3), 32: Tile(16, 8, 3)}
COMBINE: dict[str, Any] = {"BLOCK_M": 8, "UNROLL": 8, "num_warps": 4}


@triton.jit
def _attend(
    q,  # [M, d]
    keys,  # to the first key of this row and head
    values,
    acc,  # f32 [M, d], weighted sum of values
    top,  # f32 [M], largest logit so far
    total,  # f32 [M], sum of 2^(logit − top)
    begin,
    end,
    seen,  # i32 [M], entries that each query sees
    scale,
    STRIDE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    entry = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    offset = entry[:, None] * STRIDE + column[None, :]
    for start in range(begin, end, BLOCK_N):
        skip = tl.cast(start, tl.int64) * STRIDE
        if MASKED:
            # What is not seen may be NaN, which a weight of zero would not take away.
            there = (entry < end - start)[:, None] & (column < HEAD)[None, :]
            k = tl.load(keys + skip + offset, mask=there, other=0.0)
            v = tl.load(values + skip + offset, mask=there, other=0.0)
        elif HEAD < BLOCK_D:
            k = tl.load(keys + skip + offset, mask=(column < HEAD)[None, :], other=0.0)
            v = tl.load(values + skip + offset, mask=(column < HEAD)[None, :], other=0.0)
        else:
            k = tl.load(keys + skip + offset)
            v = tl.load(values + skip + offset)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            logits = tl.where((start + entry)[None, :] < seen[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["width", "slots", "front", "chunk"])
def _window_attention_kernel(
    q_ptr,  # [R, T, H, d]
    keys_ptr,  # [R, S, Hkv, d]
    values_ptr,  # [R, S, Hkv, d]
    lengths_ptr,  # i32 [R]
    levels_ptr,  # i32 [R, T] or None
    out_ptr,  # [R, T, H, d], or f32 [splits, R, T, H, d]
    mass_ptr,  # f32 [splits, R, T, H], log2 of each split's sum of weights; None for one split
    width,
    slots,
    front,
    chunk,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Tiles and heads that read the same part of the cache run next to each other; short last chunks come last.
    tiles = tl.num_programs(0) // KV_HEADS
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row, split = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    first = tile * BLOCK_M // GROUP
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, width - 1)
    begin = split * chunk
    end = tl.minimum(begin + chunk, length + last + 1)
    if begin >= end:
        return

    STRIDE: tl.constexpr = KV_HEADS * HEAD
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    step = member // GROUP
    column = tl.arange(0, BLOCK_D)
    real = step < width
    inside = real[:, None] & (column < HEAD)[None, :]
    query = (tl.cast(row, tl.int64) * width + step) * (KV_HEADS * GROUP) + head * GROUP + member % GROUP
    q = tl.load(q_ptr + query[:, None] * HEAD + column[None, :], mask=inside, other=0.0)
    cache = tl.cast(row, tl.int64) * slots * STRIDE + head * HEAD
    scale = tl.cast(scale, tl.float32) * 1.4426950408889634

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if levels_ptr is not None:
        # The first split starts from the timestep slot of each query's own level.
        level = tl.load(levels_ptr + row * width + step, mask=real, other=-1)
        timed = (level >= 0) & (level < front) & (split == 0)
        own = cache + tl.maximum(level, 0)[:, None] * STRIDE + column[None, :]
        k = tl.load(keys_ptr + own, mask=timed[:, None] & inside, other=0.0)
        acc += tl.load(values_ptr + own, mask=timed[:, None] & inside, other=0.0)
        logit = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        top = tl.where(timed, logit, top)
        total = tl.where(timed, 1.0, total)

    cache += tl.cast(front, tl.int64) * STRIDE
    keys, values = keys_ptr + cache, values_ptr + cache
    # Blocks that every query of the tile sees need no mask.
    whole = tl.maximum(tl.minimum(end, length + first + 1) - begin, 0) // BLOCK_N * BLOCK_N
    seen = length + step + 1
    acc, top, total = _attend(
        q, keys, values, acc, top, total, begin, begin + whole, seen, scale, STRIDE, HEAD, BLOCK_N, BLOCK_D, False
    )
    acc, top, total = _attend(
        q, keys, values, acc, top, total, begin + whole, end, seen, scale, STRIDE, HEAD, BLOCK_N, BLOCK_D, True
    )

    # Queries of a tile that see nothing of this split are left with NaN, which the combination does not read.
    if mass_ptr is not None:
        query += tl.cast(split, tl.int64) * tl.num_programs(1) * width * (KV_HEADS * GROUP)
        tl.store(mass_ptr + query, top + tl.log2(total), mask=real)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query[:, None] * HEAD + column[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["width"])
def _combine_kernel(
    parts_ptr,  # f32 [splits, R, T, H, d]
    mass_ptr,  # f32 [splits, R, T, H]
    lengths_ptr,  # i32 [R]
    out_ptr,  # [R, T, H, d]
    width,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(1)
    member = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = member // HEADS
    column = tl.arange(0, BLOCK_D)
    length = tl.load(lengths_ptr + row)
    used = tl.where(step < width, tl.cdiv(length + step + 1, CHUNK), 0)  # splits that hold keys of this query
    most = tl.max(used, 0)
    pitch = tl.cast(tl.num_programs(1), tl.int64) * width * HEADS
    query = tl.cast(row, tl.int64) * width * HEADS + member

    # Loads of one iteration do not wait for each other; sums run in the order of the splits.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, most, UNROLL):
        for i in tl.static_range(UNROLL):
            split = first + i
            mass = tl.load(mass_ptr + split * pitch + query, mask=split < used, other=float("-inf"))
            top = tl.maximum(top, mass)
    top = tl.where(used > 0, top, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, most, UNROLL):
        for i in tl.static_range(UNROLL):
            split = first + i
            mass = tl.load(mass_ptr + split * pitch + query, mask=split < used, other=float("-inf"))
            weight = tl.exp2(mass - top)
            part = parts_ptr + (split * pitch + query)[:, None] * HEAD + column[None, :]
            inside = (split < used)[:, None] & (column < HEAD)[None, :]
            acc += weight[:, None] * tl.load(part, mask=inside, other=0.0)
            total += weight
    out = (acc / tl.where(used > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    inside = (used > 0)[:, None] & (column < HEAD)[None, :]
    tl.store(out_ptr + query[:, None] * HEAD + column[None, :], out, mask=inside)


def _tiles(q: Tensor) -> dict[int, Tile]:
    if q.dtype == torch.float32:
        return FLOAT_TILES
    large = q.is_cuda and torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= LARGE_FROM
    return LARGE_TILES if large else HALF_TILES


def _chunks(entries: int, width: int, tile: Tile, large: bool) -> tuple[int, int]:
    """Keys per split, and the number of splits."""
    chunk = LONG_CHUNK if large else CHUNK
    if width > LONGEST_SPLIT or entries <= chunk:
        return (entries + tile.keys - 1) // tile.keys * tile.keys, 1
    return chunk, (entries + chunk - 1) // chunk


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, levels: Tensor | None, front: int, scale: float
) -> Tensor:
    """As `reference.window_attention`, for heads of up to 128 dimensions."""
    rows, width, heads, head = q.shape
    slots, kv_heads = keys.shape[1:3]
    expect("q", q, FLOATS, rows, width, heads, head)
    expect("keys", keys, q.dtype, rows, slots, kv_heads, head)
    expect("values", values, q.dtype, rows, slots, kv_heads, head)
    expect("lengths", lengths, torch.int32, rows)
    if levels is not None:
        expect("levels", levels, torch.int32, rows, width)
    if head > LARGEST_HEAD or heads % kv_heads:
        raise NotSupported(f"{heads} heads of {head} dimensions on {kv_heads}: expected a multiple, and at most 128")
    if scale <= 0.0:
        raise NotSupported(f"scale is {scale}: expected a positive number")
    group = heads // kv_heads
    tiles = _tiles(q)
    # Heads whose rows are not made of 16-byte words take twice the addresses, and so the registers.
    largest = max(tiles) if head % 8 == 0 else 32
    block_m: int = min(max(triton.next_power_of_2(width * group), 16), largest)  # pyright: ignore[reportAssignmentType]
    tile = tiles[block_m]
    programs: int = triton.cdiv(width * group, block_m) * kv_heads  # pyright: ignore[reportAssignmentType]
    chunk, splits = _chunks(slots - front, width, tile, block_m == 128 and programs >= LONG_FROM)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, mass = out, None
    if splits > 1:
        parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        mass = torch.empty((splits, rows, width, heads), dtype=torch.float32, device=q.device)
    shared: dict[str, Any] = {"HEAD": head, "BLOCK_D": max(16, triton.next_power_of_2(head))}
    config: dict[str, Any] = {
        "KV_HEADS": kv_heads, "GROUP": group, "BLOCK_M": block_m, "BLOCK_N": tile.keys,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (programs, rows, splits)
    _window_attention_kernel[grid](
        q, keys, values, lengths, levels, parts, mass, width, slots, front, chunk, scale, **shared, **config
    )
    if mass is not None:
        config = COMBINE | {"HEADS": heads, "CHUNK": chunk}
        grid = (triton.cdiv(width * heads, config["BLOCK_M"]), rows)
        _combine_kernel[grid](parts, mass, lengths, out, width, **shared, **config)
    return out
