"""95 % intervals: how far a figure may be off for having been measured on so few pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LOW, HIGH = 2.5, 97.5  # percent


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, form: str = "{:.2f}", scale: float = 1.0) -> str:
        """`4.20 (4.05 – 4.36)`."""
        value, low, high = (form.format(scale * number) for number in (self.value, self.low, self.high))
        return f"{value} ({low} – {high})"

    def inverse(self, numerator: float) -> Interval:
        """The interval of numerator / figure, as of tokens per pass from passes; the figure must be above 0."""
        return Interval(numerator / self.value, numerator / self.high, numerator / self.low)


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray] | None = None) -> Interval:
    """Percentile bootstrap of a statistic over independent values, the mean unless told otherwise.

    `statistic` maps [..., n] to [...] along the last axis. The resampling is seeded: the same values give the same
    interval. A single value has no spread to resample: its interval is the value itself.
    """
    data = np.asarray(values, dtype=np.float64)
    measure = statistic or (lambda x: x.mean(-1))
    value = float(measure(data))
    if len(data) == 1:
        return Interval(value, value, value)
    chosen = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(measure(data[chosen]), (LOW, HIGH))
    return Interval(value, float(low), float(high))


def median(values: Sequence[float]) -> Interval:
    """The median with its bootstrap interval."""
    return bootstrap(values, lambda x: np.median(x, axis=-1))


def paired(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Mean difference of two measurements of the same pictures, with its bootstrap interval."""
    return bootstrap([a - b for a, b in zip(values, base, strict=True)])
