"""Which inputs of a picture are noised, and how much: the staircases of next-clean-token prediction (arXiv 2510.08994).

Image inputs are cut into segments of random length. Within a segment all have one level; from segment to segment the
level rises by one, as it does along a decoding window, and then falls back to clean: a saw-tooth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import CLEAN
from .options import NoiseRecipe

_MASK = 2**64 - 1


def mixed(*words: int) -> int:
    """A 63-bit number that looks unrelated for related words (splitmix64), for seeds of independent draws."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def saw_tooth(length: int, levels: int, recipe: NoiseRecipe, generator: torch.Generator) -> Tensor:
    """Levels int64 [length]: clean runs (-1), each followed by segments of level 0, 1, … up to levels - 1."""

    def draws(bounds: tuple[int, int]) -> list[int]:
        return torch.randint(bounds[0], bounds[1] + 1, (length,), generator=generator).tolist()

    # Every segment takes at least one position: that many draws are enough.
    segments, runs = draws(recipe.segment), draws(recipe.clean_run)
    ends = (torch.rand(length, generator=generator) < recipe.reset).tolist()
    row = torch.full((length,), CLEAN)
    position, used = 0, 0
    while position < length:
        position += runs[used]
        for level in range(levels):
            if position >= length:
                break
            row[position : position + segments[used]] = level
            position += segments[used]
            used += 1
            if ends[used - 1]:
                break
    return row


def draw_levels(length: int, picture: int, recipe: NoiseRecipe, generator: torch.Generator) -> Tensor:
    """Levels int64 [length] of a picture's inputs, as places in `recipe.times()`; -1 = clean.

    picture: its number in the order of training. The share of pictures without noise is kept exactly, not by chance.
    """
    if int((picture + 1) * recipe.clean_share) > int(picture * recipe.clean_share):
        return torch.full((length,), CLEAN)
    which = 0
    if len(recipe.levels) > 1 and float(torch.rand((), generator=generator)) < recipe.other_counts:
        which = int(torch.randint(1, len(recipe.levels), (), generator=generator))
    row = saw_tooth(length, recipe.levels[which], recipe, generator)
    return torch.where(row == CLEAN, row, row + sum(recipe.levels[:which]))
