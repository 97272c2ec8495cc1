"""The bundled model on a device: every decoder with and without graphs, and a loop that never waits."""

from __future__ import annotations

import contextlib
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

from .decoding import Run

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
WARM = 6  # steps after which every kernel is compiled and every graph captured


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


def scenes(run: Run, decoders: Sequence[str] = DECODERS, batches: Sequence[int] = (1, 8), repeats: int = 3) -> Any:
    """Images per second of every decoder and batch, steps as graphs and eagerly; tokens of both compared in float32."""
    entries: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16") if run.device.type == "cuda" else ("float32",):
        engine = Engine.from_pretrained(NAME, device=str(run.device), dtype=dtype)
        for decoder in decoders:
            if not run.has_time_for(f"{decoder} in {dtype}", 0 if run.smoke else 60):
                continue
            drawn = {batch: _drawn(run, engine, decoder, batch, repeats) for batch in batches}
            engine.release()
            with without_graphs(engine):
                plain = {batch: _drawn(run, engine, decoder, batch, 1) for batch in batches}
            for batch in batches:
                entry = {"dtype": dtype, "decoder": decoder, "batch": batch, **drawn[batch][1]}
                entry["eager_images_per_s"] = plain[batch][1]["images_per_s"]
                entry["same_tokens_as_eager"] = torch.equal(drawn[batch][0], plain[batch][0])
                entry["same_tokens_as_batch_1"] = torch.equal(drawn[batch][0], drawn[batches[0]][0])
                entries.append(entry)
                run.say(
                    f"{NAME} {dtype} {decoder} B={batch}: {entry['images_per_s']:.2f} images/s, eager "
                    f"{entry['eager_images_per_s']:.2f}, same tokens: {entry['same_tokens_as_eager']}"
                )
    passed = all(entry["same_tokens_as_eager"] for entry in entries if entry["dtype"] == "float32")
    return {"model": NAME, "prompts": len(_prompts(run)), "cells": entries, "passed": passed}


def _prompts(run: Run) -> list[str]:
    return list(PROMPTS[:1] if run.smoke else PROMPTS)


def _drawn(run: Run, engine: Engine, decoder: str, batch: int, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """Tokens, and figures of the median run; the first run captures and compiles."""
    prompts = _prompts(run)
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


def waits(run: Run, decoders: Sequence[str] = DECODERS) -> dict[str, Any]:
    """The loop from its first captured step to the last picture, previews included, where waiting is an error."""
    engine = Engine.from_pretrained(NAME, device=str(run.device), dtype="float32")
    entries = []
    for decoder in decoders:
        if not run.has_time_for(decoder, 0 if run.smoke else 30):
            continue
        session = engine.session(decoder, slots=2, preview_every=16)
        error = drained_without_waiting(session, run.device, 0)
        entries.append({"decoder": decoder, "steps": sum(session.passes.values()), "error": error})
        run.say(f"{decoder}: {entries[-1]['steps']} steps, {error or 'the host never waited'}")
    checked = run.device.type == "cuda"
    return {"model": NAME, "checked": checked, "decoders": entries, "passed": not any(e["error"] for e in entries)}


def drained_without_waiting(session: Session, device: torch.device, seed: int) -> str | None:
    """Draw two pictures; from the step after the warm-up on nothing may wait. The error if something did."""
    for key, prompt in enumerate(PROMPTS[:2]):
        session.submit(prompt, seed + key, key)
    for _ in range(WARM):
        session.step()
    try:
        with no_waiting(device):
            while session.busy:
                session.step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
