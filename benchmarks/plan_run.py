"""How many GPU hours a large run should take, by arithmetic: the predicted table of docs/scale.md.

    PYTHONPATH=.:kernels python benchmarks/plan_run.py [--images N] [--copy TB/S] [--matmul TFLOP/S] [--slack F]

Needs no GPU. A step is taken to last `slack` times its floor (the bytes it must read or the operations it must do,
whichever takes longer), a picture as many steps as its paper says, at the published settings; B pictures share a step.
Replace the assumed rates by those that `benchmarks/decode_gpu.py` measures. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.floors import Rates, core_weights, step_work
from benchmarks.gpu.geometry import GEOMETRIES, Geometry, Published
from sjd2_engine.cache import cache_bytes

DTYPE = torch.bfloat16
BATCHES = (1, 4, 16)
HEADERS = ("model", "decoder", "W", "B", "memory, GiB", "step, ms", "s / picture", "GPU hours")


def memory_bytes(geometry: Geometry, batch: int, width: int) -> int:
    """Weights and the cache of whole pictures with guidance; activations and the picture decoder come on top."""
    capacity = geometry.prompt + len(geometry.layout) + width
    weights = core_weights(geometry) + geometry.vocabulary * geometry.core.hidden_size
    return weights * DTYPE.itemsize + cache_bytes(geometry.core, 2 * batch, capacity, 0, DTYPE)


def predict(geometry: Geometry, entry: Published, batch: int, rates: Rates, slack: float, images: int) -> dict:
    """One line of the table; pictures of a batch are at any stage, so a step is that of mid-picture."""
    # The decoder decides the tokens, not the work of a step: any with that window will do.
    config = geometry.config("ar" if entry.window == 1 else "jacobi", entry.window)
    step = slack * step_work(geometry, config, batch, entry.window, DTYPE).floor(rates)
    picture = step * entry.forwards / batch
    return {
        "model": geometry.name, "decoder": entry.method, "window": entry.window, "batch": batch,
        "forwards": entry.forwards, "memory_gib": memory_bytes(geometry, batch, entry.window) / 2**30,
        "step_ms": 1e3 * step, "picture_s": picture, "gpu_hours": picture * images / 3600,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GPU hours of a large run, by arithmetic.")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--copy", type=float, default=3.0, help="TB/s that the GPU copies (assumed: an H100)")
    parser.add_argument("--matmul", type=float, default=600.0, help="TFLOP/s of its matrix products in bfloat16")
    parser.add_argument("--slack", type=float, default=1.25, help="duration of a step over its floor")
    parser.add_argument(
        "--memory", type=float, default=72.0, help="GiB for weights and cache; larger batches are left out"
    )
    given = parser.parse_args(argv)
    rates = Rates(1e12 * given.copy, 1e12 * given.matmul)
    lines: list[dict[str, Any]] = [
        predict(geometry, entry, batch, rates, given.slack, given.images)
        for geometry in GEOMETRIES.values()
        for entry in geometry.published
        for batch in BATCHES
        if memory_bytes(geometry, batch, entry.window) < given.memory * 2**30
    ]
    assumed = f"{given.copy} TB/s, {given.matmul} TFLOP/s, steps of {given.slack} times their floor"
    print(f"Predicted for {given.images:,} pictures, nothing measured: {assumed}\n")
    print("| " + " | ".join(HEADERS) + " |\n|---|---|" + "---:|" * (len(HEADERS) - 2))
    for row in lines:
        print(
            f"| {row['model']} | {row['decoder']} | {row['window']} | {row['batch']} | {row['memory_gib']:.0f} | "
            f"{row['step_ms']:.1f} | {row['picture_s']:.2f} | {row['gpu_hours']:,.0f} |"
        )
    print(json.dumps({"predicted": True, **vars(given), "dtype": "bfloat16", "lines": lines}))


if __name__ == "__main__":
    main()
