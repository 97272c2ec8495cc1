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

WARMUP_STEPS = 150
SAVE_EVERY = 300  # steps
LOG_EVERY = 25  # steps


class Trainer:
    """AdamW with a cosine schedule over wall-clock minutes; `run` continues from `out/state.pt` if it is there."""

    def __init__(
        self, model: nn.Module, out: Path, minutes: float, rate: float, weight_decay: float, seed: int
    ) -> None:
        matrices = [weight for weight in model.parameters() if weight.dim() == 2]
        vectors = [weight for weight in model.parameters() if weight.dim() != 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        self.model, self.out, self.seconds, self.rate = model, out, minutes * 60, rate
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.spent = 0, 0.0

    def _learning_rate(self) -> float:
        share = min(1.0, self.spent / self.seconds)
        return (
            self.rate * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        )

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(), "step": self.step, "spent": self.spent,
        }  # fmt: skip
        partial = self.out / "state.pt.part"
        torch.save(state, partial)
        os.replace(partial, self.out / "state.pt")

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step, self.spent = state["step"], state["spent"]

    def run(
        self,
        loss_of: Callable[[torch.Generator], tuple[Tensor, dict[str, float]]],
        report: Callable[[], dict],
    ) -> None:
        """Trains until the time is spent; `loss_of` draws a batch and gives its loss, `report` the final figures."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        bar = tqdm(total=round(self.seconds), initial=round(self.spent), unit="s", desc=self.out.name)
        sums: dict[str, list[float]] = {}
        last = time.monotonic()
        while self.spent < self.seconds:
            for group in self.optimiser.param_groups:
                group["lr"] = self._learning_rate()
            loss, parts = loss_of(self.generator)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            for name, value in parts.items():
                sums.setdefault(name, []).append(value)
            if self.step % LOG_EVERY == 0:
                self._log(sums)
                bar.set_postfix(
                    {name: f"{sum(v) / len(v):.3f}" for name, v in sums.items()},
                    step=self.step,
                    refresh=False,
                )
                bar.update(round(self.spent) - bar.n)
                sums = {}
            if self.step % SAVE_EVERY == 0:
                self._save()
        self._save()
        (self.out / "report.json").write_text(
            json.dumps({"steps": self.step, "seconds": round(self.spent), **report()}, indent=1)
        )

    def _log(self, sums: dict[str, list[float]]) -> None:
        line = {"step": self.step, "seconds": round(self.spent), "rate": self._learning_rate()}
        line |= {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
