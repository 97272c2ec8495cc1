"""SceneEval over many prompts: how often the picture shows what its prompt says, with 95 % intervals.

Every verdict is appended to `images.jsonl` as soon as it is there; a run that is killed goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import DecodeConfig
from ..engine import Engine
from ..errors import ConfigError
from ..files import picture_facts, picture_path, replace_file, save_png, settings_of
from ..scenes.scene_eval import Score, Summary, Verdict, summarise
from . import machine
from .prompts import Case

HEADERS = ("category", "right", "share", "95 % interval")
RECORDS, SETTINGS = "images.jsonl", "settings.json"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Evaluation:
    """The scores of one decoder on one model."""

    settings: dict[str, Any]
    scores: Summary
    forward_passes_mean: float
    versions: dict[str, str]
    device: str
    commit: str

    def to_json(self, indent: int | None = None) -> str:
        """The document of `scene_eval.json`; without an indent it is one line."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table: category, pictures, share, interval."""
        shares: dict[str, Score] = {**self.scores.categories, "overall": self.scores.overall}
        return [
            (name, f"{s.correct} of {s.total}", _percent(s.score), f"{_percent(s.low)} – {_percent(s.high)}")
            for name, s in shares.items()
        ]

    def to_markdown(self) -> str:
        """The table with what it was measured on."""
        said = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        table = ["| " + " | ".join(cells) + " |" for cells in self.rows()]
        return "\n".join(
            [
                f"# SceneEval of `{self.settings['model']}`",
                "",
                f"{said}; {self.device}; commit {self.commit}.",
                "",
                "| " + " | ".join(HEADERS) + " |",
                "|---|---:|---:|---:|",
                *table,
                "",
                "- overall: mean of the categories' shares, as in GenEval; intervals: Wilson's per category.",
                f"- forward passes per image: {self.forward_passes_mean:.1f}.",
                "",
            ]
        )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The scored pictures of an earlier run; a last line cut short by a kill is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(
                    f"line {number} of '{path}' is damaged ({error}); remove it or choose another --out"
                ) from error
            replace_file(path, "".join(f"{kept}\n" for kept in lines[:-1]))
    return records


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if changed:
            told = "; ".join(f"{k} was {before.get(k)!r}, is {settings.get(k)!r}" for k in changed)
            raise ConfigError(f"'{out}' holds an evaluation made otherwise ({told}); choose another --out")
    else:
        replace_file(path, json.dumps(settings, indent=2) + "\n")


def evaluate(
    engine: Engine,
    cases: Sequence[Case],
    decoder: str | None,
    out: Path,
    seed: int = 0,
    batch: int = 1,
    options: dict[str, Any] | None = None,
    progress: Callable[[Any], Any] = iter,
) -> Evaluation:
    """Draw and score every case not scored yet, prompt i with seed + i, and write the tables under `out`."""
    options = options or {}
    config = engine.config_for(decoder, **options)
    settings = {"model": engine.model_name, "seed": seed, **settings_of(config)}
    _check_settings(out, settings)
    done = {record["index"] for record in read_records(out / RECORDS)}
    todo = [i for i in range(len(cases)) if i not in done]
    for start in progress(range(0, len(todo), batch)):
        _score_batch(engine, cases, todo[start : start + batch], config, out, seed, options)
    records = [r for r in read_records(out / RECORDS) if r["index"] < len(cases)]
    result = _summary(engine, settings, sorted(records, key=lambda r: r["index"]))
    replace_file(out / "scene_eval.json", result.to_json(indent=2) + "\n")
    replace_file(out / "scene_eval.md", result.to_markdown())
    return result


def _score_batch(
    engine: Engine,
    cases: Sequence[Case],
    chosen: Sequence[int],
    config: DecodeConfig,
    out: Path,
    seed: int,
    options: dict[str, Any],
) -> None:
    seeds = [seed + i for i in chosen]
    options = {**options, "max_batch": len(chosen)}
    result = engine.generate([cases[i].text for i in chosen], config.decoder, seed=seeds, **options)
    if result.failures:
        raise result.failures[0]
    for i, image, forwards in zip(chosen, result.images, result.stats.forward_passes):
        assert image is not None  # a failed one has been raised
        verdict = _judged(cases[i], image, engine.model_name)
        facts = picture_facts(cases[i].text, seed + i, engine.model_name, config)
        save_png(image, picture_path(out / "images", i, cases[i].text, seed + i), facts)
        record = {
            "index": i,
            "prompt": cases[i].text,
            "category": cases[i].category,
            "seed": seed + i,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "forward_passes": forwards,
        }
        with open(out / RECORDS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _judged(case: Case, image: Image.Image, model: str) -> Verdict:
    verdict = case.judge(image) if case.judge else None
    if verdict is None:
        raise ConfigError(
            f"SceneEval cannot judge pictures of '{model}' ({image.width}x{image.height} pixels); "
            "it reads those of the bundled models"
        )
    return verdict


def _summary(engine: Engine, settings: dict[str, Any], records: list[dict[str, Any]]) -> Evaluation:
    groups: dict[str, list[Verdict]] = {}
    for record in records:
        groups.setdefault(record["category"], []).append(Verdict(record["correct"], record["reason"]))
    return Evaluation(
        settings=settings,
        scores=summarise(groups),
        forward_passes_mean=sum(r["forward_passes"] for r in records) / max(len(records), 1),
        versions=machine.versions(),
        device=machine.device_name(engine.device),
        commit=machine.commit(),
    )
