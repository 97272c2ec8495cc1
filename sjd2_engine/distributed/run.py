"""`sjd2 batch` from beginning to end: the folder, the cluster, the crew, the manifest."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BackendError
from . import folder
from .crew import Crew, Member
from .folder import Record
from .plan import Plan
from .prompts import Item
from .worker import Worker

OBJECT_STORE = 100 * 2**20  # bytes; pictures never pass through it
Bar = Callable[[int], Any]


def import_ray() -> Any:
    """Ray with its usage reports off unless somebody switched them on; raises BackendError where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise BackendError("`sjd2 batch` runs on Ray, which is not here; pip install 'sjd2-engine[ray]'") from None
    return ray


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[None]:
    """Be connected to Ray: to the cluster at `address` (or RAY_ADDRESS), else to one on this host for this run alone.

    A connection that is there already is used and left as it is. Raises BackendError.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None and "RAY_ADDRESS" in os.environ:
        address = "auto"
    try:
        if address is None:
            cores = max(workers or 1, len(os.sched_getaffinity(0)))
            ray.init(
                "local", num_cpus=cores, include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet
            )  # fmt: skip
        else:
            ray.init(address, **quiet)
    except Exception as error:  # Ray raises a bare one where its processes take too long to start
        raise BackendError(
            f"no Ray cluster at {address or 'this host'!r} ({' '.join(str(error).split())}); start one with "
            "`ray start --head`, or leave --address out to use this host alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def staff(device: str, workers: int | None, pictures: int) -> tuple[str, int, dict[str, float]]:
    """Device of the workers, how many, and what each takes of the cluster; raises BackendError."""
    ray = import_ray()
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    if device == "cuda" and not gpus and len(ray.nodes()) == 1:
        raise BackendError("device='cuda' was asked for, but Ray sees no GPU on this host")
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    count = workers or max(1, gpus if kind == "cuda" else cpus)
    if workers and workers > (gpus if kind == "cuda" else cpus):
        logging.getLogger(__name__).warning(
            "%d workers need a %s each, and the cluster has %s; the others wait until hosts join",
            workers, "GPU" if kind == "cuda" else "CPU", gpus if kind == "cuda" else cpus,
        )  # fmt: skip
    # Torch uses as many threads as Ray gives the worker CPUs.
    return kind, min(count, pictures), {"num_cpus": 1, "num_gpus": 1 if kind == "cuda" else 0}


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: schedulers send it before they kill."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_batch(
    plan: Plan,
    items: Sequence[Item],
    workers: int | None = None,
    address: str | None = None,
    bar: Bar = lambda count: None,
    worker_class: type[Worker] = Worker,
) -> dict[str, Any]:
    """Draw every item that is not drawn yet and write the manifest; returns the summary, see `summarize`.

    bar: told how many more pictures are there or have failed. Raises ConfigError, CheckpointError, BackendError; and
    KeyboardInterrupt on Ctrl-C and SIGTERM. Whatever ends it, the same call goes on where it stopped.
    """
    with folder.locked(plan.out):
        found = folder.open_run(plan, items)
        bar(len(found))
        todo = [item for item in items if item.index not in found]
        crew = None
        if todo:
            with cluster(address, workers), _terminable():
                device, count, resources = staff(plan.device, workers, len(todo))
                crew = Crew(replace(plan, device=device), todo, count, resources, bar, worker_class)
                try:
                    crew.work()
                finally:
                    crew.dismiss()
        records = {**found, **(crew.records if crew else {})}
        lines = [_line(item, records.get(item.index), crew.errors if crew else {}) for item in items]
        manifest = folder.close_run(plan, lines)
        return summarize(plan, lines, len(found), crew, manifest)


def _line(item: Item, record: Record | None, errors: dict[int, str]) -> Record:
    """An item of the manifest: its prompt, then its picture with figures, or its error."""
    line: Record = {"index": item.index, "id": item.id, "prompt": item.prompt, "seed": item.seed}
    if item.negative_prompt is not None:
        line["negative_prompt"] = item.negative_prompt
    if record is None:
        return {**line, "picture": None, "error": errors[item.index]}
    return {**line, **{name: value for name, value in record.items() if name not in line}}


def summarize(plan: Plan, lines: Sequence[Record], found: int, crew: Crew | None, manifest: Path) -> dict[str, Any]:
    """Figures of a run. seconds and images_per_s: of this run; forward passes and what steps accepted: of all
    pictures of the manifest whose figures are known (not those that only their PNG vouches for)."""
    known = [line for line in lines if "forward_passes" in line]
    accepted: Counter[int] = Counter()
    for line in known:
        accepted.update({int(count): steps for count, steps in line["accepted_per_step"].items()})
    passes = sum(line["forward_passes"] for line in known)
    failed = [{"id": line["id"], "error": line["error"]} for line in lines if line["picture"] is None]
    members = crew.members if crew else []
    drawn, seconds = sum(member.pictures for member in members), crew.seconds if crew else 0.0
    return {
        "model": plan.model_name,
        "decoder": plan.config().decoder,
        "prompts": len(lines),
        "drawn": drawn,
        "kept": len(lines) - len(failed) - drawn,
        "failed": len(failed),
        "seconds": round(seconds, 3),
        "images_per_s": _rate(drawn, seconds),
        "forward_passes_mean": round(passes / len(known), 2) if known else None,
        "step_compression": round(sum(line["tokens"] for line in known) / passes, 3) if passes else None,
        "accepted_per_step": {str(count): accepted[count] for count in sorted(accepted)},
        "workers": [_member(member) for member in members],
        "failures": failed[:100],
        "manifest": str(manifest),
    }


def _member(member: Member) -> dict[str, Any]:
    return {
        "worker": member.number,
        **member.about,
        "pictures": member.pictures,
        "seconds": round(member.seconds, 3),
        "images_per_s": _rate(member.pictures, member.seconds),
        "deaths": member.deaths,
    }


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 4) if seconds else None
