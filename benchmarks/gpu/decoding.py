"""Times of whole decoding steps as the engine runs them, beside their floors, and what they predict for a picture."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sjd2_engine.graphs import Lagged, StepGraphs
from sjd2_engine.memory import decode_memory, is_out_of_memory
from sjd2_engine.slots import Slots
from sjd2_engine.transformer import Block

from .floors import Rates, median, seconds_of, spread, step_work
from .geometry import Geometry, RandomModel, mid_picture, random_model, seek
from .run import Run

WIDTHS = (1, 8, 16, 32, 64, 96, 128)
BATCHES = (1, 2, 4, 8)
LOOPED = 20  # steps that the engine's loop is timed for
SLOTS_TAKE, CELL_TAKES = 40.0, 15.0  # seconds that new slots with a first cell, and a further cell, are given at least
Point = tuple[int, int]
"""A window, and the entries cached per row (0 = mid-picture)."""


def steps(
    run: Run, geometry: Geometry, rates: Rates, widths: Sequence[int] = WIDTHS, batches: Sequence[int] = BATCHES
) -> None:
    """Every width and batch: AR for a width of 1, the Jacobi decoder above."""
    model = random_model(geometry, run.device, run.dtype)
    cells: list[dict[str, Any]] = []
    result = {"model": geometry.name, "weights": "random", "cells": cells, "predicted": []}
    run.results.append(result)
    print_heading(run, geometry)
    for batch in batches:
        points = points_of(geometry, widths, batch)
        for decoder, chosen in (("ar", [p for p in points if p[0] == 1]), ("jacobi", [p for p in points if p[0] > 1])):
            for entry in _batch(run, geometry, model, rates, decoder, batch, chosen):
                cells.append(entry)
                run.say(line(entry))
                run.save()
    result["predicted"] = predictions(geometry, cells)
    judge(run, geometry, result)


def points_of(geometry: Geometry, widths: Sequence[int], batch: int) -> list[Point]:
    """Every width in mid-picture; with one picture also where a goal asks for another cache length."""
    late = [(goal.window, goal.entries) for goal in geometry.floor_goals if goal.entries]
    return [(width, 0) for width in widths] + (late if batch == 1 else [])


def floors(
    run: Run, geometry: Geometry, rates: Rates, widths: Sequence[int] = WIDTHS, batches: Sequence[int] = BATCHES
) -> None:
    """The least that steps can take by `rates`, in bfloat16: bytes, operations and seconds, nothing measured."""
    cells: list[dict[str, Any]] = []
    run.results.append({"model": geometry.name, "cells": cells})
    run.say(f"\n{geometry.name}, by formula, in bfloat16, with guidance; in mid-picture, where not said otherwise")
    run.say(f"{'B':>2} {'W':>4} {'entries':>7} {'GB':>6} {'TFLOP':>6} {'floor ms':>8} {'one after the other':>20}")
    for batch in batches:
        for width, entries in points_of(geometry, widths, batch):
            config = geometry.config("ar" if width == 1 else "jacobi", width)
            work = step_work(geometry, config, batch, width, torch.bfloat16, entries)
            entry = {
                "batch": batch, "window": width, "entries": entries or geometry.middle,
                "gigabytes": (work.weights + work.cache) / 1e9, "teraflop": work.operations / 1e12,
                "floor_ms": 1e3 * work.floor(rates), "serial_floor_ms": 1e3 * work.serial(rates),
            }  # fmt: skip
            cells.append(entry)
            run.say(
                f"{batch:2} {width:4} {entry['entries']:7} {entry['gigabytes']:6.1f} {entry['teraflop']:6.2f} "
                f"{entry['floor_ms']:8.2f} {entry['serial_floor_ms']:20.2f}"
            )


def _batch(
    run: Run, geometry: Geometry, model: RandomModel, rates: Rates, decoder: str, batch: int, points: list[Point]
) -> Iterable[dict[str, Any]]:
    """The points of one decoder and batch, on one set of slots."""
    left = list(points)
    if not left or not run.has_time_for(names(decoder, batch, left), max(SLOTS_TAKE, 2 * run.slowest)):
        return
    slots: Slots | None = None
    try:
        slots = mid_picture(geometry, model, geometry.config(decoder, max(left)[0]), batch, run.attention)
        while left and run.has_time_for(names(decoder, batch, left), max(CELL_TAKES, 1.5 * run.slowest)):
            began = time.monotonic()
            entry = cell(run, geometry, slots, rates, decoder, left[0])
            run.slowest = max(run.slowest, time.monotonic() - began)
            left.pop(0)
            yield entry
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        run.skip(names(decoder, batch, left), "out of memory")
    finally:
        slots = None
        run.free()


def names(decoder: str, batch: int, points: Iterable[Point]) -> str:
    """How a table calls points that it leaves out."""
    widths = ", ".join(f"W={width}" + (f" at {entries} entries" if entries else "") for width, entries in points)
    return f"{decoder} B={batch} {widths}"


def cell(run: Run, geometry: Geometry, slots: Slots, rates: Rates, decoder: str, point: Point) -> dict[str, Any]:
    """Figures of one point: the step, its floor, the library's products alone, the loop, capture and memory."""
    width, entries = point
    slots.resize(width)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    before, began = slots.graphs.report(), time.perf_counter()
    for _ in range(2):  # the first warms up and compiles, the second captures
        seek(slots, geometry, entries)
        slots.step()
    run.settle()
    prepared, after = time.perf_counter() - began, slots.graphs.report()
    times = seconds_of(slots.step, run.device, lambda: seek(slots, geometry, entries), run.repeats)
    step, config = median(times), slots.config
    work = step_work(geometry, config, slots.count, width, run.dtype, entries)
    seek(slots, geometry, entries)
    return {
        "decoder": decoder,
        "batch": slots.count,
        "window": width,
        "rows": slots.cache.lengths.shape[0],
        "entries": entries or geometry.middle,
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
        "estimated_gib": estimate(slots, run.dtype) / 2**30,
    }


