"""Triton kernels that move the drafts along: shift by each row's count, denoise one level, refill.

The state is shifted in place, and a slot's source is never in front of it. So a program that owns some columns of
all slots reads a group of slots, waits until all its threads have read, writes the group, and goes on to the next:
no slot is written before it was read, without a second buffer and without a second pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FLOATS, expect
from .dispatch import NotSupported
from .philox import normals

# Tiles of slots × columns of the noisy drafts. 32 columns are a full 128-byte line of float32, and 4096 of them 128
# programs, one for every multiprocessor. While those are all there is, a whole window is one group, so that its loads
# are all in flight at once; batches hide that latency by themselves, and in short groups only those that reach
# behind the carried drafts draw noise. Without fused multiply-adds the arithmetic rounds as the reference's separate
# operations do.
DENOISE_SHORT: dict[str, Any] = {"SLOTS": 32, "COLUMNS": 32, "num_warps": 4, "enable_fp_fusion": False}
DENOISE_LONG: dict[str, Any] = {"SLOTS": 128, "COLUMNS": 32, "num_warps": 8, "enable_fp_fusion": False}
DENOISE_LONG_UP_TO = 8192  # columns of all rows: two programs for each multiprocessor of an H100

MAX_BATCH = 65535  # programs along the second axis of a grid

# Slots of one group, and ids that one program copies.
SHIFT: dict[str, Any] = {"SLOTS": 128, "BLOCK": 2048, "num_warps": 4}


@triton.jit
def _denoise_kernel(
    decided_ptr,  # i64 [B, W]
    accepted_ptr,  # i32 [B]
    lengths_ptr,  # i32 [B]
    forced_ptr,  # i64 [P]
    levels_ptr,  # i32 [B, W−1]
    noisy_ptr,  # f32 [B, W−1, D], in place
    table_ptr,  # [V+F, D]
    mean_ptr,  # f32 [D]
    std_ptr,  # f32 [D]
    ratios_ptr,  # f32 [K]
    noise_ptr,  # f32 [B, P, D] or None
    seeds_ptr,  # i64 [B]
    window,
    padded,
    dim,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    lanes = block * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    inside = (columns < dim)[None, :]
    mean = tl.load(mean_ptr + columns, mask=columns < dim)[None, :]
    std = tl.load(std_ptr + columns, mask=columns < dim, other=1.0)[None, :]
    count = window - 1
    accepted = tl.load(accepted_ptr + row)
    length = tl.load(lengths_ptr + row)
    seed = tl.load(seeds_ptr + row)
    for group in range(GROUPS):
        slots = group * SLOTS + tl.arange(0, SLOTS)
        source = slots + accepted
        carried = source < count
        known = tl.load(forced_ptr + length + slots, mask=carried, other=0)
        decided = tl.load(decided_ptr + row * window + source, mask=carried, other=0)
        token = tl.where(known >= 0, known, decided)
        level = tl.load(levels_ptr + row * count + source, mask=carried, other=0)
        ratio = tl.load(ratios_ptr + tl.maximum(level, 0))[:, None]
        used = carried[:, None] & inside
        draft = tl.load(noisy_ptr + (row * count + source)[:, None] * dim + columns[None, :], mask=used)
        clean = tl.load(table_ptr + token[:, None] * dim + columns[None, :], mask=used)
        target = tl.div_rn(clean.to(tl.float32) - mean, std)
        value = target + ratio * (draft - target)
        if tl.minimum(group * SLOTS + SLOTS, count) + accepted > count:
            if noise_ptr is None:
                fresh = normals(seed, (length + slots)[:, None], 0, lanes[None, :])
            else:
                at = noise_ptr + (row * padded + length + slots)[:, None] * dim + columns[None, :]
                fresh = tl.load(at, mask=(slots < count)[:, None] & inside)
            value = tl.where(carried[:, None], value, fresh)
        tl.debug_barrier()  # a slot of this group may be the source of an earlier one
        tl.store(
            noisy_ptr + (row * count + slots)[:, None] * dim + columns[None, :],
            value,
            mask=(slots < count)[:, None] & inside,
        )


@triton.jit(do_not_specialize=["fresh_level"])
def _shift_kernel(
    decided_ptr,  # i64 [B, W]
    p_ptr,  # f32 [B, W, V]
    accepted_ptr,  # i32 [B]
    settled_ptr,  # i32 [B]
    lengths_ptr,  # i32 [B]
    forced_ptr,  # i64 [P]
    initial_ptr,  # i64 [B, P]
    nearest_ptr,  # i64 [B, W−1] or None
    drafts_ptr,  # i64 [B, W−1], written
    status_ptr,  # i32 [B, W−1], written
    levels_ptr,  # i32 [B, W−1], in place, or None where no draft is ever noisy
    q_ptr,  # f32 [B, W−1, V], written
    window,
    padded,
    ids,
    fresh_level,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    count = window - 1
    accepted = tl.load(accepted_ptr + row)
    if tl.program_id(0) > 0:
        blocks = tl.cdiv(ids, BLOCK)
        job = tl.program_id(0) - 1
        slot = job // blocks
        columns = job % blocks * BLOCK + tl.arange(0, BLOCK)
        source = tl.minimum(slot + accepted, count)
        p = tl.load(p_ptr + (row * window + source) * ids + columns, mask=columns < ids)
        tl.store(q_ptr + (row * count + slot) * ids + columns, p, mask=columns < ids)
    else:
        length = tl.load(lengths_ptr + row)
        settled = tl.load(settled_ptr + row)
        for group in range(GROUPS):
            slots = group * SLOTS + tl.arange(0, SLOTS)
            valid = slots < count
            source = slots + accepted
            predicted = source < window
            known = tl.load(forced_ptr + length + slots, mask=valid, other=0)
            decided = tl.load(decided_ptr + row * window + source, mask=valid & predicted, other=0)
            initial = tl.load(initial_ptr + row * padded + length + slots, mask=valid & ~predicted, other=0)
            token = tl.where(known >= 0, known, tl.where(predicted, decided, initial))
            status = predicted.to(tl.int32)
            if levels_ptr is not None:
                final = predicted & (source < settled)
                status += final.to(tl.int32)
                carried = source < count
                level = tl.load(levels_ptr + row * count + source, mask=carried, other=0)
                level = tl.where(carried, tl.maximum(level - 1, -1), fresh_level)
                level = tl.where(final | (known >= 0), -1, level)
                if nearest_ptr is not None:
                    nearest = tl.load(nearest_ptr + row * count + slots, mask=valid, other=0)
                    token = tl.where(level >= 0, nearest, token)
                tl.debug_barrier()  # as above
                tl.store(levels_ptr + row * count + slots, level, mask=valid)
            tl.store(drafts_ptr + row * count + slots, token, mask=valid)
            tl.store(status_ptr + row * count + slots, status, mask=valid)


def refine(
    decided: Tensor,
    p: Tensor,
    accepted: Tensor,
    settled: Tensor,
    lengths: Tensor,
    forced: Tensor,
    initial: Tensor,
    drafts: Tensor,
    status: Tensor,
    levels: Tensor,
    q: Tensor,
    noisy: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ratios: Tensor | None,
    noise: Tensor | None,
    directions: Tensor | None,
    seeds: Tensor,
    fresh_level: int,
) -> None:
    """As `reference.refine`."""
    batch, window = decided.shape
    count, padded, ids = window - 1, initial.shape[1], q.shape[-1]
    _check_drafts(decided, p, accepted, settled, lengths, forced, initial, drafts, status, levels, q)
    if noisy is not None:
        _check_embeddings(noisy, table, mean, std, ratios, noise, directions, seeds, levels.shape, padded)
    if batch == 0 or count == 0:
        return
    nearest = None
    if noisy is not None:
        dim = noisy.shape[-1]
        long = count > DENOISE_SHORT["SLOTS"] and batch * dim <= DENOISE_LONG_UP_TO
        config = DENOISE_LONG if long else DENOISE_SHORT
        _denoise_kernel[(triton.cdiv(dim, config["COLUMNS"]), batch)](
            decided, accepted, lengths, forced, levels, noisy, table, mean, std, ratios, noise, seeds, window, padded,
            dim, GROUPS=triton.cdiv(count, config["SLOTS"]), **config,
        )  # fmt: skip
        if directions is not None:
            # A float32 product of this size belongs to the vendor's library; the scores are as large as q.
            nearest = torch.matmul(noisy, directions.T).argmax(-1)
    # Last: the denoising reads the levels as they were.
    _shift_kernel[(1 + count * triton.cdiv(ids, SHIFT["BLOCK"]), batch)](
        decided, p, accepted, settled, lengths, forced, initial, nearest, drafts, status,
        None if noisy is None else levels, q, window, padded, ids, fresh_level,
        GROUPS=triton.cdiv(count, SHIFT["SLOTS"]), **SHIFT,
    )  # fmt: skip


def _check_drafts(
    decided: Tensor,
    p: Tensor,
    accepted: Tensor,
    settled: Tensor,
    lengths: Tensor,
    forced: Tensor,
    initial: Tensor,
    drafts: Tensor,
    status: Tensor,
    levels: Tensor,
    q: Tensor,
) -> None:
    batch, window = decided.shape
    expect("decided", decided, torch.int64, batch, window)
    for name, counts in {"accepted": accepted, "settled": settled, "lengths": lengths}.items():
        expect(name, counts, torch.int32, batch)
    expect("forced", forced, torch.int64, initial.shape[1])
    expect("initial", initial, torch.int64, batch, initial.shape[1])
    expect("drafts", drafts, torch.int64, batch, window - 1)
    expect("status", status, torch.int32, batch, window - 1)
    expect("levels", levels, torch.int32, batch, window - 1)
    expect("q", q, torch.float32, batch, window - 1, q.shape[-1])
    if q.shape[-1]:
        expect("p", p, torch.float32, batch, window, q.shape[-1])
    if batch > MAX_BATCH:
        raise NotSupported(f"{batch} rows: the kernels take up to {MAX_BATCH}")


def _check_embeddings(
    noisy: Tensor,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ratios: Tensor | None,
    noise: Tensor | None,
    directions: Tensor | None,
    seeds: Tensor,
    drafts: torch.Size,
    padded: int,
) -> None:
    dim = noisy.shape[-1]
    if table is None or mean is None or std is None or ratios is None:
        raise NotSupported("noisy drafts need table, mean, std and ratios")
    expect("noisy", noisy, torch.float32, *drafts, dim)
    expect("table", table, FLOATS, table.shape[0], dim)
    expect("mean", mean, torch.float32, dim)
    expect("std", std, torch.float32, dim)
    expect("ratios", ratios, torch.float32, ratios.shape[0])
    expect("seeds", seeds, torch.int64, drafts[0])
    if noise is not None:
        expect("noise", noise, torch.float32, drafts[0], padded, dim)
    if directions is not None:
        expect("directions", directions, torch.float32, directions.shape[0], dim)
