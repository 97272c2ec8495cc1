"""The comparison of decoders: the same prompts and seeds under each of them, whole decodes, taking turns."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import DecodeConfig
from ..engine import Engine, Result
from ..files import picture_facts, picture_path, save_png, slug
from ..scenes.scene_eval import Verdict
from ..scenes.scene_eval import summarise as summarise_verdicts
from . import machine, plots, results
from .prompts import Case
from .results import BenchResult, DecoderResult
from .specs import DecoderSpec

GRID_ROWS = 8  # prompts shown in the image grid
Progress = Callable[[Any], Any]  # wraps what is looped over


@dataclass(frozen=True)
class Run:
    """One timed decode of one batch of prompts."""

    repeat: int
    cases: tuple[int, ...]
    latency_s: float
    forward_passes: tuple[int, ...]
    peak_memory_bytes: int


@dataclass
class Contender:
    """A decoder in the comparison with everything measured of it."""

    spec: DecoderSpec
    engine: Engine
    config: DecodeConfig
    runs: list[Run] = field(default_factory=list)
    accepted: Counter[int] = field(default_factory=Counter)
    tokens_per_image: int = 0
    tokens: dict[int, Tensor] = field(default_factory=dict)
    images: dict[int, Image.Image] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Folder name of this row's pictures."""
        return "_".join(slug(part) for part in (self.spec.name, self.spec.weights))


@dataclass(frozen=True)
class Plan:
    """How to run the comparison."""

    cases: Sequence[Case]
    seed: int = 0
    batch: int = 1
    warmup: int = 1
    repeats: int = 1

    def batches(self) -> list[tuple[int, ...]]:
        """Indices of the cases, `batch` at a time."""
        every = tuple(range(len(self.cases)))
        return [every[i : i + self.batch] for i in every[:: self.batch]]


def contenders(specs: Sequence[DecoderSpec], engines: dict[str, Engine]) -> list[Contender]:
    """Resolve every spec to an engine and a checked config, before anything is decoded."""
    used = [(spec, engines[spec.weights]) for spec in specs]
    return [Contender(spec, engine, engine.config_for(spec.decoder, **dict(spec.options))) for spec, engine in used]


def run(plan: Plan, rows: Sequence[Contender], out: Path, progress: Progress = iter) -> BenchResult:
    """Run the comparison, write everything under `out` and return the results."""
    for _ in range(plan.warmup):
        for row in rows:
            _decode(row, plan, plan.batches()[0])
    for repeat, cases, row in progress(list(_turns(plan, rows))):
        _measure(row, plan, repeat, cases, out)
    result = summarise(plan, rows)
    _write(plan, rows, result, out)
    return result


def _turns(plan: Plan, rows: Sequence[Contender]) -> Iterator[tuple[int, tuple[int, ...], Contender]]:
    """Every decoder once per batch; who goes first rotates, so that none always follows the same one."""
    shift = 0
    for repeat in range(plan.repeats):
        for cases in plan.batches():
            for i in range(len(rows)):
                yield repeat, cases, rows[(i + shift) % len(rows)]
            shift += 1


def _decode(row: Contender, plan: Plan, cases: Sequence[int]) -> tuple[Result, float]:
    texts, seeds = [plan.cases[i].text for i in cases], [plan.seed + i for i in cases]
    options = {"max_batch": plan.batch, **dict(row.spec.options)}
    machine.reset_peak_memory()
    start = time.perf_counter()
    result = row.engine.generate(texts, row.spec.decoder, seed=seeds, **options)
    seconds = time.perf_counter() - start
    if result.failures:
        raise result.failures[0]
    return result, seconds


def _measure(row: Contender, plan: Plan, repeat: int, cases: tuple[int, ...], out: Path) -> None:
    result, seconds = _decode(row, plan, cases)
    stats = result.stats
    row.runs.append(Run(repeat, cases, seconds, tuple(stats.forward_passes), stats.peak_memory_bytes))
    row.accepted.update(stats.accepted_per_step)
    row.tokens_per_image = stats.tokens
    if repeat:
        return  # the same seeds again: same pictures
    for i, image, tokens in zip(cases, result.images, result.tokens):
        assert image is not None  # a failed one has been raised
        case = plan.cases[i]
        row.tokens[i] = tokens.cpu()
        if i < GRID_ROWS:
            row.images[i] = image
        verdict = case.judge(image) if case.judge else None
        if verdict is not None:
            row.verdicts[i], row.categories[i] = verdict, case.category
        seed = plan.seed + i
        facts = picture_facts(case.text, seed, row.engine.model_name, row.config)
        save_png(image, picture_path(out / "images" / row.key, i, case.text, seed), facts)