def estimate(slots: Slots, dtype: torch.dtype) -> int:
    """Bytes that the engine reckons with for these slots before it makes them."""
    return decode_memory(slots.model.facts, slots.config, dtype, slots.count, slots.window.device.type).total


def loop_seconds(run: Run, slots: Slots, count: int) -> float:
    """Wall-clock seconds per step of the engine's loop: a report late by one step, read while the next one runs."""
    run.settle()
    began = time.perf_counter()
    loop(slots, count)
    run.settle()
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
    """Seconds per picture, prompt and pixels left out: the loop's seconds per step times published forward passes.

    Of a batch all pictures take as long; `images_per_s` is held against AR's with one picture and with as many.
    """
    loops = {(c["batch"], c["window"]): c["loop_ms"] / 1e3 for c in cells if c["entries"] == geometry.middle}
    found = []
    rates: dict[tuple[str, int], float] = {}
    for batch in sorted({batch for batch, _ in loops}):
        for entry in geometry.published:
            if (batch, entry.window) in loops:
                seconds = entry.forwards * loops[batch, entry.window]
                rate = rates[entry.method, batch] = batch / seconds
                alone, beside = rates.get(("AR", 1)), rates.get(("AR", batch))
                found.append(
                    {**vars(entry), "batch": batch, "step_ms": 1e3 * loops[batch, entry.window]}
                    | {"predicted_s": seconds, "predicted_images_per_s": rate}
                    | {"over_ar_alone": alone and rate / alone, "over_ar_beside": beside and rate / beside}
                )
    return found


def judge(run: Run, geometry: Geometry, result: dict[str, Any]) -> None:
    """Print what is predicted, and hold both against the goals."""
    name = f"{geometry.name} (random weights)"
    for entry in result["predicted"]:
        run.say(
            f"{name}, predicted: {entry['method']} B={entry['batch']}, {entry['forwards']} published forwards of "
            f"{entry['step_ms']:.2f} ms (W={entry['window']}): {entry['predicted_s']:.2f} s, "
            f"{entry['predicted_images_per_s']:.2f} images/s"
        )
        if geometry.picture_goal and (entry["method"], entry["batch"]) == ("SJD2", 1):
            run.goal(f"{name}: predicted seconds of a picture", entry["predicted_s"], at_most=geometry.picture_goal)
    for goal in geometry.floor_goals:
        for found in result["cells"]:
            if (found["batch"], found["window"], found["entries"]) == (1, goal.window, goal.entries or geometry.middle):
                what = f"{name}: step of W={goal.window} at {found['entries']} entries over its floor"
                run.goal(what, found["of_floor"], at_most=goal.ratio)


def print_heading(run: Run, geometry: Geometry) -> None:
    run.say(
        f"\n{geometry.name}, random weights, {run.dtype}, with guidance; steps in mid-picture, where not said otherwise"
    )
    run.say(
        f"{'decoder':8} {'B':>2} {'W':>4} {'entries':>7} {'step ms':>8} {'floor':>8} {'ratio':>6} {'products':>8} "
        f"{'loop':>8} {'capture s':>9} {'graph MiB':>9} {'peak GiB':>8} {'estimate':>8}"
    )


def line(entry: dict[str, Any]) -> str:
    """A row of the table."""
    peak = f"{entry['peak_gib']:8.1f}" if entry["peak_gib"] is not None else f"{'–':>8}"
    return (
        f"{entry['decoder']:8} {entry['batch']:2} {entry['window']:4} {entry['entries']:7} {entry['step_ms']:8.3f} "
        f"{entry['floor_ms']:8.3f} {entry['of_floor']:6.2f} {entry['products_ms']:8.3f} {entry['loop_ms']:8.3f} "
        f"{entry['capture_s']:9.2f} {entry['graph_mib']:9.0f} {peak} {entry['estimated_gib']:8.1f}"
    )
