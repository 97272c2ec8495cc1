"""What turns gradients into weights: optimisers, the rate's schedule, the moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .options import Options


def make_optimisers(module: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """AdamW over everything that is trained, or Muon for the blocks' matrices and AdamW for the rest.

    Tables, gains and biases do not decay. With Muon's updates brought to AdamW's size one rate serves both.
    """
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    inner = [weight for name, weight in trained if weight.dim() == 2 and ".blocks." in f".{name}"]
    inner = [weight for weight in inner if min(weight.shape) > 1]
    chosen = {id(weight) for weight in inner}
    outer = [weight for _, weight in trained if id(weight) not in chosen]
    if options.optimiser == "muon":
        muon = torch.optim.Muon(
            inner, lr=options.rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(outer, lr=options.rate, betas=options.betas, weight_decay=0.0, fused=True)]
    groups = [
        {"params": inner, "weight_decay": options.weight_decay},
        {"params": outer, "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=options.rate, betas=options.betas, fused=True
        )
    ]


def rate_at(step: int, steps: int, options: Options) -> float:
    """Learning rate of step 0 … steps - 1: linear warm-up, then constant or cosine down to `final_share`."""
    rate = options.rate * min(1.0, (step + 1) / max(1, options.warmup))
    if options.schedule == "constant":
        return rate
    wave = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (options.final_share + (1 - options.final_share) * wave)


class MovingAverage:
    """Exponential moving average, in float32, of what is trained."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.weights: dict[str, Tensor] = {name: weight.detach().float().clone() for name, weight in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, …; the first ones count more, so that the start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self._live.items():
            self.weights[name].lerp_(weight.detach().float(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights, for validation and for saving."""
        kept = {name: weight.detach().clone() for name, weight in self._live.items()}
        with torch.no_grad():
            for name, weight in self._live.items():
                weight.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._live.items():
                    weight.copy_(kept[name])
