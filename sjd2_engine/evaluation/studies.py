"""The measurements of the report beyond the comparison: maps, trajectories, windows × levels, parts taken away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DecodeConfig
from ..engine import Engine
from ..scenes.scene_eval import Verdict, summarise
from .experiments import Decoded, denoise_and_test, denoise_only
from .figures import SweepCell, Variant
from .intervals import Interval, bootstrap, median
from .plots import HUES, OTHER_HUES
from .prompts import Case
from .traces import Trace, cost_map, watch

WATCHED = 16  # pictures for the maps, at most
SWEEP_PROMPTS = 4
MANY = 48  # pictures for shares of right ones, where they cost little
Progress = Callable[[Any], Any]


@dataclass(frozen=True)
class Watched:
    """One decoder's traces over the same pictures as everyone's."""

    label: str
    maps: list[np.ndarray]
    mean: np.ndarray
    first: Trace  # of the first picture


def watch_all(
    contenders: Sequence[tuple[str, Engine, DecodeConfig]],
    cases: Sequence[Case],
    seed: int,
    batch: int,
    progress: Progress,
) -> list[Watched]:
    """Watch every decoder on all cases; fixed windows only, as "auto" has no one width to show."""
    found = []
    for label, engine, config in progress(contenders):
        traces: list[Trace] = []
        for part, seeds in _batches(cases, seed, batch):
            traces += watch(engine, config, [case.text for case in part], seeds)
        maps = [cost_map(engine, [trace]) for trace in traces]
        found.append(Watched(label, maps, cost_map(engine, traces), traces[0]))
    return found


def levels_of(trained: int) -> list[int]:
    """Numbers of levels to try: each one up to one more than trained while they are few, else fifths."""
    if trained <= 5:
        return list(range(1, trained + 2))
    return sorted({max(1, round(trained * part / 5)) for part in range(1, 6)})


def windows_of(default: int) -> list[int]:
    """Windows to try: a quarter of the default, half of it, itself and twice as much."""
    return sorted({max(2, round(default * part)) for part in (0.25, 0.5, 1, 2)})


def sweep_cells(engine: Engine, cases: Sequence[Case], seed: int, progress: Progress) -> list[SweepCell]:
    """SJD2 at every number of levels and window, one picture at a time; the cells take turns."""
    assert engine.model.noise is not None
    windows = windows_of(engine.config_for("sjd2").width)
    shapes = [(k, w) for k in levels_of(engine.model.noise.levels) for w in windows]
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    passes: dict[tuple[int, int], list[int]] = {shape: [] for shape in shapes}
    # The first picture is the warm-up.
    for i in progress([0, *range(min(SWEEP_PROMPTS, len(cases)))]):
        for levels, window in shapes:
            started = time.perf_counter()
            result = engine.generate(cases[i].text, "sjd2", seed=seed + i, denoise_levels=levels, window=window)
            seconds[levels, window].append(time.perf_counter() - started)
            passes[levels, window] += result.stats.forward_passes
    total = len(engine.model.layout)
    return [SweepCell(k, w, median(seconds[k, w][1:]), bootstrap(passes[k, w][1:]).inverse(total)) for k, w in shapes]


@dataclass(frozen=True)
class PartsTaken:
    """Variants of SJD2 for the bars, and pictures of some of them for the grids."""

    variants: dict[str, Variant]
    images: dict[str, list[Image.Image]]


def take_parts(
    engine: Engine, cases: Sequence[Case], seed: int, batch: int, shown: int, progress: Progress
) -> PartsTaken:
    """AR, SJD2, denoising alone with and without its test, with and without normalisation; all on tuned weights."""
    config = engine.config_for("sjd2", verification="match", warmup="noise")
    levels = config.denoise_levels
    ways: dict[str, Callable[[Sequence[str], Sequence[int]], Decoded]] = {
        "AR": lambda texts, seeds: _generated(engine, "ar", texts, seeds),
        "SJD2": lambda texts, seeds: denoise_and_test(engine, config, texts, seeds),
        "SJD2, raw noise": lambda texts, seeds: denoise_and_test(engine, config, texts, seeds, normalised=False),
        "denoising alone": lambda texts, seeds: denoise_only(engine, config, texts, seeds),
        "denoising alone, raw noise": lambda texts, seeds: denoise_only(engine, config, texts, seeds, normalised=False),
    }
    rows, images = {}, {}
    for label, draw in progress(list(ways.items())):
        drawn = [draw([c.text for c in part], seeds) for part, seeds in _batches(cases, seed, batch)]
        tokens, passes = torch.cat([d.tokens for d in drawn]), [n for d in drawn for n in d.forward_passes]
        pictures = [_picture(engine, row) for row in tokens]
        hue = HUES["ar"] if label == "AR" else HUES["sjd2"] if label.startswith("SJD2") else OTHER_HUES[0]
        name = label if label in ("AR",) else f"{label} ({levels} level{'s' * (levels > 1)})"
        rows[label] = Variant(name, bootstrap(passes), share_of(cases, pictures), hue)
        images[label] = pictures[:shown]
    return PartsTaken(rows, images)


def _generated(engine: Engine, decoder: str, texts: Sequence[str], seeds: Sequence[int]) -> Decoded:
    result = engine.generate(texts, decoder, seed=tuple(seeds), max_batch=len(texts))
    if result.failures:
        raise result.failures[0]
    return Decoded(result.tokens, result.stats.forward_passes)


def _batches(cases: Sequence[Case], seed: int, batch: int) -> list[tuple[Sequence[Case], list[int]]]:
    parts = [range(i, min(i + batch, len(cases))) for i in range(0, len(cases), batch)]
    return [(cases[part.start : part.stop], [seed + i for i in part]) for part in parts]


@torch.inference_mode()
def _picture(engine: Engine, tokens: Tensor) -> Image.Image:
    return Image.fromarray(engine.model.decode_pixels(tokens[None].to(engine.device))[0].cpu().numpy())


def share_of(cases: Sequence[Case], pictures: Sequence[Image.Image]) -> Interval | None:
    """The overall SceneEval with its interval; None where nothing can be judged."""
    groups: dict[str, list[Verdict]] = {}
    for case, picture in zip(cases, pictures):
        verdict = case.judge(picture) if case.judge else None
        if verdict is not None:
            groups.setdefault(case.category, []).append(verdict)
    if not groups:
        return None
    score = summarise(groups).overall
    return Interval(score.score, score.low, score.high)
