"""Triton kernels on embeddings: the model inputs of a window, and noise at each position's level."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FLOATS, expect
from .philox import normals

# Few rows: short programs, so that one window fills the device. Many: long ones, so that starting them costs little.
EMBED_SMALL: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4}
EMBED_LARGE: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}
EMBED_LARGE_FROM = 1024  # rows

# ROWS: how many one program noises with the mean and deviation of its columns in registers.
# Without fused multiply-adds the arithmetic rounds as the reference's separate operations do.
PERTURB_SMALL: dict[str, Any] = {"ROWS": 1, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}
PERTURB_LARGE: dict[str, Any] = {"ROWS": 16, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}
PERTURB_LARGE_FROM = 8192  # rows


@triton.jit
def _embed_window_kernel(
    tokens_ptr,  # i64 [B, W]
    levels_ptr,  # i32 [B, W]
    table_ptr,  # [V+F, D]
    start_ptr,  # [B, D]
    noisy_ptr,  # f32 [B, W−1, D] or None
    mean_ptr,  # f32 [D] or None
    std_ptr,  # f32 [D] or None
    out_ptr,  # [B, W, D]
    window,
    dim,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    image, slot = row // window, row % window
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    token = tl.load(tokens_ptr + row)
    out = out_ptr + row.to(tl.int64) * dim + columns
    dirty = slot < 0
    if noisy_ptr is not None:
        dirty = (slot > 0) & (tl.load(levels_ptr + row) >= 0)
        if dirty:
            # Rows of noisy hold no slot 0.
            noisy = tl.load(noisy_ptr + (row - image - 1).to(tl.int64) * dim + columns, mask=inside)
            mean = tl.load(mean_ptr + columns, mask=inside)
            std = tl.load(std_ptr + columns, mask=inside)
            tl.store(out, tl.fma(noisy, std, mean).to(out_ptr.dtype.element_ty), mask=inside)
    if (slot == 0) & (token < 0):
        start = tl.load(start_ptr + image.to(tl.int64) * dim + columns, mask=inside)
        tl.store(out, start.to(out_ptr.dtype.element_ty), mask=inside)
    elif ~dirty:
        clean = tl.load(table_ptr + tl.maximum(token, 0) * dim + columns, mask=inside)
        tl.store(out, clean, mask=inside)


def embed_window(
    tokens: Tensor,
    levels: Tensor,
    table: Tensor,
    start: Tensor,
    noisy: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """As `reference.embed_window`."""
    batch, window = tokens.shape
    dim = table.shape[1]
    expect("tokens", tokens, torch.int64, batch, window)
    expect("levels", levels, torch.int32, batch, window)
    expect("table", table, FLOATS, table.shape[0], dim)
    expect("start", start, FLOATS, batch, dim)
    if noisy is None or mean is None or std is None:
        noisy = mean = std = None
    else:
        expect("noisy", noisy, torch.float32, batch, window - 1, dim)
        expect("mean", mean, torch.float32, dim)
        expect("std", std, torch.float32, dim)
    out = torch.empty((batch, window, dim), dtype=table.dtype, device=table.device)
    if out.numel():
        config = EMBED_SMALL if batch * window < EMBED_LARGE_FROM else EMBED_LARGE
        grid = (batch * window, triton.cdiv(dim, config["BLOCK"]))
        _embed_window_kernel[grid](tokens, levels, table, start, noisy, mean, std, out, window, dim, **config)
    return out


@triton.jit(do_not_specialize=["epoch"])
def _perturb_kernel(
    x_ptr,  # [B, L, D]
    levels_ptr,  # i32 [B, L]
    positions_ptr,  # i64 [B, L] of any strides
    seeds_ptr,  # i64 [B]
    mean_ptr,  # f32 [D]
    std_ptr,  # f32 [D]
    times_ptr,  # f32 [K]
    out_ptr,  # [B, L, D]
    rows,
    length,
    dim,
    position_row,
    position_step,
    epoch,
    DENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(dim, BLOCK)
    first, block = tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    lanes = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    mean = tl.load(mean_ptr + columns, mask=columns < dim)
    std = tl.load(std_ptr + columns, mask=columns < dim, other=1.0)
    for number in range(ROWS):
        row = first + number
        inside = (columns < dim) & (row < rows)
        here = row.to(tl.int64) * dim + columns
        level = tl.load(levels_ptr + row, mask=row < rows, other=-1)
        x = tl.load(x_ptr + here, mask=inside)
        if level >= 0:
            image, index = row // length, row % length
            position = tl.load(positions_ptr + image * position_row + index * position_step)
            time = tl.load(times_ptr + level)
            noise = normals(tl.load(seeds_ptr + image), position, epoch, lanes)
            clean = tl.div_rn(x.to(tl.float32) - mean, std)
            e = clean + time * (noise - clean)
            if DENORMALIZE:
                e = tl.fma(e, std, mean)
            tl.store(out_ptr + here, e.to(out_ptr.dtype.element_ty), mask=inside)
        elif DENORMALIZE:
            tl.store(out_ptr + here, x, mask=inside)
        else:
            tl.store(out_ptr + here, tl.div_rn(x.to(tl.float32) - mean, std), mask=inside)


def perturb(
    x: Tensor,
    levels: Tensor,
    positions: Tensor,
    seeds: Tensor,
    mean: Tensor,
    std: Tensor,
    times: Tensor,
    epoch: int,
    denormalize: bool,
) -> Tensor:
    """As `reference.perturb`."""
    batch, length, dim = x.shape
    expect("x", x, FLOATS, batch, length, dim)
    expect("levels", levels, torch.int32, batch, length)
    expect("positions", positions, torch.int64, batch, length, strided=True)
    expect("seeds", seeds, torch.int64, batch)
    expect("mean", mean, torch.float32, dim)
    expect("std", std, torch.float32, dim)
    expect("times", times, torch.float32, times.shape[0])
    out = torch.empty(x.shape, dtype=x.dtype if denormalize else torch.float32, device=x.device)
    if out.numel():
        rows = batch * length
        config: dict[str, Any] = PERTURB_SMALL if rows < PERTURB_LARGE_FROM else PERTURB_LARGE
        config = config | {"DENORMALIZE": denormalize}
        grid = (triton.cdiv(dim, config["BLOCK"]) * triton.cdiv(rows, config["ROWS"]),)
        _perturb_kernel[grid](
            x, levels, positions, seeds, mean, std, times, out, rows, length, dim, positions.stride(0),
            positions.stride(1), epoch, **config,
        )  # fmt: skip
    return out
