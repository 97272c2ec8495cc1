"""Triton kernels of the transformer's row-wise ops: `rms_norm` with the residual sum, and `swiglu`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import FLOATS, expect
from .dispatch import NotSupported

CELLS = 2048  # per program where rows are short: 16 for each thread of four warps
WIDEST = 32768  # columns that a program can hold in registers
SWIGLU_BLOCK = 256  # divides the usual widths; 512 contiguous bytes


@triton.jit(do_not_specialize=["count"])
def _rms_norm_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    residual_ptr,  # [N, D] or None
    out_ptr,  # [N, D]
    count,
    eps,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < DIM)[None, :]
    cell = row.to(tl.int64)[:, None] * DIM + column[None, :]
    x = tl.load(x_ptr + cell, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + cell, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + tl.cast(eps, tl.float32))
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + cell, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _swiglu_kernel(
    gate_up_ptr,  # [N, 2F]
    out_ptr,  # [N, F]
    count,
    HALF: tl.constexpr,  # F
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (HALF + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < HALF)[None, :]
    source = gate_up_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    target = out_ptr + row.to(tl.int64)[:, None] * HALF + column[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """As `reference.rms_norm`, in one pass over the memory."""
    dim = x.shape[-1]
    expect("x", x, FLOATS, *x.shape)
    expect("weight", weight, FLOATS, dim)
    if residual is not None:
        expect("residual", residual, FLOATS, *x.shape)
    if dim > WIDEST:
        raise NotSupported(f"rows have {dim} cells: expected at most {WIDEST}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = x.numel() // dim
    block: Any = triton.next_power_of_2(dim)
    rows = max(1, CELLS // block)
    config: dict[str, Any] = {"DIM": dim, "ROWS": rows, "BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}
    _rms_norm_kernel[(triton.cdiv(count, rows),)](x, weight, residual, out, count, eps, **config)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`."""
    half = gate_up.shape[-1] // 2
    expect("gate_up", gate_up, FLOATS, *gate_up.shape[:-1], 2 * half)
    out = torch.empty((*gate_up.shape[:-1], half), dtype=gate_up.dtype, device=gate_up.device)
    count = out.numel() // half
    block: Any = min(triton.next_power_of_2(half), SWIGLU_BLOCK)
    config: dict[str, Any] = {"HALF": half, "ROWS": CELLS // block, "BLOCK": block, "num_warps": 4}
    grid = (triton.cdiv(count, config["ROWS"]) * triton.cdiv(half, block),)
    _swiglu_kernel[grid](gate_up, out, count, **config)
    return out
