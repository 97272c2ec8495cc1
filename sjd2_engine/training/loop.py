"""One training loop for base and noise training: a clock-driven schedule, checkpoints that resume, a log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

LossOf = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]

WARMUP_STEPS = 150
SAVE_EVERY = 300  # steps
LOG_EVERY = 25  # steps


class Trainer:
    """Muon and AdamW with a cosine schedule over wall-clock minutes; `run` goes on from `out/state.pt`."""

    def __init__(
        self, model: nn.Module, out: Path, minutes: float, rate: float, weight_decay: float, seed: int
    ) -> None:
        # Muon for the blocks' matrices, AdamW for tables and gains; with RMS-matched updates one rate serves both.
        inner = [w for name, w in model.named_parameters() if w.dim() == 2 and name.startswith("blocks.")]
        outer = [w for name, w in model.named_parameters() if w.dim() != 2 or not name.startswith("blocks.")]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.model, self.out, self.seconds, self.rate = model, out, minutes * 60, rate
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.spent = 0, 0.0

    def _learning_rate(self) -> float:
        share = min(1.0, self.spent / self.seconds)
        return (
            self.rate * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        )

    def save(self) -> None:
        """Write everything a later run needs to go on, under a temporary name first."""
        state = {
            "model": self.model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(), "step": self.step, "spent": self.spent,
        }  # fmt: skip
        partial = self.out / "state.pt.part"
        torch.save(state, partial)
        os.replace(partial, self.out / "state.pt")

    def resume(self) -> None:
        """Go on from the last saved state, if there is one."""
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.spent = state["step"], state["spent"]

    def advance(self, loss_of: LossOf) -> dict[str, float]:
        """One step of training; `loss_of` draws a batch and gives its loss and the figures to log."""
        started = time.monotonic()
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = self._learning_rate()
        loss, parts = loss_of(self.generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.spent += time.monotonic() - started
        return parts

    def run(self, loss_of: LossOf, report: Callable[[], dict]) -> None:
        """Trains until the time is spent, then writes `report.json` with the figures that `report` gives."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        bar = tqdm(total=round(self.seconds), initial=round(self.spent), unit="s", desc=self.out.name)
        sums: dict[str, list[float]] = {}
        while self.spent < self.seconds:
            for name, value in self.advance(loss_of).items():
                sums.setdefault(name, []).append(value)
            if self.step % LOG_EVERY == 0:
                means = {name: sum(values) / len(values) for name, values in sums.items()}
                self._log(means)
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, step=self.step, refresh=False)
                bar.update(round(self.spent) - bar.n)
                sums = {}
            if self.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        figures = {"steps": self.step, "seconds": round(self.spent), **report()}
        (self.out / "report.json").write_text(json.dumps(figures, indent=1) + "\n")

    def _log(self, means: dict[str, float]) -> None:
        line = {"step": self.step, "seconds": round(self.spent), "rate": self._learning_rate()}
        line |= {name: round(mean, 4) for name, mean in means.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
