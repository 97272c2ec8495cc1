"""The positions ahead of the accepted ones: what a window holds of them, for one width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2_kernels import reference

from .schedule import CLEAN


@dataclass(frozen=True)
class Drafts:
    """Draft tokens and what is known of each; written in place, so that captured graphs stay true.

    tokens i64, status i32, levels i32 [B, W-1]; q f32 [B, W-1, V or 0]: what a draft was drawn from; noisy f32
    [B, W-1, D] in the normalised space, None where no draft is ever noisy; clean i32 [B, W]: all -1;
    histogram i64 [B, W+1]: steps of this width by accepted tokens.
    """

    tokens: Tensor
    status: Tensor
    levels: Tensor
    q: Tensor
    noisy: Tensor | None
    clean: Tensor
    histogram: Tensor

    @classmethod
    def allocate(cls, batch: int, width: int, vocab: int, dim: int, device: torch.device) -> Drafts:
        """Room for `width` - 1 drafts of `batch` rows; vocab = 0: no q, dim = 0: none is noisy."""

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((batch, *shape), value, dtype=dtype, device=device)

        count = width - 1
        return cls(
            full(0, count, dtype=torch.int64),
            full(reference.FRESH, count),
            full(CLEAN, count),
            full(0, count, vocab, dtype=torch.float32),
            full(0, count, dim, dtype=torch.float32) if dim else None,
            full(CLEAN, width),
            full(0, width + 1, dtype=torch.int64),
        )

    @property
    def width(self) -> int:
        """Model inputs per row: the last accepted token and the drafts."""
        return self.clean.shape[1]

    def refill(self, first: int, rows: Tensor, tokens: Tensor, levels: Tensor, noisy: Tensor | None) -> None:
        """Make the drafts from slot `first` on of `rows` i64 [n] fresh: tokens, levels, noise [n, W-1-first(, D)]."""
        self.tokens[rows, first:] = tokens
        self.status[rows, first:] = reference.FRESH
        self.levels[rows, first:] = levels
        self.q[rows, first:] = 0.0
        if self.noisy is not None and noisy is not None:
            self.noisy[rows, first:] = noisy

    def take(self, other: Drafts) -> int:
        """Copy as many leading drafts of another width as there is room for; returns how many."""
        count = min(self.width, other.width) - 1
        names = ("tokens", "status", "levels", "q", "noisy")
        for mine, theirs in ((getattr(self, name), getattr(other, name)) for name in names):
            if mine is not None:
                mine[:, :count] = theirs[:, :count]
        return count
