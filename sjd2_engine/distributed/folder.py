"""The output folder of a batch: pictures, a log per worker while it runs, a manifest when it is done."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import png_facts, replace_file
from .plan import Plan
from .prompts import Item

Record = dict[str, Any]  # of a finished picture: "picture", "key", and figures of its decode
STATE, MANIFEST = ".batch", "manifest.jsonl"
logger = logging.getLogger(__name__)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other drivers out of a folder; raises ConfigError if one is there. A killed driver holds no lock."""
    state = out / STATE
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another `sjd2 batch` is writing to '{out}'; wait for it or choose another --out"
            ) from None
        except OSError as error:
            logger.warning("'%s' cannot be locked (%s): see to it that no second run writes there", out, error)
        yield


def log_path(plan: Plan, worker: str) -> Path:
    return plan.out / STATE / plan.run / f"{worker}.jsonl"


def append(file: int, record: Record) -> None:
    """One line, on the disk when this returns."""
    os.write(file, (json.dumps(record) + "\n").encode())
    os.fsync(file)


def read_records(path: Path) -> Iterator[Record]:
    """The whole lines of a log or manifest; the last one may have been cut by a kill."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for raw in file:
            try:
                record = json.loads(raw)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def open_run(plan: Plan, items: Iterable[Item]) -> dict[int, Record]:
    """Find what is drawn already, and make the folder ready for the rest; records by index of the item.

    A line of a log or manifest counts if its picture is there; a picture without one says itself how it was made.
    Afterwards one log holds every line that stays true, and nothing else does: a picture that is about to be replaced
    by one of other settings must not be vouched for by an old line.
    """
    state = plan.out / STATE
    logs = [path for path in sorted(state.glob("*/*.jsonl"))]
    records = {r["picture"]: r for path in [plan.out / MANIFEST, *logs] for r in read_records(path) if r.get("picture")}
    there = _pictures(plan.out)
    found: dict[int, Record] = {}
    replaced: set[str] = set()
    for item in items:
        picture = plan.picture(item)
        if picture not in there:
            replaced.add(picture)
            continue
        record, key = records.get(picture), plan.key(item)
        if record is not None and record.get("key") == key:
            found[item.index] = record
        elif png_facts(plan.out / picture) == plan.facts(item):
            found[item.index] = {"picture": picture, "key": key}
        else:
            replaced.add(picture)
    true = {
        **{name: r for name, r in records.items() if name not in replaced},
        **{r["picture"]: r for r in found.values()},
    }
    run = state / plan.run
    run.mkdir(parents=True)
    replace_file(run / "before.jsonl", "".join(json.dumps(record) + "\n" for record in true.values()))
    _forget(logs)
    (plan.out / MANIFEST).unlink(missing_ok=True)
    return found


def close_run(plan: Plan, lines: Iterable[Record]) -> Path:
    """Write the manifest, which then holds everything the logs say, and remove the logs."""
    path = replace_file(plan.out / MANIFEST, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    _forget(sorted((plan.out / STATE).glob("*/*.jsonl")))
    return path


def _forget(logs: Iterable[Path]) -> None:
    for path in logs:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty yet
            path.parent.rmdir()


def _pictures(out: Path) -> set[str]:
    """Names, within `out`, of the pictures that are there; what killed workers left half-written is removed."""
    found = set()
    for folder in out.iterdir():
        if not (folder.name.isdigit() and folder.is_dir()):
            continue
        for entry in os.scandir(folder):
            if entry.name.endswith(".png"):
                found.add(f"{folder.name}/{entry.name}")
            elif entry.name.startswith(".") and entry.name.endswith(".tmp"):
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)
    return found
