"""How close is decoding to what this GPU can do? Steps at the sizes of published models, with random weights.

    PYTHONPATH=.:kernels python benchmarks/decode_gpu.py PART [--models NAMES] [--budget SECONDS] [--out FILE]

PART is one of
    steps         time of a captured step for every window and batch, its floor, memory, predicted seconds per picture
    profile       what a step's time is spent on, kernel by kernel, and the gaps between kernels
    transformers  transformers' generate on the same weights in the same run, against the engine
    scenes        the bundled model end to end: every decoder, with and without graphs, tokens compared
    sync          the decoding loop where waiting for the device is an error
    floors        the floors by formula, from --copy and --matmul; needs no GPU
Each ends within --budget seconds: what does not fit is left out, and the document says so; so give every model a run of
its own. --smoke runs everything in sizes that a CPU does at once. The last line of stdout is one JSON document, which
--out holds as well, from the first figures on. Exit status: 0 fine, 1 tokens differ or the host waited, 2 no GPU.
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
from benchmarks.gpu.document import dump, write
from benchmarks.gpu.floors import Rates, measure_rates
from benchmarks.gpu.geometry import GEOMETRIES, Geometry, random_model, tiny
from benchmarks.gpu.run import Run
from sjd2_engine.attention import BACKENDS
from sjd2_engine.evaluation.machine import commit, device_name, versions

BUDGET = 500  # seconds of a part: a command of nine minutes has room for the start, and for one cell too long
MODEL_TAKES = 90.0  # seconds that a model is given at least
PROFILED = ((1, 1), (1, 16), (1, 96), (4, 32), (8, 1))  # (batch, window)
Part = Callable[[Run, Sequence[Geometry], dict[str, Any]], None]
"""Fills the run's results, and the document with what goes for all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if not torch.cuda.is_available() and not options.smoke and options.part != "floors":
        print("decode_gpu needs a CUDA device, and torch sees none: --smoke runs tiny sizes here", file=sys.stderr)
        return 2
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    assumed = Rates(options.copy * 1e9, options.matmul * 1e12)
    run = Run(device, dtype, began + options.budget, options.smoke, options.attention, assumed)
    document: dict[str, Any] = {
        "part": options.part, "device": device_name(device), "dtype": str(dtype).removeprefix("torch."),
        "attention": options.attention, "versions": versions(), "commit": commit(), "smoke": options.smoke,
        "results": run.results, "goals": run.goals, "skipped": run.skipped, "complete": False,
    }  # fmt: skip

    def save() -> None:
        document["seconds"] = round(time.monotonic() - began, 1)
        if options.out:
            dump(document, options.out)

    run.save = save
    PARTS[options.part](run, [GEOMETRIES[name] for name in options.models], document)
    document["complete"] = True
    save()
    write(document)
    return 0 if document.get("passed", True) else 1


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--models", type=names, default=["lumina-mgpt-7b"], help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--attention", choices=("auto", *BACKENDS), default="auto", help="of steps and profile")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds (default {BUDGET})")
    parser.add_argument("--copy", type=float, default=3000.0, help="GB/s that floors assumes (default 3000)")
    parser.add_argument("--matmul", type=float, default=600.0, help="TFLOP/s that floors assumes (default 600)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on whatever there is")
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    """Names of geometries, divided by commas."""
    unknown = [name for name in text.split(",") if name not in GEOMETRIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}: expected {', '.join(GEOMETRIES)}")
    return text.split(",")


def steps(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    rates = measure_rates(run.device, run.dtype, **({"size": 2**16, "side": 64} if run.smoke else {}))
    run.say(f"copy {rates.copy / 1e9:.0f} GB/s, matrix product {rates.matmul / 1e12:.1f} TFLOP/s in {run.dtype}")
    document.update(copy_gb_s=rates.copy / 1e9, matmul_tflop_s=rates.matmul / 1e12)
    sizes = {"widths": (1, 8), "batches": (1, 2)} if run.smoke else {}
    per_model(run, geometries, lambda geometry: decoding.steps(run, geometry, rates, **sizes))


def profile(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    chosen, count = (((1, 1), (2, 8)), 2) if run.smoke else (PROFILED, 10)

    def one(geometry: Geometry) -> None:
        profiling.breakdown(run, geometry, random_model(geometry, run.device, run.dtype), chosen, count)

    per_model(run, geometries, one)


def transformers(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    def one(geometry: Geometry) -> None:
        library.compare(run, geometry, random_model(geometry, run.device, run.dtype), 8 if run.smoke else 200)

    per_model(run, geometries, one)


def scenes(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"decoders": ("jacobi",), "batches": (1,), "repeats": 1} if run.smoke else {}
    document["passed"] = bundled.scenes(run, **sizes)


def sync(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    document["passed"] = bundled.waits(run, ("jacobi",)) if run.smoke else bundled.waits(run)


def floors(run: Run, geometries: Sequence[Geometry], document: dict[str, Any]) -> None:
    assert run.assumed is not None
    document.update(device="none: by formula", dtype="bfloat16")
    document.update(copy_gb_s=run.assumed.copy / 1e9, matmul_tflop_s=run.assumed.matmul / 1e12)
    for geometry in geometries:
        decoding.floors(run, geometry, run.assumed)


def per_model(run: Run, geometries: Sequence[Geometry], part: Callable[[Geometry], None]) -> None:
    """A part for each geometry, as long as there is time; each model's memory is free before the next is made."""
    for geometry in geometries:
        if run.has_time_for(geometry.name, MODEL_TAKES):
            part(tiny(geometry) if run.smoke else geometry)
            run.free()


PARTS: dict[str, Part] = {
    "steps": steps,
    "profile": profile,
    "transformers": transformers,
    "scenes": scenes,
    "sync": sync,
    "floors": floors,
}

if __name__ == "__main__":
    raise SystemExit(main())
