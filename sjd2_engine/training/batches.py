"""Batches that follow from the seed and the number of the step: not from processes, devices or interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from ..schedule import CLEAN
from .noise import draw_levels, mixed
from .options import NoiseRecipe


class Pictures(Protocol):
    """Pictures as tokens with captions, as `training.store.Store` has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, str]: ...


@dataclass
class Batch:
    """Pictures of one forward pass.

    tokens    int64 [B, N], forced tokens included
    levels    int64 [B, N-1] of the inputs that are image tokens, as places in the recipe's times; -1 = clean
    seeds     int64 [B] of the noise
    captions  B texts
    dropped   B flags: whether the unconditional prompt stands in the caption's place
    """

    tokens: Tensor
    levels: Tensor
    seeds: Tensor
    captions: list[str]
    dropped: list[bool]

    def to(self, device: torch.device) -> Batch:
        tokens, levels, seeds = (x.to(device, non_blocking=True) for x in (self.tokens, self.levels, self.seeds))
        return Batch(tokens, levels, seeds, self.captions, self.dropped)


class Feed:
    """Pictures in their order of training; the last `validation` ones are kept apart.

    Picture number j of a run is entry j % n of the permutation of epoch j // n, and its levels, noise and dropout are
    functions of (seed, j): whoever knows the step knows everything.
    """

    def __init__(
        self, pictures: Pictures, layout: TokenLayout, vocabulary: int, recipe: NoiseRecipe, seed: int, validation: int
    ) -> None:
        self.pictures, self.layout, self.vocabulary, self.recipe, self.seed = pictures, layout, vocabulary, recipe, seed
        self.size = len(pictures) - validation
        self.forced = torch.tensor(layout.forced[:-1]) >= 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def require(self, batch: int, validation: int) -> None:
        """Raise ConfigError unless there is at least one batch to train on beside the pictures kept apart."""
        if self.size < batch:
            raise ConfigError(
                f"the data holds {len(self.pictures)} pictures: {validation} are kept apart and one step takes "
                f"{batch}; prepare more, or lower --validation or --batch"
            )

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed(self.seed, 1, epoch))
            self._order = (epoch, torch.randperm(self.size, generator=generator))
        return int(self._order[1][place])

    def training(self, numbers: Sequence[int]) -> Batch:
        """The pictures of these numbers in the order of training."""
        return self._batch([self._index(n) for n in numbers], numbers, self.seed, self.recipe.unconditional)

    def validation_batches(self, size: int) -> int:
        """How many batches the pictures kept apart make."""
        return -(-(len(self.pictures) - self.size) // size)

    def validation(self, size: int, which: int) -> Batch:
        """A batch of the pictures kept apart: the same levels and noise every time, captions always given."""
        kept = range(self.size, len(self.pictures))[which * size : (which + 1) * size]
        return self._batch(kept, [place - self.size for place in kept], 0, 0.0)

    def _batch(self, index: Sequence[int], numbers: Sequence[int], seed: int, unconditional: float) -> Batch:
        rows, captions, levels, dropped = [], [], [], []
        for place, number in zip(index, numbers):
            tokens, caption = self._checked(place)
            generator = torch.Generator().manual_seed(mixed(seed, 2, number))
            dropped.append(float(torch.rand((), generator=generator)) < unconditional)
            levels.append(draw_levels(len(self.forced), number, self.recipe, generator))
            rows.append(tokens)
            captions.append(caption)
        stacked = torch.stack(levels).masked_fill(self.forced, CLEAN)
        seeds = torch.tensor([mixed(seed, 3, number) for number in numbers])
        return Batch(self.layout.all_tokens(torch.stack(rows)), stacked, seeds, captions, dropped)

    def _checked(self, index: int) -> tuple[Tensor, str]:
        tokens, caption = self.pictures[index]
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise CheckpointError(
                f"picture {index} of the data has tokens from {low} to {high}, the model knows 0 to "
                f"{self.vocabulary - 1}: prepare the data again with this model"
            )
        return tokens, caption
