"""The bundled model on a device: every decoder with and without graphs, and a loop that never waits."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sjd2_engine import Engine
from sjd2_engine.config import DECODERS
from sjd2_engine.graphs import Step, StepGraphs
from sjd2_engine.session import Session

from .run import Run

NAME = "scenes-sjd2"  # weights that every decoder can use
PROMPTS = (
    "a red circle left of a blue square",
    "three stars",
    "a small pink ring on a dotted black background",
    "a ring",
    "two green stars on a plain grey background",
    "a large yellow triangle",
    "a blue cross above a red ring",
    "a green square",
)
GOAL_BATCH = 8


class NoGraphs(StepGraphs):
    """Every step eagerly."""

    def run(self, key: object, step: Step) -> None:
        step()


@contextlib.contextmanager
def without_graphs(engine: Engine) -> Iterator[None]:
    """Steps run eagerly inside the block: what captured ones are compared with."""
    engine.release()
    with patch("sjd2_engine.slots.StepGraphs", NoGraphs):
        yield
    engine.release()


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA, whatever makes the host wait for the device raises RuntimeError inside the block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def scenes(run: Run, decoders: Sequence[str] = DECODERS, batches: Sequence[int] = (1, 8), repeats: int = 3) -> bool:
    """Images per second of every decoder and batch, steps as graphs and eagerly.

    Whether tokens were the same in float32: of graphs and eager steps, and of all batches.
    """
    repeatable()
    good = True
    for dtype in ("float32", "bfloat16") if run.device.type == "cuda" else ("float32",):
        cells: list[dict[str, Any]] = []
        prompts = _prompts(run)
        run.results.append(
            {"model": NAME, "weights": "bundled", "dtype": dtype, "prompts": len(prompts), "cells": cells}
        )
        engine = Engine.from_pretrained(NAME, device=str(run.device), dtype=dtype)
        for decoder in decoders:
            if run.has_time_for(f"{decoder} in {dtype}", 60):
                cells += _both_ways(run, engine, decoder, batches, repeats, prompts)
                run.save()
        hold_against_ar(run, dtype, cells)
        equal = all(cell["same_tokens_as_eager"] and cell["same_tokens_as_alone"] for cell in cells)
        good &= equal or dtype != "float32"
    return good


def _both_ways(
    run: Run, engine: Engine, decoder: str, batches: Sequence[int], repeats: int, prompts: list[str]
) -> list[dict[str, Any]]:
    """A cell for each batch: captured and eager, tokens compared."""
    drawn = {batch: _drawn(engine, decoder, batch, repeats, prompts) for batch in batches}
    with without_graphs(engine):
        plain = {batch: _drawn(engine, decoder, batch, 1, prompts) for batch in batches}
    cells = []
    for batch in batches:
        cell = {"decoder": decoder, "batch": batch, **drawn[batch][1]}
        cell["exact"] = engine.config_for(decoder).exact
        cell["eager_images_per_s"] = plain[batch][1]["images_per_s"]
        cell["same_tokens_as_eager"] = torch.equal(drawn[batch][0], plain[batch][0])
        cell["same_tokens_as_alone"] = torch.equal(drawn[batch][0], drawn[batches[0]][0])
        cells.append(cell)
        run.say(
            f"{engine.model_name} {engine.dtype} {decoder} B={batch} W={cell['window']}: {cell['images_per_s']:.2f} "
            f"images/s of {cell['forward_passes']:.1f} passes, eager {cell['eager_images_per_s']:.2f}, same tokens as "
            f"eager {cell['same_tokens_as_eager']}, as alone {cell['same_tokens_as_alone']}"
        )
    return cells


def hold_against_ar(run: Run, dtype: str, cells: list[dict[str, Any]]) -> None:
    """Images per second against AR with one picture at a time, and with as many; the best of a batch is judged."""
    rates = {(cell["decoder"], cell["batch"]): cell["images_per_s"] for cell in cells}
    alone = rates.get(("ar", 1))
    for cell in cells:
        beside = rates.get(("ar", cell["batch"]))
        cell["over_ar_alone"] = alone and cell["images_per_s"] / alone
        cell["over_ar_beside"] = beside and cell["images_per_s"] / beside
    large = [cell for cell in cells if cell["batch"] == GOAL_BATCH and cell["exact"] and cell["over_ar_alone"]]
    if large:
        best = max(large, key=lambda cell: cell["images_per_s"])
        what = f"{NAME} {dtype}: images/s of {best['decoder']} with B={GOAL_BATCH} over AR"
        run.goal(f"{what} with B=1", best["over_ar_alone"], at_least=4.0)
        run.goal(f"{what} with B={GOAL_BATCH}", best["over_ar_beside"], at_least=1.5)


def repeatable() -> None:
    """Before the first matrix product: let the library's sums repeat, so that tokens can be compared."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _prompts(run: Run) -> list[str]:
    # Twice as many as slots, with seeds of their own: slots change hands on the way.
    return list(PROMPTS[:1] if run.smoke else 2 * PROMPTS)


def _drawn(engine: Engine, decoder: str, batch: int, repeats: int, prompts: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Tokens, and figures of the median run; the first run captures and compiles."""
    results = [engine.generate(prompts, decoder, max_batch=batch, seed=0) for _ in range(repeats + 1)]
    timed = [result.stats for result in results[1:]]
    seconds = statistics.median(stats.latency_s for stats in timed)
    return results[0].tokens, {
        "images_per_s": len(prompts) / seconds,
        "seconds_per_image": seconds / len(prompts),
        "forward_passes": statistics.mean(timed[0].forward_passes),
        "window": timed[0].window,
        "graphs": results[0].stats.graphs.graphs,
        "capture_s": results[0].stats.graphs.seconds,
        "graph_mib": results[0].stats.graphs.bytes / 2**20,
        "peak_mib": timed[0].peak_memory_bytes / 2**20,
    }


def waits(run: Run, decoders: Sequence[str] = DECODERS) -> bool:
    """The loop to the last picture, previews included, where waiting is an error; whether nothing waited."""
    engine = Engine.from_pretrained(NAME, device=str(run.device), dtype="float32")
    cells: list[dict[str, Any]] = []
    checked = run.device.type == "cuda"
    run.results.append({"model": NAME, "weights": "bundled", "checked": checked, "cells": cells})
    for decoder in decoders:
        if not run.has_time_for(decoder, 30):
            continue
        session = engine.session(decoder, slots=2, preview_every=16)
        error = drained_without_waiting(session, run.device, 0)
        cells.append({"decoder": decoder, "steps": sum(session.passes.values()), "error": error})
        verdict = error or ("the host never waited" if checked else "not checked: no CUDA device")
        run.say(f"{decoder}: {cells[-1]['steps']} steps, {verdict}")
    return not any(cell["error"] for cell in cells)


def drained_without_waiting(session: Session, device: torch.device, seed: int) -> str | None:
    """Draw a picture, by which everything is compiled and captured, then two where nothing may wait once they are in
    their slots. The error if something did."""
    session.submit(PROMPTS[2], seed, "first")
    while session.busy:
        session.step()
    for key, prompt in enumerate(PROMPTS[:2]):
        session.submit(prompt, seed + key, key)
    session.step()
    try:
        with no_waiting(device):
            while session.busy:
                session.step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
