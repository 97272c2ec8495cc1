"""One run of a benchmark: where, until when, what it has found so far and what it had to leave out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .floors import REPEATS, Rates


def _print(line: str) -> None:
    print(line, flush=True)  # whoever stops the run has seen everything until then


@dataclass
class Run:
    """Where a part runs, until when by time.monotonic(), and its findings; `save` keeps them as far as they go.

    assumed: what floors are computed from where none are measured.
    """

    device: torch.device
    dtype: torch.dtype
    deadline: float
    smoke: bool = False
    attention: str = "auto"
    assumed: Rates | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    say: Callable[[str], None] = _print
    save: Callable[[], None] = lambda: None
    slowest: float = 0.0  # seconds of the slowest measurement of a cell so far

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left, which a smoke run does not ask; if not, `what` is noted as skipped."""
        enough = time.monotonic() + (0.0 if self.smoke else seconds) <= self.deadline
        if not enough:
            self.skip(what, "no time left")
        return enough

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"skipped {what}: {why}")

    def goal(self, what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> None:
        """Hold a figure against what this project wants to reach; a smoke run's sizes are none to judge by."""
        assert (at_most is None) != (at_least is None)
        met = value <= at_most if at_most is not None else value >= (at_least or 0.0)
        bound = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
        judged = None if self.smoke else met
        self.goals.append({"goal": what, "bound": bound, "value": value, "met": judged})
        verdict = "not judged, smoke" if judged is None else "met" if judged else "MISSED"
        self.say(f"goal {verdict}: {what}: {value:.3g}, wanted {bound}")

    @property
    def repeats(self) -> int:
        """Measurements of which the median counts."""
        return 4 if self.smoke else REPEATS

    def settle(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give memory back that nothing uses any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
