"""Times of whole decoding steps as the engine runs them, beside their floors, and what they predict for a picture."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sjd2_engine.graphs import Lagged, StepGraphs
from sjd2_engine.memory import is_out_of_memory
from sjd2_engine.slots import Slots
from sjd2_engine.transformer import Block

from .floors import REPEATS, Rates, median, seconds_of, spread, step_work
from .geometry import Geometry, RandomModel, mid_picture, random_model, seek

WIDTHS = (1, 8, 16, 32, 64, 96, 128)
BATCHES = (1, 2, 4, 8)
LOOPED = 20  # steps that the engine's loop is timed for


@dataclass
class Run:
    """Where a part runs, until when, and what it had to leave out."""

    device: torch.device
    dtype: torch.dtype
    deadline: float  # by time.monotonic()
    smoke: bool = False
    skipped: list[str] = field(default_factory=list)
    say: Callable[[str], None] = print

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; where not, `what` is noted as skipped."""
        enough = time.monotonic() + seconds <= self.deadline
        if not enough:
            self.skip(what, "no time left")
        return enough

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"skipped {what}: {why}")

    @property
    def repeats(self) -> int:
        """Measurements of which the median counts."""
        return 4 if self.smoke else REPEATS

    def free(self) -> None:
        """Give memory back that nothing uses any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def steps(
    run: Run, geometry: Geometry, rates: Rates, widths: Sequence[int] = WIDTHS, batches: Sequence[int] = BATCHES
) -> dict[str, Any]:
    """Every width and batch, AR for a width of 1 and the Jacobi decoder above, in the middle of the picture."""
    model = random_model(geometry, run.device, run.dtype)
    cells: list[dict[str, Any]] = []
    print_heading(run, geometry)
    for batch in batches:
        for decoder, chosen in (("ar", [w for w in widths if w == 1]), ("jacobi", [w for w in widths if w > 1])):
            if chosen:
                cells += _batch(run, geometry, model, rates, decoder, batch, chosen)
    return {"model": geometry.name, "weights": "random", "cells": cells, "predicted": predictions(geometry, cells)}


def _batch(
    run: Run, geometry: Geometry, model: RandomModel, rates: Rates, decoder: str, batch: int, widths: list[int]
) -> list[dict[str, Any]]:
    """The widths of one decoder and batch, on one set of slots."""
    cells: list[dict[str, Any]] = []
    name = f"{decoder} B={batch} W={widths}"
    if not run.has_time_for(name, 0 if run.smoke else 40):
        return cells
    try:
        slots = mid_picture(geometry, model, geometry.config(decoder, max(widths)), batch)
        for width in widths:
            if not run.has_time_for(f"{decoder} B={batch} W={width}", 0 if run.smoke else 15):
                break
            cells.append(cell(run, geometry, slots, rates, decoder, width))
            run.say(line(cells[-1]))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        run.skip(name, "out of memory")
    slots = None
    run.free()
    return cells


def cell(run: Run, geometry: Geometry, slots: Slots, rates: Rates, decoder: str, width: int) -> dict[str, Any]:
    """Figures of one width: the step, its floor, the library's products alone, the loop, capture and memory."""
    slots.resize(width)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    before, began = slots.graphs.report(), time.perf_counter()
    for _ in range(2):  # the first warms up and compiles, the second captures
        seek(slots, geometry)
        slots.step()
    settle(run)
    prepared, after = time.perf_counter() - began, slots.graphs.report()
    times = seconds_of(slots.step, run.device, lambda: seek(slots, geometry), run.repeats)
    step, config = median(times), slots.config
    work = step_work(geometry, config, slots.count, width, run.dtype)
    seek(slots, geometry)
    return {
        "decoder": decoder,
        "batch": slots.count,
        "window": width,
        "rows": slots.cache.lengths.shape[0],
        "entries": geometry.prompt - 1 + geometry.middle,
        "attention": slots.cache.backend.name,
        "fused": slots.cache.fused,
        "step_ms": 1e3 * step,
        "spread": spread(times),
        "floor_ms": 1e3 * work.floor(rates),
        "serial_floor_ms": 1e3 * work.serial(rates),
        "of_floor": step / work.floor(rates),
        "products_ms": 1e3 * products_seconds(run, slots, width),
        "loop_ms": 1e3 * loop_seconds(run, slots, 2 if run.smoke else LOOPED),
        "gigabytes": (work.weights + work.cache) / 1e9,
        "teraflop": work.operations / 1e12,
        "prepare_s": prepared,
        "capture_s": after.seconds - before.seconds,
        "graphs": after.graphs - before.graphs,
        "graph_mib": (after.bytes - before.bytes) / 2**20,
        "peak_gib": torch.cuda.max_memory_allocated(run.device) / 2**30 if run.device.type == "cuda" else None,
    }


