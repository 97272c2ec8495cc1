"""What a device can do, measured, and the least time that a decoding step could take by it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sjd2_engine import DecodeConfig
from sjd2_engine.transformer import Transformer

from .geometry import Geometry

Call = Callable[[], object]
WARM, REPEATS = 5, 30


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a large copy, read and written, and operations per second of a large matrix product."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Work:
    """The least that one step has to do: bytes of weights, of cached keys and values, and operations."""

    weights: int
    cache: int
    operations: int

    def floor(self, rates: Rates) -> float:
        """Seconds, with memory and arithmetic side by side all the time."""
        return max((self.weights + self.cache) / rates.copy, self.operations / rates.matmul)

    def serial(self, rates: Rates) -> float:
        """Seconds, with one after the other."""
        return (self.weights + self.cache) / rates.copy + self.operations / rates.matmul


def seconds_of(call: Call, device: torch.device, between: Call | None = None, repeats: int = REPEATS) -> list[float]:
    """Seconds of each of `repeats` calls after some for warming up; `between` runs before each, untimed.

    On CUDA by events, behind work that is already queued: no call waits for the host.
    """
    for _ in range(WARM):
        _twice(between, call)
    if device.type != "cuda":
        return [_clocked(call, between) for _ in range(repeats)]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        if between:
            between()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in marks]


def _twice(between: Call | None, call: Call) -> None:
    if between:
        between()
    call()


def _clocked(call: Call, between: Call | None) -> float:
    if between:
        between()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """Distance of the quartiles over the median: what a difference must exceed to mean something."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def measure_rates(device: torch.device, dtype: torch.dtype, size: int = 2**31, side: int = 8192) -> Rates:
    """On random data; `size` bytes are copied, matrices of `side` multiplied."""
    return Rates(_copy_rate(device, size), _matmul_rate(device, dtype, side))


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.randint(0, 256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / median(seconds_of(lambda: target.copy_(source), device))


def _matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / median(seconds_of(lambda: torch.mm(left, right, out=out), device))


def core_weights(geometry: Geometry) -> int:
    """Numbers that every step multiplies by: blocks, final norm and head; the input table is only looked up in."""
    outline = Transformer.outline(geometry.core, geometry.vocabulary, geometry.image_vocabulary)
    return sum(parameter.numel() for name, parameter in outline.named_parameters() if name != "embedding")


def step_work(
    geometry: Geometry, config: DecodeConfig, batch: int, width: int, dtype: torch.dtype, entries: int = 0
) -> Work:
    """One step of `batch` pictures, `width` inputs for each, twice with guidance; `entries` as in `seek`."""
    core = geometry.core
    rows = batch if config.guidance_scale == 1.0 else 2 * batch
    weights = core_weights(geometry)
    entries = entries or geometry.middle
    cache = rows * (entries + width) * 2 * core.num_hidden_layers * core.num_key_value_heads * core.head_dim
    # A query multiplies with each key it sees once for its logit and once for its value.
    seen = width * entries + width * (width + 1) // 2
    attention = 4 * rows * seen * core.num_attention_heads * core.head_dim * core.num_hidden_layers
    return Work(weights * dtype.itemsize, cache * dtype.itemsize, 2 * weights * rows * width + attention)
