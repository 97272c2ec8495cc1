"""Draw pictures of many prompts and score them, for any model; a run that is killed goes on where it was.

images.jsonl      one record per picture, appended when the picture is on the disk
scene_eval.jsonl  one verdict per picture; likewise clip.jsonl
settings.json     what must not change when the run goes on
evaluation.json   the document that the command prints; evaluation.md for people
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import DecodeConfig
from ..engine import Engine
from ..errors import ConfigError
from ..files import picture_facts, picture_path, replace_file, save_png, settings_of
from . import machine
from .metrics import Metric, MetricResult, Picture
from .prompts import Case
from .records import append_record, read_records

HEADERS = ("metric", "what", "pictures", "value", "95 % interval")
RECORDS, SETTINGS = "images.jsonl", "settings.json"


@dataclass(frozen=True)
class Evaluation:
    """The scores of one decoder on one model."""

    settings: dict[str, Any]
    pictures: int
    forward_passes_mean: float
    metrics: dict[str, MetricResult]
    versions: dict[str, str]
    device: str
    commit: str

    def to_json(self, indent: int | None = None) -> str:
        """The document of `evaluation.json`; without an indent it is one line."""
        document = {**asdict(self), "metrics": {name: result.values for name, result in self.metrics.items()}}
        return json.dumps(document, indent=indent, ensure_ascii=False)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, under `HEADERS`."""
        return [
            (name, line.what, line.count, line.value, line.interval)
            for name, result in self.metrics.items()
            for line in result.findings
        ]

    def to_markdown(self) -> str:
        """The table with what it was measured on."""
        said = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        notes = [note for result in self.metrics.values() for note in result.notes]
        return "\n".join(
            [
                f"# `{self.settings['model']}`, {self.pictures} pictures",
                "",
                f"{said}; {self.device}; commit {self.commit}.",
                "",
                "| " + " | ".join(HEADERS) + " |",
                "|---|---|---:|---:|---:|",
                *("| " + " | ".join(cells) + " |" for cells in self.rows()),
                "",
                *(f"- {note}." for note in notes),
                f"- forward passes per image: {self.forward_passes_mean:.1f}.",
                "",
            ]
        )


@dataclass(frozen=True)
class Job:
    """What to draw: every case `samples` times, sample j of case i as picture i · samples + j."""

    engine: Engine
    cases: Sequence[Case]
    out: Path
    seed: int = 0
    samples: int = 1

    @property
    def count(self) -> int:
        return len(self.cases) * self.samples

    def case(self, index: int) -> Case:
        """The prompt of a picture."""
        return self.cases[index // self.samples]

    def picture_seed(self, index: int) -> int:
        """The case's own seed + its sample, else the run's seed + the picture's place."""
        own = self.case(index).seed
        return self.seed + index if own is None else own + index % self.samples

    def path(self, index: int) -> Path:
        """Where a picture lies."""
        return picture_path(self.out / "images", index, self.case(index).text, self.picture_seed(index))


def evaluate(
    job: Job,
    metrics: Sequence[Metric],
    decoder: str | None = None,
    batch: int = 1,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], Callable[[Any], Any]] = lambda label: iter,
) -> Evaluation:
    """Draw every picture not drawn yet, score all, and write the tables.

    progress: from a label to something that wraps what is looped over. Raises ConfigError, before anything is drawn,
    when the folder holds a run made otherwise or a metric cannot score these prompts.
    """
    engine, options = job.engine, options or {}
    config = engine.config_for(decoder, **options)
    for metric in metrics:
        metric.check(job.cases, engine.model.family)
    settings = {"model": engine.model_name, "seed": job.seed, "samples": job.samples, **settings_of(config)}
    _check_settings(job.out, settings, {metric.name: metric.settings for metric in metrics})
    done = _drawn(job)
    todo = [index for index in range(job.count) if index not in done]
    for start in progress("draw")(range(0, len(todo), batch)):
        _draw(job, todo[start : start + batch], config, options)
    done = _drawn(job)
    pictures = [Picture(i, job.case(i), i % job.samples, job.path(i)) for i in range(job.count)]
    found = {metric.name: metric.score(pictures, job.out, progress(metric.name)) for metric in metrics}
    result = Evaluation(
        settings=settings,
        pictures=job.count,
        forward_passes_mean=sum(done[i]["forward_passes"] for i in range(job.count)) / job.count,
        metrics=found,
        versions=machine.versions(),
        device=machine.device_name(engine.device),
        commit=machine.commit(),
    )
    replace_file(job.out / "evaluation.json", result.to_json(indent=2) + "\n")
    replace_file(job.out / "evaluation.md", result.to_markdown())
    return result


def _check_settings(out: Path, settings: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> None:
    """Compare with the settings of an earlier run in this folder; a metric may be new, not different."""
    path = out / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before:
        held = {**before["drawing"], **{f"{m}: {k}": v for m, s in before["metrics"].items() for k, v in s.items()}}
        given = {**settings, **{f"{m}: {k}": v for m, s in metrics.items() for k, v in s.items()}}
        unasked = {f"{m}: {k}" for m, s in before["metrics"].items() if m not in metrics for k in s}
        changed = [k for k in sorted({*held, *given} - unasked) if k in held and held[k] != given.get(k)]
        changed += [k for k in settings if k not in before["drawing"]]
        if changed:
            told = "; ".join(f"{k} was {held.get(k)!r}, is {given.get(k)!r}" for k in changed)
            raise ConfigError(f"'{out}' holds an evaluation made otherwise ({told}); choose another --out")
    document = {"drawing": settings, "metrics": {**before.get("metrics", {}), **metrics}}
    replace_file(path, json.dumps(document, indent=2) + "\n")


def _drawn(job: Job) -> dict[int, dict[str, Any]]:
    """Records of pictures that are on the disk, by index."""
    known = {}
    for record in read_records(job.out / RECORDS):
        index = record["index"]
        if index >= job.count:
            continue
        wanted = (job.case(index).text, job.picture_seed(index))
        if (record["prompt"], record["seed"]) != wanted:
            raise ConfigError(
                f"picture {index} in '{job.out}' is of {record['prompt']!r} with seed {record['seed']}, now asked "
                f"for is {wanted[0]!r} with seed {wanted[1]}; choose another --out"
            )
        if job.path(index).exists():
            known[index] = record
    return known


def _draw(job: Job, chosen: Sequence[int], config: DecodeConfig, options: dict[str, Any]) -> None:
    texts, seeds = [job.case(i).text for i in chosen], [job.picture_seed(i) for i in chosen]
    result = job.engine.generate(texts, config.decoder, seed=seeds, **{**options, "max_batch": len(chosen)})
    for i, image, forwards in zip(chosen, result.images, result.stats.forward_passes):
        if image is None:
            continue
        case, seed = job.case(i), job.picture_seed(i)
        save_png(image, job.path(i), picture_facts(case.text, seed, job.engine.model_name, config))
        record = {
            "index": i,
            "id": case.id,
            "prompt": case.text,
            "category": case.category,
            "seed": seed,
            "sample": i % job.samples,
            "metadata": dict(case.metadata),
            "file": job.path(i).relative_to(job.out).as_posix(),
            "forward_passes": forwards,
        }
        append_record(job.out / RECORDS, record)
    if result.failures:
        raise result.failures[0]
