"""Triton kernels that draw a token for every slot: guidance, mask, temperature, truncation, softmax, Gumbel argmax.

Up to `ONE_BLOCK` legal ids, one program keeps the row of a slot in its registers, and the logits are read once;
above, `sampling_split` shares a row among many programs. Which path and which block sizes run depends on the
legal ids alone, so that a row's sums, hence its nucleus, do not change with the batch or the window.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sampling_split
from .contracts import FLOATS, expect
from .dispatch import NotSupported
from .logits import draw, guided, is_bad, key_of, row_of, tempered
from .order import (
    INF,
    KEY_OF_MINUS_INF,
    KEY_OF_ONE,
    LOWEST,
    MAX_IDS,
    halve,
    id_of,
    middle_of,
    ordered,
    packed,
    unordered,
    value_of,
)

ONE_BLOCK = 32768  # legal ids that fit the registers of one program
WARPS = {512: 4, 1024: 4, 2048: 4, 4096: 8, 8192: 16, 16384: 16, 32768: 16}  # by block size
REGISTERS = 128  # per thread: all that 16 warps can have; left alone, the compiler spills a few to fit more programs
ALIGNMENT = 16  # ids: blocks start at multiples of it, for vector accesses and groups of four draws


@triton.jit
def _fill(p_ptr, start, stop, token, hit, rest, BLOCK: tl.constexpr):
    """`hit` at `token` and `rest` elsewhere in p[start:stop]."""
    at = tl.cast(start, tl.int32)
    while at < stop:
        ids = at + tl.arange(0, BLOCK)
        tl.store(p_ptr + ids, tl.where(ids == token, hit, rest), mask=ids < stop)
        at += BLOCK


@triton.jit
def _top_k_threshold(x, top_k, peak):
    """A float that the k largest of a block reach, with what ties with the last of them, and no others.

    `low` is reached by at least k of them, `high` by fewer; k exactly will do.
    """
    low = tl.cast(KEY_OF_MINUS_INF, tl.int64)
    high = ordered(peak).to(tl.int64) + 1
    while high - low > 1:
        count = tl.sum((x >= middle_of(low, high)).to(tl.int32), 0)
        low, high = halve(low, high, count >= top_k)
        high = tl.where(count == top_k, low + 1, high)
    return unordered(low.to(tl.int32))


@triton.jit
def _top_p_threshold(e, mass):
    """The smallest weight in a block with less than `mass` above it; e = exp(x − largest x), so at most 1.

    Above `low` lies at least that mass, above `high` less. By weights instead of logits: two logits whose weights
    are equal count as equal, and the logits need not stay in registers.
    """
    low, high = tl.cast(0, tl.int64), tl.cast(KEY_OF_ONE, tl.int64)
    while high - low > 1:
        above = tl.sum(tl.where(e > middle_of(low, high), e, 0.0), 0)
        low, high = halve(low, high, above >= mass)
    return unordered(high.to(tl.int32))


@triton.jit(do_not_specialize=["rows", "window", "padded", "begin", "end", "top_k"])
def _sample_kernel(
    logits_ptr,  # [B, W, V] or [2, B, W, V]
    seeds_ptr,  # i64 [B]
    lengths_ptr,  # i32 [B]
    steps_ptr,  # i32 [B]
    noise_ptr,  # f32 [B, P, V] or None
    tokens_ptr,  # i64 [B, W]
    p_ptr,  # f32 [B, W, V] or None
    bad_ptr,  # i8 [B, W]
    rows,
    window,
    padded,
    vocab,
    first,
    begin,
    end,
    guidance,
    temperature,
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    PER_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
):
    row = tl.program_id(0)
    ids = first + tl.arange(0, BLOCK)
    source = row_of(logits_ptr, row, rows, vocab, begin, end)
    x = guided(source, guidance, ids)
    if p_ptr is not None:
        p_ptr += row.to(tl.int64) * vocab
    if GREEDY:
        best = tl.max(packed(x, ids), 0)
        peak = value_of(best)
    else:
        peak = unordered(tl.max(ordered(x), 0))
    tl.store(bad_ptr + row, is_bad(peak))
    empty = peak == -INF
    if not GREEDY:
        x, peak = tempered(x, temperature), tempered(peak, temperature)
        floor, least = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
        if top_k is not None:
            floor = _top_k_threshold(x, top_k, peak)
        e = tl.where(x < floor, 0.0, tl.exp(x - peak))
        if top_p is not None:
            least = _top_p_threshold(e, tl.sum(e, 0) * tl.cast(top_p, tl.float32))
            e = tl.where(e < least, 0.0, e)
        scale = 1.0 / tl.sum(e, 0)
        cut = peak, floor, least, scale
        key = key_of(seeds_ptr, lengths_ptr, steps_ptr, row, window, padded, vocab, PER_POSITION)
        # The noise takes many registers: the row is read again (it is in the cache), a part at a time.
        drawn = tl.full([TURN], LOWEST, tl.int64)
        at = tl.cast(first, tl.int32)
        while at < end:
            part = draw(source, guidance, temperature, cut, key, noise_ptr, p_ptr, at, TURN)
            drawn = tl.maximum(drawn, part)
            at += TURN
        best = tl.max(drawn, 0)
        if p_ptr is not None:
            rest = 0.0 * scale  # NaN in a bad row
            _fill(p_ptr, 0, first, -1, rest, rest, TURN)
            _fill(p_ptr, at, vocab, -1, rest, rest, TURN)
    token = tl.where(empty, 0, id_of(best))
    tl.store(tokens_ptr + row, token)
    if GREEDY and p_ptr is not None:
        _fill(p_ptr, 0, vocab, token, 1.0, 0.0, TURN)


def sample_window(
    logits: Tensor,
    seeds: Tensor,
    lengths: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    legal_begin: int,
    legal_end: int,
    per_position: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sample_window`; of equal largest values the first id is drawn, as by torch.argmax."""
    *sets, batch, window, vocab = logits.shape
    _check(logits, seeds, lengths, steps, noise, top_p)
    device = logits.device
    tokens = torch.empty((batch, window), dtype=torch.int64, device=device)
    p = torch.empty((batch, window, vocab if need_p else 0), dtype=torch.float32, device=device)
    bad = torch.empty((batch, window), dtype=torch.int8, device=device)
    if batch * window:
        begin, end = max(legal_begin, 0), min(legal_end, vocab)
        first = begin // ALIGNMENT * ALIGNMENT
        inputs = logits, seeds, lengths, steps, noise if per_position else None
        outputs = tokens, p if need_p else None, bad
        numbers = (
            guidance if sets else None,
            None if temperature in (0.0, 1.0) else temperature,
            top_k if 0 < top_k < vocab else None,
            top_p if top_p < 1.0 else None,
        )
        switches: dict[str, Any] = {"GREEDY": temperature == 0.0, "PER_POSITION": per_position}
        if end - first > ONE_BLOCK:
            sampling_split.launch(inputs, outputs, (begin, end), numbers, switches)
        else:
            block: Any = max(triton.next_power_of_2(end - first), min(WARPS))
            warps = WARPS[block]
            config: dict[str, Any] = {
                "BLOCK": block, "TURN": min(block, 256 * warps), "num_warps": warps, "maxnreg": REGISTERS,
            }  # fmt: skip
            padded = 0 if inputs[-1] is None else inputs[-1].shape[1]
            sizes = batch * window, window, padded, vocab, first, begin, end
            _sample_kernel[(batch * window,)](*inputs, *outputs, *sizes, *numbers, **switches, **config)
    return tokens, p, bad.view(torch.bool)


def _check(logits: Tensor, seeds: Tensor, lengths: Tensor, steps: Tensor, noise: Tensor | None, top_p: float) -> None:
    batch, window, vocab = logits.shape[-3:]
    expect("logits", logits, FLOATS, *logits.shape[:-3], batch, window, vocab)
    expect("seeds", seeds, torch.int64, batch)
    expect("lengths", lengths, torch.int32, batch)
    expect("steps", steps, torch.int32, batch)
    if noise is not None:
        expect("noise", noise, torch.float32, batch, noise.shape[1], vocab)
    if (logits.dim() == 4 and logits.shape[0] != 2) or not 3 <= logits.dim() <= 4:
        raise NotSupported(f"logits have shape {tuple(logits.shape)}: expected [B, W, V] or [2, B, W, V]")
    if not 0 < vocab < MAX_IDS:
        raise NotSupported(f"{vocab} ids: expected 1 to {MAX_IDS - 1}")
    if top_p <= 0.0:
        raise NotSupported(f"top_p={top_p}: expected more than 0")
