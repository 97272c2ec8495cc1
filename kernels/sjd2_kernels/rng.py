"""Counter-based random numbers: Philox4x32-10 in plain PyTorch, bit for bit Triton's `tl.philox`.

A draw is a function of (seed of the image, absolute position, iteration, purpose, token id) and of
nothing else, so neither the batch, nor the window slot, nor the device can change it:

    key     = the 64-bit seed (low word, high word)
    counter = (index // 4, position, iteration, purpose)
    word    = index % 4                                  index = token id, or embedding dimension

Position-keyed noise has iteration 0; noise of decoding step s has iteration s + 1.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SAMPLE = 0  # draws from the target distribution p
ACCEPT = 1  # the uniform number of the acceptance test
RESIDUAL = 2  # the replacement of a rejected draft
NOISE = 3  # Gaussian noise of embeddings
INIT = 4  # token drafts of positions that nothing is known about

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10  # Triton's constant: in float32 just below 2**-31, so the result stays below 1
_SMALLEST = 2.0**-33  # stands for a uniform of exactly 0


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Multipliers of even and odd rounds [2] and key schedule [10, 2] in the order of `philox`; 32; mask."""
    word = torch.tensor(32, device=device), torch.tensor(_MASK, device=device)
    even = torch.tensor([_M0, _M1], device=device)
    step = torch.arange(_ROUNDS, device=device)
    schedule = torch.stack((step * _WEYL1, step * _WEYL0), 1)
    schedule[1::2] = schedule[1::2].flip(1)
    return even, even.flip(0), schedule, *word


@lru_cache(maxsize=32)
def _lanes(count: int, device: torch.device) -> Tensor:
    return torch.arange((count + 3) // 4, device=device)


@lru_cache(maxsize=32)
def _accept_lanes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counter words 0 and 3 of one acceptance draw followed by `count` residual draws."""
    lanes = torch.arange(-1, (count + 3) // 4, device=device).clamp_(min=0)
    purpose = torch.full_like(lanes, RESIDUAL)
    purpose[0] = ACCEPT
    return lanes, purpose


def philox(
    seeds: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter (int64, 0 … 2³²−1); all arguments int64, broadcast against each other.

    Philox4x32-10 of Salmon et al. (SC 2011). `seeds` has as many dimensions as the result. The two
    multiplications of a round run as one: the rows of `a` hold (c0, c2) and swap places in every round,
    those of `b` hold (c3, c1). Products wrap in int64; what lies above 32 bits is cut off once a round.
    """
    purpose = torch.full((), c3, dtype=torch.int64, device=seeds.device) if isinstance(c3, int) else c3
    even, odd, schedule, bits, mask = _constants(seeds.device)
    ones = (1,) * seeds.dim()
    high = seeds >> bits
    keys = torch.stack((high, seeds, seeds, high)).view(2, 2, *seeds.shape).repeat(5, 1, *ones)
    keys = keys + schedule.view(_ROUNDS, 2, *ones)
    _, c0, c1, c2, purpose = torch.broadcast_tensors(seeds, c0, c1, c2, purpose)
    a, b = torch.stack((c0, c2)), torch.stack((purpose, c1))
    multipliers = (even.view(2, *ones), odd.view(2, *ones))
    product = a
    for number, key in enumerate(keys.unbind(0)):
        product = a * multipliers[number % 2]
        a = (product >> bits).bitwise_xor_(b).bitwise_xor_(key).bitwise_and_(mask)
        b = product.flip(0)
    product = product & mask
    return a[0], product[0], a[1], product[1]


def uniform_from_bits(bits: Tensor) -> Tensor:
    """Float32 in [0, 1) from 32 random bits (int64): Triton's `uint_to_uniform_float`, bit for bit."""
    signed = bits.to(torch.int32)  # wraps, as a bit cast does
    return (signed ^ (signed >> 31)).float().mul_(_TO_UNIT)


def gumbel_from_uniform(u: Tensor) -> Tensor:
    """Standard Gumbel noise −log(−log1p(−u)) (float32).

    Large values come from small `u`, where float32 is finest: the winners of an argmax stay distinct.
    """
    return u.clamp(min=_SMALLEST).neg_().log1p_().neg_().log_().neg_()


def _interleave(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """[..., n] × 4 words → uniforms [..., 4n] in the order of the index."""
    return uniform_from_bits(torch.stack(words, -1)).flatten(-2)


def uniforms(seeds: Tensor, positions: Tensor, iteration: Tensor | int, purpose: int, count: int) -> Tensor:
    """Uniforms in [0, 1): seeds i64 [B], positions i64 [B, L], iteration [B] or int → f32 [B, L, count]."""
    iteration = _as_counter(iteration, positions)
    lanes = _lanes(count, positions.device)
    words = philox(seeds.view(-1, 1, 1), lanes, positions.unsqueeze(-1), iteration, purpose)
    return _interleave(words)[..., :count]


def gumbel(seeds: Tensor, positions: Tensor, iteration: Tensor | int, purpose: int, count: int) -> Tensor:
    """Gumbel noise for `count` tokens at every position; shapes as `uniforms`."""
    return gumbel_from_uniform(uniforms(seeds, positions, iteration, purpose, count))


def acceptance_draws(seeds: Tensor, positions: Tensor, iteration: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For verification, in one pass: u f32 [B, L] (ACCEPT) and Gumbel noise f32 [B, L, count] (RESIDUAL)."""
    lanes, purpose = _accept_lanes(count, positions.device)
    iteration = _as_counter(iteration, positions)
    words = philox(seeds.view(-1, 1, 1), lanes, positions.unsqueeze(-1), iteration, purpose)
    flat = _interleave(words)
    return flat[..., 0], gumbel_from_uniform(flat[..., 4 : 4 + count])


def normals(seeds: Tensor, positions: Tensor, epoch: Tensor | int, count: int) -> Tensor:
    """Standard normal noise for `count` dimensions (Box–Muller): f32 [B, L, count], purpose NOISE.

    Words (0, 1) of counter j give dimensions 4j and 4j+1, words (2, 3) give 4j+2 and 4j+3.
    """
    epoch = _as_counter(epoch, positions)
    lanes = _lanes(count, positions.device)
    words = philox(seeds.view(-1, 1, 1), lanes, positions.unsqueeze(-1), epoch, NOISE)
    u = uniform_from_bits(torch.stack(words, -1)).unflatten(-1, (2, 2))
    radius = u[..., 0].clamp(min=_SMALLEST).neg_().log1p_().mul_(-2.0).sqrt_()
    angle = u[..., 1] * (2.0 * torch.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-3)[..., :count]


def _as_counter(value: Tensor | int, positions: Tensor) -> Tensor:
    if isinstance(value, int):
        return torch.full((1, 1, 1), value, dtype=torch.int64, device=positions.device)
    return value.to(torch.int64).view(-1, 1, 1)