def summarise(plan: Plan, rows: Sequence[Contender]) -> BenchResult:
    """Means, medians and ratios of what was measured."""
    base = {row.spec.weights: row for row in rows if row.spec.decoder == "ar" and not row.spec.options}
    device = rows[0].engine.device
    return BenchResult(
        model=rows[0].engine.model_name,
        device=machine.device_name(device),
        dtype=", ".join([str(rows[0].engine.dtype).removeprefix("torch."), *rows[0].engine.loaded_with]),
        commit=machine.commit(),
        versions=machine.versions(),
        prompts=len(plan.cases),
        seed=plan.seed,
        decoders=[_row(plan, row, base[row.spec.weights]) for row in rows],
    )


def _row(plan: Plan, row: Contender, base: Contender) -> DecoderResult:
    forwards = statistics.mean(n for run in row.runs for n in run.forward_passes)
    seconds = [run.latency_s for run in row.runs]
    images = sum(len(run.cases) for run in row.runs)
    return DecoderResult(
        name=row.spec.name,
        weights=row.spec.weights,
        exact=row.config.exact,
        window=row.config.width,
        forward_passes_mean=float(forwards),
        tokens=row.tokens_per_image,
        step_compression=row.tokens_per_image / forwards,
        latency_s_mean=statistics.mean(seconds),
        latency_s_median=statistics.median(seconds),
        speedup_vs_ar=statistics.median(run.latency_s for run in base.runs) / statistics.median(seconds),
        images_per_s=images / sum(seconds),
        peak_memory_bytes=max(run.peak_memory_bytes for run in row.runs),
        accepted_per_step={str(k): row.accepted[k] for k in sorted(row.accepted)},
        scene_eval=_scene_eval(plan, row),
    )


def _scene_eval(plan: Plan, row: Contender) -> dict[str, float]:
    groups: dict[str, list[Verdict]] = {}
    for i, verdict in sorted(row.verdicts.items()):
        groups.setdefault(plan.cases[i].category, []).append(verdict)
    return summarise_verdicts(groups).as_dict() if groups else {}


def agreement(rows: Sequence[Contender]) -> dict[str, tuple[int, int]]:
    """Of the decoders that promise AR's own tokens: label -> (pictures that have them, pictures)."""
    found = {}
    for row in rows:
        base = next(r for r in rows if r.spec.decoder == "ar" and r.spec.weights == row.spec.weights)
        config = row.config
        if config.decoder == "jacobi" or (config.decoder == "sjd2" and config.verification == "match"):
            same = sum(torch.equal(tokens, base.tokens[i]) for i, tokens in row.tokens.items())
            found[f"{row.spec.name} ({row.spec.weights} weights)"] = (same, len(row.tokens))
    return found


def _write(plan: Plan, rows: Sequence[Contender], result: BenchResult, out: Path) -> None:
    same = ", ".join(f"{label} {n} of {total}" for label, (n, total) in agreement(rows).items())
    figures = plots.draw_all(result, out / "plots")
    headers = {row.key: plots.row_label(data) for row, data in zip(rows, result.decoders)}
    pictures = {row.key: [row.images[i] for i in sorted(row.images)] for row in rows}
    captions = [case.text for case in plan.cases[:GRID_ROWS]]
    plots.image_grid(captions, pictures, out / "grid.png", headers)
    notes = [
        f"batch {plan.batch}, {plan.repeats} timed decode(s) per prompt, prompt i with seed {plan.seed} + i.",
        f"pictures with exactly the tokens of AR on the same weights and seed: {same}." if same else "",
    ]
    results.write(result, out, [note for note in notes if note], [*figures, out / "grid.png"])
    results.write_runs(_records(plan, rows), out / "runs.jsonl")


def _records(plan: Plan, rows: Sequence[Contender]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for run in row.runs:
            yield {
                "decoder": row.spec.name,
                "weights": row.spec.weights,
                "repeat": run.repeat,
                "prompts": [plan.cases[i].text for i in run.cases],
                "seeds": [plan.seed + i for i in run.cases],
                "latency_s": run.latency_s,
                "forward_passes": list(run.forward_passes),
                "peak_memory_bytes": run.peak_memory_bytes,
                "right": [row.verdicts[i].correct for i in run.cases if i in row.verdicts],
            }
