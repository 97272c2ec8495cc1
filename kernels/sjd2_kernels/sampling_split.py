"""Rows of logits too long for one program: each launch shares them among many, three in a row sample them.

`_chunk_kernel` finds what the chunks of a row hold, `_row_kernel` what the row holds and where truncation cuts it,
`_draw_kernel` draws. Truncation reads a row about thirty times; the other two stages read it once each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logits import draw, guided, is_bad, key_of, row_of, tempered
from .order import (
    INF,
    KEY_OF_MINUS_INF,
    KEY_OF_ONE,
    LOWEST,
    halve,
    id_of,
    middle_of,
    ordered,
    packed,
    unordered,
    value_of,
)

CHUNK: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}
ROW: dict[str, Any] = {"BLOCK": 8192, "num_warps": 32}


@triton.jit(do_not_specialize=["rows", "begin", "end"])
def _chunk_kernel(
    logits_ptr,  # [B, W, V] or [2, B, W, V]
    best_ptr,  # i64 [B·W, chunks]: `packed` maxima
    mass_ptr,  # f32 [B·W, chunks]: Σ exp(x − maximum), or None
    rows,
    vocab,
    begin,
    end,
    guidance,
    temperature,
    BLOCK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    x = guided(row_of(logits_ptr, row, rows, vocab, begin, end), guidance, ids)
    best = tl.max(packed(x, ids), 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + at, best)
    if mass_ptr is not None:
        peak = value_of(best)
        mass = tl.sum(tl.exp(tempered(x, temperature) - tempered(peak, temperature)), 0)
        tl.store(mass_ptr + at, tl.where(peak == -INF, 0.0, mass))


@triton.jit
def _count_reaching(source, guidance, temperature, value, BLOCK: tl.constexpr):
    """How many logits of a row are at least `value`."""
    total = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < source[2]:
        x = tempered(guided(source, guidance, start + tl.arange(0, BLOCK)), temperature)
        total += (x >= value).to(tl.int32)
        start += BLOCK
    return tl.sum(total, 0)


@triton.jit
def _mass_above(source, guidance, temperature, peak, floor, value, BLOCK: tl.constexpr):
    """Sum of the weights exp(x − peak) above `value`, over the logits of a row that are at least `floor`."""
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < source[2]:
        x = tempered(guided(source, guidance, start + tl.arange(0, BLOCK)), temperature)
        e = tl.exp(x - peak)
        total += tl.where((x < floor) | (e <= value), 0.0, e)
        start += BLOCK
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows", "begin", "end", "top_k"])
def _row_kernel(
    logits_ptr,  # [B, W, V] or [2, B, W, V]
    best_ptr,  # i64 [B·W, chunks]
    mass_ptr,  # f32 [B·W, chunks] or None
    tokens_ptr,  # i64 [B, W]
    bad_ptr,  # i8 [B, W]
    cut_ptr,  # f32 [B·W, 4]: as `logits.draw` has it
    draw_ptr,  # i64 [B·W, 2]: largest `packed` draw so far, programs that have drawn
    rows,
    vocab,
    chunks,
    begin,
    end,
    guidance,
    temperature,
    top_k,
    top_p,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    chunk_best = tl.load(best_ptr + row * chunks + chunk, mask=chunk < chunks, other=LOWEST)
    best = tl.max(chunk_best, 0)
    peak = value_of(best)
    tl.store(bad_ptr + row, is_bad(peak))
    tl.store(tokens_ptr + row, tl.where(peak == -INF, 0, id_of(best)))
    if mass_ptr is not None:
        source = row_of(logits_ptr, row, rows, vocab, begin, end)
        peak = tempered(peak, temperature)
        floor, least = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
        if top_k is not None:
            low, high = tl.cast(KEY_OF_MINUS_INF, tl.int64), ordered(peak).to(tl.int64) + 1
            while high - low > 1:
                count = _count_reaching(source, guidance, temperature, middle_of(low, high), BLOCK)
                low, high = halve(low, high, count >= top_k)
                high = tl.where(count == top_k, low + 1, high)
            floor = unordered(low.to(tl.int32))
        if top_p is not None:
            mass = _mass_above(source, guidance, temperature, peak, floor, 0.0, BLOCK) * tl.cast(top_p, tl.float32)
            low, high = tl.cast(0, tl.int64), tl.cast(KEY_OF_ONE, tl.int64)
            while high - low > 1:
                above = _mass_above(source, guidance, temperature, peak, floor, middle_of(low, high), BLOCK)
                low, high = halve(low, high, above >= mass)
            least = unordered(high.to(tl.int32))
        if (top_k is not None) or (top_p is not None):
            below = unordered(ordered(least) - 1)
            total = _mass_above(source, guidance, temperature, peak, floor, below, BLOCK)
        else:
            chunk_peak = tempered(value_of(chunk_best), temperature)
            part = tl.load(mass_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
            total = tl.sum(tl.where(part == 0.0, 0.0, part * tl.exp(chunk_peak - peak)), 0)
        tl.store(cut_ptr + row * 4, peak)
        tl.store(cut_ptr + row * 4 + 1, floor)
        tl.store(cut_ptr + row * 4 + 2, least)
        tl.store(cut_ptr + row * 4 + 3, 1.0 / total)
        tl.store(draw_ptr + row * 2, tl.cast(LOWEST, tl.int64))
        tl.store(draw_ptr + row * 2 + 1, tl.cast(0, tl.int64))


@triton.jit(do_not_specialize=["rows", "window", "padded", "begin", "end"])
def _draw_kernel(
    logits_ptr,  # [B, W, V] or [2, B, W, V]
    seeds_ptr,  # i64 [B]
    lengths_ptr,  # i32 [B]
    steps_ptr,  # i32 [B]
    noise_ptr,  # f32 [B, P, V] or None
    tokens_ptr,  # i64 [B, W]
    p_ptr,  # f32 [B, W, V] or None
    cut_ptr,  # f32 [B·W, 4]
    draw_ptr,  # i64 [B·W, 2]
    rows,
    window,
    padded,
    vocab,
    begin,
    end,
    guidance,
    temperature,
    GREEDY: tl.constexpr,
    PER_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    if p_ptr is not None:
        p_ptr += row.to(tl.int64) * vocab
    if GREEDY:
        ids = first + tl.arange(0, BLOCK)
        tl.store(p_ptr + ids, tl.where(ids == tl.load(tokens_ptr + row), 1.0, 0.0), mask=ids < vocab)
    else:
        peak, floor = tl.load(cut_ptr + row * 4), tl.load(cut_ptr + row * 4 + 1)
        least, scale = tl.load(cut_ptr + row * 4 + 2), tl.load(cut_ptr + row * 4 + 3)
        source = row_of(logits_ptr, row, rows, vocab, begin, end)
        cut = peak, floor, least, scale
        key = key_of(seeds_ptr, lengths_ptr, steps_ptr, row, window, padded, vocab, PER_POSITION)
        best = tl.max(draw(source, guidance, temperature, cut, key, noise_ptr, p_ptr, first, BLOCK), 0)
        tl.atomic_max(draw_ptr + row * 2, best)
        # The last program of the row sees the draws of all others.
        if tl.atomic_add(draw_ptr + row * 2 + 1, 1) == tl.num_programs(1) - 1:
            best = tl.atomic_max(draw_ptr + row * 2, LOWEST)
            tl.store(tokens_ptr + row, tl.where(peak == -INF, 0, id_of(best)))


def launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor | None, Tensor],
    legal: tuple[int, int],
    numbers: tuple[float | None, float | None, int | None, float | None],
    switches: dict[str, Any],
) -> None:
    """Fill tokens, p and bad as `sampling._sample_kernel` does, from the same arguments."""
    logits, _, _, _, noise = inputs
    tokens, p, bad = outputs
    batch, window, vocab = logits.shape[-3:]
    rows, device = batch * window, logits.device
    chunks: Any = triton.cdiv(vocab, CHUNK["BLOCK"])
    best = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    mass = cut = drawn = None
    if not switches["GREEDY"]:
        mass = torch.empty((rows, chunks), dtype=torch.float32, device=device)
        cut = torch.empty((rows, 4), dtype=torch.float32, device=device)
        drawn = torch.empty((rows, 2), dtype=torch.int64, device=device)
    scale = numbers[:2]  # guidance, temperature
    _chunk_kernel[(rows, chunks)](logits, best, mass, rows, vocab, *legal, *scale, **CHUNK)
    _row_kernel[(rows,)](
        logits, best, mass, tokens, bad, cut, drawn, rows, vocab, chunks, *legal, *numbers,
        **ROW, **{"CHUNKS": triton.next_power_of_2(chunks)},
    )  # fmt: skip
    if drawn is not None or p is not None:
        padded = 0 if noise is None else noise.shape[1]
        sizes = rows, window, padded, vocab, *legal
        _draw_kernel[(rows, chunks)](*inputs, tokens, p, cut, drawn, *sizes, *scale, **switches, **CHUNK)
