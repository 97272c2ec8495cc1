"""Triton kernels that decide the drafts of a window (verify) and move every counter by what they decided (commit).

`_replace_kernel` draws from the residual where a draft may need it, each row of p and q shared among programs;
`_scan_kernel` walks the window. Both judge the drafts for themselves, which is cheaper than a third launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .contracts import expect
from .dispatch import NotSupported
from .order import LOWEST, MAX_IDS, id_of, packed
from .philox import ACCEPT, RESIDUAL, gumbels, words

BLOCK = 1024  # ids per turn of a program
PARTS_OF_ONE = 64  # most programs for the residual of a row, where one draft needs it,
PARTS_OF_EACH = 16  # and of a draft, where each may
MAX_WINDOW = 1024

_MATCH = tl.constexpr(reference.MATCH)
_COUPLED = tl.constexpr(reference.COUPLED)
_PAPER = tl.constexpr(reference.PAPER)
_TRACKED = tl.constexpr(reference.TRACKED)
_SETTLED = tl.constexpr(reference.SETTLED)
_KEEP_RATIO = tl.constexpr(reference.KEEP_RATIO)
_EXCESS = tl.constexpr(2**62)  # lifts `packed` values of ids that p has more of than q above all others


@triton.jit
def _judge(
    p_ptr, drafts_ptr, q_ptr, status_ptr, levels_ptr, forced_ptr, lengths_ptr, steps_ptr, seeds_ptr,
    image, slots, window, vocab,
):  # fmt: skip
    """Every draft by itself, for a block of slots or one: open, clean, settled, tested, kept, likely, draft."""
    inside = slots < window - 1
    position = tl.load(lengths_ptr + image) + slots
    row = image * (window - 1) + slots
    draft = tl.load(drafts_ptr + row, mask=inside, other=0)
    status = tl.load(status_ptr + row, mask=inside, other=0)
    clean = tl.load(levels_ptr + row, mask=inside, other=0) < 0
    is_open = tl.load(forced_ptr + position, mask=inside, other=0) < 0
    x = tl.minimum(draft, vocab - 1)
    p_x = tl.load(p_ptr + (row + image).to(tl.int64) * vocab + x, mask=inside, other=0.0)
    q_x = tl.load(q_ptr + row.to(tl.int64) * vocab + x, mask=inside, other=0.0)
    seed, iteration = tl.load(seeds_ptr + image), tl.load(steps_ptr + image) + 1
    bits, _, _, _ = words(seed, position, iteration, ACCEPT, slots * 0)  # pyright: ignore[reportGeneralTypeIssues]
    tested = is_open & (status == _TRACKED)
    kept = tested & (tl.uint_to_uniform_float(bits) * q_x < p_x)
    return is_open, clean, status == _SETTLED, tested, kept, p_x >= _KEEP_RATIO * q_x, draft


@triton.jit
def _leading(passed, slots, window):
    """Length of the leading run of drafts that passed."""
    return tl.min(tl.where((slots < window - 1) & ~passed, slots, window - 1), 0)


@triton.jit
def _first_rejection(judged, slots, window, RULE: tl.constexpr):
    """RATIO and PAPER: the drafts that pass before the first that does not, and where a residual may be drawn."""
    is_open, clean, settled, testable, kept, _likely, _draft = judged
    if RULE != _PAPER:
        testable = testable & clean
    passed = ~is_open | settled | (kept & testable)
    return _leading(passed, slots, window), testable


@triton.jit(do_not_specialize=["window", "span"])
def _replace_kernel(
    p_ptr,  # f32 [B, W, V]
    drafts_ptr,  # i64 [B, W−1]
    q_ptr,  # f32 [B, W−1, V]
    status_ptr,  # i32 [B, W−1]
    levels_ptr,  # i32 [B, W−1]
    forced_ptr,  # i64 [P]
    lengths_ptr,  # i32 [B]
    steps_ptr,  # i32 [B]
    seeds_ptr,  # i64 [B]
    best_ptr,  # i64 [B, W−1 or 1, parts]: the best residual draw of each part
    window,
    vocab,
    span,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    image, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (image * tl.num_programs(1) + slot) * tl.num_programs(2) + part
    slots = slot
    if RULE != _COUPLED:
        slots = tl.arange(0, SLOTS)
    judged = _judge(
        p_ptr, drafts_ptr, q_ptr, status_ptr, levels_ptr, forced_ptr, lengths_ptr, steps_ptr, seeds_ptr,
        image, slots, window, vocab,
    )  # fmt: skip
    if RULE == _COUPLED:
        needed = judged[3] & ~judged[4]
    else:
        slot, testable = _first_rejection(judged, slots, window, RULE)
        needed = tl.max((testable & (slots == slot)).to(tl.int32), 0) > 0
    best = tl.full([BLOCK], LOWEST, tl.int64)
    if needed:
        seed, position = tl.load(seeds_ptr + image), tl.load(lengths_ptr + image) + slot
        iteration = tl.load(steps_ptr + image) + 1
        p_row_ptr = p_ptr + (image * window + slot).to(tl.int64) * vocab
        q_row_ptr = q_ptr + (image * (window - 1) + slot).to(tl.int64) * vocab
        start = part * span * BLOCK
        end = tl.minimum(start + span * BLOCK, vocab)
        while start < end:
            ids = start + tl.arange(0, BLOCK)
            p = tl.load(p_row_ptr + ids, mask=ids < vocab, other=0.0)
            excess = p - tl.load(q_row_ptr + ids, mask=ids < vocab, other=0.0)
            noise = gumbels(seed, position, iteration, RESIDUAL, start // 4 + tl.arange(0, BLOCK // 4))
            # Where p has no excess anywhere, the draw is from p: no id is lifted, and the best of p wins.
            drawn = packed(tl.log(tl.where(excess > 0.0, excess, p)) + noise, ids)
            drawn = tl.where(excess > 0.0, drawn + _EXCESS, drawn)
            best = tl.maximum(best, tl.where(ids < vocab, drawn, LOWEST))
            start += BLOCK
    tl.store(best_ptr + at, tl.max(best, 0))


@triton.jit(do_not_specialize=["window", "total", "parts"])
def _scan_kernel(
    tokens_ptr,  # i64 [B, W]
    p_ptr,  # f32 [B, W, V], or any for MATCH
    bad_ptr,  # i8 [B, W]
    drafts_ptr,  # i64 [B, W−1]
    q_ptr,  # f32 [B, W−1, V], or any for MATCH
    status_ptr,  # i32 [B, W−1]
    levels_ptr,  # i32 [B, W−1]
    forced_ptr,  # i64 [P]
    lengths_ptr,  # i32 [B]
    steps_ptr,  # i32 [B]
    done_ptr,  # i32 [B]
    seeds_ptr,  # i64 [B]
    best_ptr,  # i64 [B, W−1 or 1, parts], or None for MATCH
    decided_ptr,  # i64 [B, W]
    accepted_ptr,  # i32 [B]
    settled_ptr,  # i32 [B]
    fault_ptr,  # i32 [B]
    window,
    vocab,
    total,
    parts,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    image = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    inside, drafted = slots < window, slots < window - 1
    length = tl.load(lengths_ptr + image)
    known = tl.load(forced_ptr + length + slots, mask=inside, other=0)
    token = tl.load(tokens_ptr + image * window + slots, mask=inside, other=0)
    decided = tl.where(known < 0, token, known)
    if RULE == _MATCH:
        row = image * (window - 1) + slots
        clean = tl.load(levels_ptr + row, mask=drafted, other=0) < 0
        draft = tl.load(drafts_ptr + row, mask=drafted, other=0)
        run = _leading((draft == decided) & clean, slots, window)
    else:
        judged = _judge(
            p_ptr, drafts_ptr, q_ptr, status_ptr, levels_ptr, forced_ptr, lengths_ptr, steps_ptr, seeds_ptr,
            image, slots, window, vocab,
        )  # fmt: skip
        is_open, clean, _settled, tested, kept, likely, draft = judged
        part = tl.arange(0, PARTS)
        if RULE == _COUPLED:
            run = _leading(~is_open | (kept & clean), slots, window)
            at = best_ptr + (image * (window - 1) + slots[:, None]) * parts + part[None, :]
            best = tl.load(at, mask=drafted[:, None] & (part < parts)[None, :], other=LOWEST)
            drawn = tl.where(tested, id_of(tl.max(best, 1)), decided)
            drawn = tl.where(kept, draft, drawn)
        else:
            run, testable = _first_rejection(judged, slots, window, RULE)
            best = tl.load(best_ptr + image * parts + part, mask=part < parts, other=LOWEST)
            stays = slots < run
            if RULE == _PAPER:
                stays = stays | (tested & clean & (slots > run) & likely)
            drawn = tl.where((slots == run) & testable, id_of(tl.max(best, 0)), decided)
            drawn = tl.where(stays, draft, drawn)
        decided = tl.where(drafted, drawn, decided)
    idle = tl.load(done_ptr + image) != 0
    bad = tl.load(bad_ptr + image * window + slots, mask=inside, other=0) != 0
    first_bad = tl.min(tl.where(inside & bad & (known < 0), slots, window), 0)
    failing = (first_bad < window) & ~idle
    settled = tl.where(failing | idle, 0, tl.minimum(run + 1, total - length))
    accepted = settled
    if RULE == _PAPER:
        # Keys and values of noisy inputs are wrong: what lies behind the first of them waits for a clean pass.
        accepted = tl.minimum(settled, _leading(clean | (slots >= run), slots, window) + 1)
    tl.store(decided_ptr + image * window + slots, decided, mask=inside)
    tl.store(accepted_ptr + image, accepted)
    tl.store(settled_ptr + image, settled)
    tl.store(fault_ptr + image, tl.where(failing, length + first_bad, -1))


def _expect_i32(shape: tuple[int, ...], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        expect(name, tensor, torch.int32, *shape)


def verify(
    tokens: Tensor,
    p: Tensor,
    bad: Tensor,
    drafts: Tensor,
    q: Tensor,
    status: Tensor,
    levels: Tensor,
    forced: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    seeds: Tensor,
    total: int,
    rule: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.verify`."""
    batch, window = tokens.shape
    vocab, match = p.shape[-1], rule == reference.MATCH
    expect("tokens", tokens, torch.int64, batch, window)
    expect("bad", bad, torch.bool, batch, window)
    expect("forced", forced, torch.int64, *forced.shape)
    expect("seeds", seeds, torch.int64, batch)
    _expect_i32((batch,), lengths=lengths, steps=steps, done=done)
    _expect_i32((batch, window - 1), status=status, levels=levels)
    expect("drafts", drafts, torch.int64, batch, window - 1)
    if not match:
        expect("p", p, torch.float32, batch, window, vocab)
        expect("q", q, torch.float32, batch, window - 1, vocab)
    if window > MAX_WINDOW or vocab >= MAX_IDS or not (match or vocab):
        raise NotSupported(f"{window} slots of {vocab} ids: expected up to {MAX_WINDOW} of 1 to {MAX_IDS - 1}")
    device = tokens.device
    decided = torch.empty((batch, window), dtype=torch.int64, device=device)
    accepted, settled, fault = (torch.empty((batch,), dtype=torch.int32, device=device) for _ in range(3))
    if batch == 0:
        return decided, accepted, settled, fault
    slots: Any = max(triton.next_power_of_2(window), 16)
    judge: dict[str, Any] = {"RULE": rule, "SLOTS": slots}
    replace: dict[str, Any] = judge | {"BLOCK": BLOCK, "num_warps": 4}
    best, parts = None, 1
    if not match:
        blocks: Any = triton.cdiv(vocab, BLOCK)
        span: Any = triton.cdiv(blocks, PARTS_OF_EACH if rule == reference.COUPLED else PARTS_OF_ONE)
        parts: Any = triton.cdiv(blocks, span)
        candidates = window - 1 if rule == reference.COUPLED else 1
        best = torch.empty((batch, candidates, parts), dtype=torch.int64, device=device)
        if window > 1:
            _replace_kernel[(batch, candidates, parts)](
                p, drafts, q, status, levels, forced, lengths, steps, seeds, best, window, vocab, span, **replace,
            )  # fmt: skip
    scan: dict[str, Any] = judge | {"PARTS": triton.next_power_of_2(parts), "num_warps": max(slots // 32, 4)}
    _scan_kernel[(batch,)](
        tokens, p, bad.view(torch.int8), drafts, q, status, levels, forced, lengths, steps, done, seeds, best,
        decided, accepted, settled, fault, window, vocab, total, parts, **scan,
    )  # fmt: skip
    return decided, accepted, settled, fault


@triton.jit(do_not_specialize=["batch", "window", "padded", "total", "rows"])
def _commit_kernel(
    decided_ptr,  # i64 [B, W]
    accepted_ptr,  # i32 [B]
    fault_ptr,  # i32 [B]
    tokens_ptr,  # i64 [B, P]
    lengths_ptr,  # i32 [B]
    steps_ptr,  # i32 [B]
    done_ptr,  # i32 [B]
    failed_ptr,  # i32 [B]
    failed_step_ptr,  # i32 [B]
    histogram_ptr,  # i64 [B, W+1]
    kv_lengths_ptr,  # i32 [R·B]
    batch,
    window,
    padded,
    total,
    rows,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One warp: no lane may move a counter before all have read it.
    image = tl.program_id(0)
    accepted, fault = tl.load(accepted_ptr + image), tl.load(fault_ptr + image)
    length, step, done = tl.load(lengths_ptr + image), tl.load(steps_ptr + image), tl.load(done_ptr + image)
    slots = tl.arange(0, SLOTS)
    entering = slots < accepted
    token = tl.load(decided_ptr + image * window + slots, mask=entering, other=0)
    tl.store(tokens_ptr + image.to(tl.int64) * padded + length + slots, token, mask=entering)
    live = (done == 0).to(tl.int32)
    cell = histogram_ptr + image * (window + 1) + accepted
    tl.store(cell, tl.load(cell) + live)
    failing = fault >= 0
    tl.store(failed_ptr + image, fault, mask=failing)
    tl.store(failed_step_ptr + image, step, mask=failing)
    tl.store(lengths_ptr + image, length + accepted)
    tl.store(steps_ptr + image, step + live)
    tl.store(done_ptr + image, done | (failing | (length + accepted >= total)).to(tl.int32))
    row = tl.arange(0, ROWS)
    kv = kv_lengths_ptr + row * batch + image
    tl.store(kv, tl.load(kv, mask=row < rows, other=0) + accepted, mask=row < rows)


def commit(
    decided: Tensor,
    accepted: Tensor,
    fault: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    failed: Tensor,
    failed_step: Tensor,
    histogram: Tensor,
    kv_lengths: Tensor,
    total: int,
) -> None:
    """As `reference.commit`."""
    batch, window = decided.shape
    expect("decided", decided, torch.int64, batch, window)
    expect("tokens", tokens, torch.int64, batch, tokens.shape[1])
    _expect_i32((batch,), accepted=accepted, fault=fault, lengths=lengths, steps=steps, done=done)
    _expect_i32((batch,), failed=failed, failed_step=failed_step)
    expect("histogram", histogram, torch.int64, batch, window + 1)
    expect("kv_lengths", kv_lengths, torch.int32, *kv_lengths.shape)
    if batch == 0:
        return
    rows = kv_lengths.numel() // batch
    config: dict[str, Any] = {
        "SLOTS": triton.next_power_of_2(window), "ROWS": triton.next_power_of_2(max(rows, 1)), "num_warps": 1,
    }  # fmt: skip
    _commit_kernel[(batch,)](
        decided, accepted, fault, tokens, lengths, steps, done, failed, failed_step, histogram, kv_lengths,
        batch, window, tokens.shape[1], total, rows, **config,
    )  # fmt: skip
