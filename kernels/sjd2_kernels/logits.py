"""One row of logits inside a Triton kernel: guidance, legal ids, temperature, and the noise it is drawn with.

A scalar that is None switches its stage off when the kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import INF, packed
from .philox import SAMPLE, gumbels


@triton.jit
def row_of(logits_ptr, row, rows, vocab, begin, end):
    """All that reading one row takes; cond at its start, uncond `rows` rows behind."""
    cond_ptr = logits_ptr + row.to(tl.int64) * vocab
    return cond_ptr, cond_ptr + tl.cast(rows, tl.int64) * vocab, vocab, begin, end


@triton.jit
def guided(source, guidance, ids):
    """Guided f32 logits of `ids`, −inf outside of [begin, end); −inf in either set stays −inf."""
    cond_ptr, uncond_ptr, vocab, begin, end = source
    x = tl.load(cond_ptr + ids, mask=ids < vocab, other=0.0).to(tl.float32)
    if guidance is not None:
        uncond = tl.load(uncond_ptr + ids, mask=ids < vocab, other=0.0).to(tl.float32)
        masked = tl.minimum(x, uncond, propagate_nan=tl.PropagateNan.ALL) == -INF
        x = tl.where(masked, -INF, tl.fma(x - uncond, tl.cast(guidance, tl.float32), uncond))
    return tl.where((ids >= begin) & (ids < end), x, -INF)


@triton.jit
def tempered(x, temperature):
    """x / temperature, rounded as IEEE has it: equal logits stay equal, others keep their order."""
    if temperature is not None:
        x = tl.div_rn(x, tl.cast(temperature, tl.float32))
    return x


@triton.jit
def is_bad(peak):
    """i8: whether the largest logit of a row says that something went wrong before it."""
    return ((peak != peak) | (tl.abs(peak) == INF)).to(tl.int8)


@triton.jit
def key_of(seeds_ptr, lengths_ptr, steps_ptr, row, window, padded, vocab, PER_POSITION: tl.constexpr):
    """What the noise of a row is drawn from: where it starts in a table [B, P, V], and the Philox key."""
    image = row // window
    position = tl.load(lengths_ptr + image) + row % window
    iteration = 0
    if not PER_POSITION:
        iteration = tl.load(steps_ptr + image) + 1
    start = (image.to(tl.int64) * padded + position) * vocab
    return start, tl.load(seeds_ptr + image), position, iteration


@triton.jit
def draw(source, guidance, temperature, cut, key, noise_ptr, p_ptr, first, BLOCK: tl.constexpr):
    """`packed` logits plus noise of ids first … first + BLOCK − 1; `first` is a multiple of 4.

    cut: the largest logit of the row, the smallest logit and the smallest exp(logit − largest) that are kept, and
    1 / Σ exp(logit − largest) over those. Writes p to the row at `p_ptr`, unless that is None.
    """
    peak, floor, least, scale = cut
    start, seed, position, iteration = key
    ids = first + tl.arange(0, BLOCK)
    x = tempered(guided(source, guidance, ids), temperature)
    e = tl.exp(x - peak)
    out = (x < floor) | (e < least)
    if p_ptr is not None:
        tl.store(p_ptr + ids, tl.where(out, 0.0, e) * scale, mask=ids < source[2])
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + start + ids, mask=ids < source[2], other=0.0)
    else:
        noise = gumbels(seed, position, iteration, SAMPLE, first // 4 + tl.arange(0, BLOCK // 4))
    return packed(tl.where(out, -INF, x + noise), ids)