def settle(run: Run) -> None:
    """Wait until the device has nothing left to do."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def loop_seconds(run: Run, slots: Slots, count: int) -> float:
    """Wall-clock seconds per step of the engine's loop: a report late by one step, read while the next one runs."""
    settle(run)
    began = time.perf_counter()
    loop(slots, count)
    settle(run)
    return (time.perf_counter() - began) / count


def loop(slots: Slots, count: int) -> None:
    """`count` steps; the host reads each report as a session does."""
    reports = Lagged()
    for _ in range(count):
        reports.push(slots.step())
        if len(reports) > 1:
            reports.pop().tolist()
    reports.pop().tolist()


@torch.inference_mode()
def products_seconds(run: Run, slots: Slots, width: int) -> float:
    """Seconds of a step's matrix products and nothing else, as the library does them, in one graph."""
    transformer = slots.model.transformer
    blocks = [block for block in transformer.blocks if isinstance(block, Block)]
    core = transformer.config
    shape = slots.cache.lengths.shape[0], width
    table = transformer.embedding
    wide, attended, fed = (
        torch.randn(*shape, size, device=table.device).to(table.dtype)
        for size in (core.hidden_size, core.num_attention_heads * core.head_dim, core.intermediate_size)
    )

    def products() -> None:
        for block in blocks:
            block.qkv(wide)
            block.out(attended)
            block.gate_up(wide)
            block.down(fed)
        transformer.head(wide)

    graphs = StepGraphs(run.device)
    for _ in range(2):
        graphs.run("products", products)
    return median(seconds_of(lambda: graphs.run("products", products), run.device, repeats=run.repeats))


def predictions(geometry: Geometry, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds per picture: measured step times published forwards. Prompt and pixels come on top."""
    alone = {entry["window"]: entry["step_ms"] for entry in cells if entry["batch"] == 1}
    return [
        {**vars(entry), "step_ms": alone[entry.window], "predicted_s": entry.forwards * alone[entry.window] / 1e3}
        for entry in geometry.published
        if entry.window in alone
    ]


def print_heading(run: Run, geometry: Geometry) -> None:
    entries = geometry.prompt - 1 + geometry.middle
    run.say(f"\n{geometry.name}, random weights, {run.dtype}, with guidance, {entries} entries cached per row")
    run.say(
        f"{'decoder':8} {'B':>2} {'W':>4} {'step ms':>8} {'floor':>8} {'ratio':>6} {'products':>8} {'loop':>8} "
        f"{'capture s':>9} {'graph MiB':>9} {'peak GiB':>8}"
    )


def line(entry: dict[str, Any]) -> str:
    """A row of the table."""
    peak = f"{entry['peak_gib']:8.1f}" if entry["peak_gib"] is not None else f"{'–':>8}"
    return (
        f"{entry['decoder']:8} {entry['batch']:2} {entry['window']:4} {entry['step_ms']:8.3f} {entry['floor_ms']:8.3f} "
        f"{entry['of_floor']:6.2f} {entry['products_ms']:8.3f} {entry['loop_ms']:8.3f} {entry['capture_s']:9.2f} "
        f"{entry['graph_mib']:9.0f} {peak}"
    )
