"""window="auto" against every fixed width, on the bundled model on the CPU.

    PYTHONPATH=.:kernels python benchmarks/auto_window.py [--prompts N] [--windows 8,16,…] [--out FILE]

One picture at a time; every arm has an engine of its own, so that "auto" explores in the measured time, and the arms
take turns with every prompt, each time another one first. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu.document import write
from sjd2_engine import Engine
from sjd2_engine.config import AUTO
from sjd2_engine.evaluation.machine import commit, device_name, versions
from sjd2_engine.evaluation.prompts import scene_cases

WEIGHTS = {"jacobi": "scenes", "coupled": "scenes", "sjd2": "scenes-sjd2"}
WINDOWS = (8, 12, 16, 24, 32, 48, 64, 96)
SEED = 1000  # of the prompts: those that docs/performance.md reports windows on


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--decoders", default=",".join(WEIGHTS), help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)), help="fixed widths")
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    options = parser.parse_args(argv)
    prompts = [case.text for case in scene_cases(options.prompts, SEED)]
    windows = [int(width) for width in options.windows.split(",")]
    results = {decoder: compare(decoder, prompts, windows) for decoder in options.decoders.split(",")}
    print_table(results)
    document = {
        "device": device_name("cpu"), "threads": torch.get_num_threads(), "versions": versions(), "commit": commit(),
        "prompts": len(prompts), "decoders": results,
    }  # fmt: skip
    write(document, options.out)
    return 0


def compare(decoder: str, prompts: Sequence[str], windows: Sequence[int]) -> dict[str, Any]:
    """Seconds of every picture by arm, and what "auto" costs against the best fixed width."""
    arms: list[int | str] = [AUTO, *windows]
    throwaway = Engine.from_pretrained(WEIGHTS[decoder], device="cpu")
    for width in windows:  # the library chooses its kernels with the first products of a size
        throwaway.generate(prompts[0], decoder, window=width)
    engines = {arm: Engine.from_pretrained(WEIGHTS[decoder], device="cpu") for arm in arms}
    seconds: dict[int | str, list[float]] = {arm: [] for arm in arms}
    passes: dict[int | str, list[int]] = {arm: [] for arm in arms}
    for turn, prompt in enumerate(tqdm(prompts, desc=decoder, file=sys.stderr)):
        first = turn % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            stats = engines[arm].generate(prompt, decoder, window=arm, seed=turn).stats
            seconds[arm].append(stats.latency_s)
            passes[arm] += stats.forward_passes
    median = {arm: statistics.median(times) for arm, times in seconds.items()}
    total = {arm: sum(times) for arm, times in seconds.items()}
    # What exploring costs is paid once; the later half is what a longer run goes on with.
    later = {arm: sum(times[len(times) // 2 :]) for arm, times in seconds.items()}
    best, *others = (min(windows, key=lambda width, of=of: of[width]) for of in (median, total, later))
    return {
        "model": WEIGHTS[decoder],
        "seconds": {str(arm): times for arm, times in seconds.items()},
        "forward_passes": {str(arm): statistics.mean(counts) for arm, counts in passes.items()},
        "median_s": {str(arm): value for arm, value in median.items()},
        "total_s": {str(arm): value for arm, value in total.items()},
        "best_window": best,
        "auto_over_best_median": median[AUTO] / median[best],
        "auto_over_best_total": total[AUTO] / total[others[0]],
        "auto_over_best_later": later[AUTO] / later[others[1]],
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'decoder':8} {'window':>6} {'median s':>9} {'total s':>8} {'passes':>7}")
    for decoder, found in results.items():
        for arm, median in found["median_s"].items():
            passes = found["forward_passes"][arm]
            print(f"{decoder:8} {arm:>6} {median:9.3f} {found['total_s'][arm]:8.2f} {passes:7.1f}")
        print(
            f"{decoder:8} auto over the best fixed width: {found['auto_over_best_median']:.3f} by medians "
            f"(W={found['best_window']}), {found['auto_over_best_total']:.3f} by totals, "
            f"{found['auto_over_best_later']:.3f} by totals of the later half"
        )


if __name__ == "__main__":
    raise SystemExit(main())
