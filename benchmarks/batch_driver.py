"""What the driver of `sjd2 batch` does by itself with very many prompts: `python benchmarks/batch_driver.py`.

Reads the prompts, opens a fresh folder, then opens it again as if every picture were drawn, which is what a run that
goes on has to do. Pictures are empty files: a picture with a line in the manifest is not opened. The last line of
stdout is one JSON document: seconds of CPU time for each part, and the peak of the process's memory so far.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sjd2_engine.distributed import folder
from sjd2_engine.distributed.plan import Plan, make_plan
from sjd2_engine.distributed.prompts import Item, read_items
from sjd2_engine.evaluation.machine import commit, device_name, versions
from sjd2_engine.evaluation.prompts import scene_cases

CAPTIONS = 1000  # different ones; they are repeated, and every line has a seed of its own
FIGURES = {"forward_passes": 49, "tokens": 272, "accepted_per_step": {"1": 20, "2": 5, "4": 9, "9": 6, "16": 8}}


def timed(parts: dict[str, Any], name: str, work: Callable[..., Any], *args: Any) -> Any:
    start = time.process_time()
    result = work(*args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB
    parts[name] = {"cpu_s": round(time.process_time() - start, 2), "peak_mib": round(memory)}
    print(name, parts[name], flush=True)
    return result


def opened(plan: Plan, items: list[Item]) -> int:
    with folder.locked(plan.out):
        return len(folder.open_run(plan, items))


def pretend(plan: Plan, items: list[Item]) -> int:
    """Leave the folder as a finished run does; returns the size of the manifest in bytes."""
    for name in sorted({plan.picture(item).split("/")[0] for item in items}):
        (plan.out / name).mkdir()
    for item in items:
        (plan.out / plan.picture(item)).touch()
    lines = (
        {
            "index": item.index, "id": item.id, "prompt": item.prompt, "seed": item.seed,
            "picture": plan.picture(item), "key": plan.key(item), **FIGURES,
        }
        for item in items
    )  # fmt: skip
    return folder.close_run(plan, lines).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="The driver of `sjd2 batch` with very many prompts.")
    parser.add_argument("--prompts", type=int, default=1_000_000)
    given = parser.parse_args()
    captions = [case.text for case in scene_cases(CAPTIONS, 0)]
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        prompts, out = Path(place) / "prompts.txt", Path(place) / "out"
        prompts.write_text("".join(f"{captions[i % CAPTIONS]}\n" for i in range(given.prompts)))
        first, second = (make_plan("scenes-sjd2", out, run, decoder="jacobi") for run in ("first", "second"))
        items = timed(parts, "read", read_items, prompts)
        assert timed(parts, "open", opened, first, items) == 0
        size = timed(parts, "finish", pretend, first, items)
        assert timed(parts, "resume", opened, second, items) == given.prompts
    print(json.dumps({
        "device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit(),
        "prompts": given.prompts, "manifest_bytes": size, **parts,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
