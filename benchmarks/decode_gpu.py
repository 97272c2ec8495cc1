"""How close is decoding to what this GPU can do? Steps at the sizes of published models, with random weights.

    PYTHONPATH=.:kernels python benchmarks/decode_gpu.py PART [--models NAMES] [--budget SECONDS] [--out FILE]

PART is one of
    steps         time of a captured step for every window and batch, its floor, memory, predicted seconds per picture
    profile       what a step's time is spent on, kernel by kernel, and the gaps between kernels
    transformers  transformers' generate on the same weights in the same run, against the engine's AR
    scenes        the bundled model end to end: every decoder, with and without graphs, tokens compared
    sync          the decoding loop where waiting for the device is an error
Each ends within --budget seconds: what does not fit is left out, and the document says so. --smoke runs everything in
sizes that a CPU does at once. The last line of stdout is one JSON document. Exit status: 0 fine, 1 a check failed, 2
no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import bundled, decoding, library, profiling
from benchmarks.gpu.decoding import Run
from benchmarks.gpu.floors import measure_rates
from benchmarks.gpu.geometry import GEOMETRIES, Geometry, random_model, tiny
from benchmarks.gpu_check import commit, versions, write

BUDGET = 520  # seconds of a part: a command of ten minutes has room for the start and the end
PROFILED = ((1, 1), (1, 16), (1, 96), (4, 32), (8, 1))  # (batch, window)


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if not torch.cuda.is_available() and not options.smoke:
        print("decode_gpu needs a CUDA device, and torch sees none: --smoke runs tiny sizes here", file=sys.stderr)
        return 2
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    run = Run(device, dtype, began + options.budget, options.smoke)
    document: dict[str, Any] = {
        "part": options.part,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(),
        "smoke": options.smoke,
        **PARTS[options.part](run, [GEOMETRIES[name] for name in options.models]),
        "skipped": run.skipped,
        "seconds": round(time.monotonic() - began, 1),
    }
    write(document, options.out)
    return 0 if document.get("passed", True) else 1


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--models", type=names, default=["lumina-mgpt-7b"], help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds (default {BUDGET})")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on whatever there is")
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    """Names of geometries, divided by commas."""
    unknown = [name for name in text.split(",") if name not in GEOMETRIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}: expected {', '.join(GEOMETRIES)}")
    return text.split(",")


def steps(run: Run, geometries: Sequence[Geometry]) -> dict[str, Any]:
    rates = measure_rates(run.device, run.dtype, **({"size": 2**16, "side": 64} if run.smoke else {}))
    run.say(f"copy {rates.copy / 1e9:.0f} GB/s, matrix product {rates.matmul / 1e12:.1f} TFLOP/s in {run.dtype}")
    sizes = {"widths": (1, 4, 8), "batches": (1, 2)} if run.smoke else {}
    results = per_model(run, geometries, lambda geometry: decoding.steps(run, geometry, rates, **sizes))
    for result in results:
        for entry in result["predicted"]:
            run.say(
                f"{result['model']} (random weights), predicted: {entry['method']}, {entry['forwards']} forwards of "
                f"{entry['step_ms']:.2f} ms (W={entry['window']}): {entry['predicted_s']:.2f} s"
            )
    return {"copy_gb_s": rates.copy / 1e9, "matmul_tflop_s": rates.matmul / 1e12, "results": results}


def profile(run: Run, geometries: Sequence[Geometry]) -> dict[str, Any]:
    chosen = ((1, 1), (2, 8)) if run.smoke else PROFILED

    def one(geometry: Geometry) -> dict[str, Any]:
        model = random_model(geometry, run.device, run.dtype)
        cells = profiling.breakdown(run, geometry, model, chosen, 2 if run.smoke else 10)
        return {"model": geometry.name, "weights": "random", "cells": cells}

    return {"results": per_model(run, geometries, one)}


def transformers(run: Run, geometries: Sequence[Geometry]) -> dict[str, Any]:
    def one(geometry: Geometry) -> dict[str, Any]:
        model = random_model(geometry, run.device, run.dtype)
        return library.compare(run, geometry, model, 8 if run.smoke else 200)

    return {"results": per_model(run, geometries, one)}


def scenes(run: Run, geometries: Sequence[Geometry]) -> dict[str, Any]:
    sizes: dict[str, Any] = {"decoders": ("jacobi",), "batches": (1,), "repeats": 1} if run.smoke else {}
    return bundled.scenes(run, **sizes)


def sync(run: Run, geometries: Sequence[Geometry]) -> dict[str, Any]:
    return bundled.waits(run, ("jacobi",)) if run.smoke else bundled.waits(run)


def per_model(run: Run, geometries: Sequence[Geometry], part: Callable[[Geometry], Any]) -> list[Any]:
    """A part for each geometry, as long as there is time; each model's memory is free before the next is made."""
    results = []
    for geometry in geometries:
        if run.has_time_for(geometry.name, 0 if run.smoke else 90):
            results.append(part(tiny(geometry) if run.smoke else geometry))
            run.free()
    return results


PARTS: dict[str, Callable[[Run, Sequence[Geometry]], dict[str, Any]]] = {
    "steps": steps,
    "profile": profile,
    "transformers": transformers,
    "scenes": scenes,
    "sync": sync,
}

if __name__ == "__main__":
    raise SystemExit(main())
