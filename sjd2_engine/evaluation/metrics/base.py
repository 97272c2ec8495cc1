"""What a metric is: pictures in, findings out; and files of scores that a killed run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..prompts import Case
from ..records import append_record, read_records

Progress = Callable[[Any], Any]  # wraps what is looped over


@dataclass(frozen=True)
class Picture:
    """A drawn picture on disk: the case it was drawn for, its place in the run, its place among the case's samples."""

    index: int
    case: Case
    sample: int
    path: Path

    def open(self) -> Image.Image:
        """The picture as RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was measured, as people read it."""

    what: str
    count: str
    value: str
    interval: str = "–"


@dataclass(frozen=True)
class MetricResult:
    """What a metric found: figures for the JSON document, lines for the table, notes below it."""

    values: dict[str, Any]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)


class Metric(Protocol):
    """A way to score pictures. `settings` must be the same when a run goes on."""

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...

    def check(self, cases: Sequence[Case], family: str) -> None:
        """Raise ConfigError where these prompts, or pictures of a model of this family, cannot be scored."""

    def score(self, pictures: Sequence[Picture], out: Path, progress: Progress) -> MetricResult:
        """Score the pictures, keeping what is worth keeping under `out`."""
        ...


def score_each(
    pictures: Sequence[Picture],
    path: Path,
    score: Callable[[Sequence[Picture]], Iterable[dict[str, Any]]],
    progress: Progress,
    batch: int = 16,
) -> list[dict[str, Any]]:
    """One record per picture, in their order: those in the file at `path`, and the others made by `score` and appended.

    `score` gives one record for each picture of a batch.
    """
    known = {record["index"]: record for record in read_records(path)}
    todo = [picture for picture in pictures if picture.index not in known]
    for start in progress(range(0, len(todo), batch)):
        part = todo[start : start + batch]
        for picture, scored in zip(part, score(part), strict=True):
            record = {"index": picture.index, "id": picture.case.id, "prompt": picture.case.text, **scored}
            append_record(path, record)
            known[picture.index] = record
    return [known[picture.index] for picture in pictures]
