"""The report: one HTML page that needs nothing beside it, its figures as PNGs, its numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import AUTO
from ..engine import Engine
from ..files import replace_file
from ..scenes.scene_eval import summarise
from . import figures, plots, studies
from .bench import GRID_ROWS, Contender, Plan
from .intervals import Interval, bootstrap, median
from .prompts import Case, scene_cases
from .results import BenchResult, memory_text

PAGE, DATA = "index.html", "report.json"
MAP_PICTURES = 4  # shown with their own maps
TRAJECTORY = 102  # positions: six rows of the bundled model
VARIANT_PICTURES = 6
Progress = Callable[[str], Callable[[Any], Any]]


@dataclass(frozen=True)
class Figure:
    """A PNG of the report, with its heading and what one sees on it."""

    file: str
    title: str
    caption: str
    photos: bool = False  # pictures, whose colours must stay as they are on a dark page


@dataclass(frozen=True)
class Line:
    """A decoder of the comparison with its intervals."""

    label: str
    weights: str
    exact: bool
    window: int
    forward_passes: Interval
    compression: Interval
    latency_s: Interval
    speedup: float
    images_per_s: float
    memory: str
    scene_eval: Interval | None


def lines_of(rows: Sequence[Contender], result: BenchResult) -> list[Line]:
    """The comparison with 95 % intervals: bootstrap over pictures, SceneEval's own for shares."""
    made = []
    for row, data in zip(rows, result.decoders):
        passes = bootstrap([n for run in row.runs for n in run.forward_passes])
        made.append(
            Line(
                data.name, data.weights, data.exact, data.window, passes, passes.inverse(data.tokens),
                median([run.latency_s for run in row.runs]), data.speedup_vs_ar, data.images_per_s,
                memory_text(data.peak_memory_bytes), _quality(row),
            )
        )  # fmt: skip
    return made


def _quality(row: Contender) -> Interval | None:
    groups: dict[str, list[Any]] = {}
    for i, verdict in sorted(row.verdicts.items()):
        groups.setdefault(row.categories[i], []).append(verdict)
    if not groups:
        return None
    score = summarise(groups).overall
    return Interval(score.score, score.low, score.high)


def _batch(plan: Plan) -> int:
    """Pictures decoded together where nothing is timed: what the comparison does, unless the model is the small one."""
    return studies.WATCHED if plan.cases[0].judge else plan.batch


def write_report(
    plan: Plan,
    rows: Sequence[Contender],
    result: BenchResult,
    folder: Path,
    progress: Progress = lambda label: iter,
    command: str = "",
) -> Path:
    """Run the report's own measurements on the comparison's prompts and write everything under `folder`.

    Returns the page. `command` is what the page says it was made by.
    """
    data: dict[str, Any] = {"bench": asdict(result)}
    shown = [*_comparison(result, folder), *_watched(plan, rows, result, folder, data, progress)]
    tuned = next((row.engine for row in rows if row.engine.is_tuned), None)
    if tuned is not None:
        shown += _of_sjd2(plan, tuned, result, folder, data, progress)
    lines = lines_of(rows, result)
    data["decoders"] = [asdict(line) for line in lines]
    replace_file(folder / DATA, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return replace_file(folder / PAGE, render(plan, rows, result, lines, shown, folder, command))


def _where(result: BenchResult) -> str:
    return f"{result.model}, {result.device}, {result.dtype}"


def _comparison(result: BenchResult, folder: Path) -> list[Figure]:
    plots.draw_all(result, folder)
    return [
        Figure(
            "speedup.png",
            "Passes saved and time saved",
            "Step compression is what the decoder saves in forward passes, speed-up what is left of it on this device, "
            "where a wide pass costs more than a narrow one.",
        ),
        Figure("forwards_and_latency.png", "What one picture costs", "Whole decodes: text in, picture out."),
        Figure(
            "accepted_per_step.png",
            "Tokens accepted per forward pass",
            "Histograms over all steps of all pictures; the dashed line is the mean.",
        ),
    ]


def _label(row: Contender) -> str:
    words = " ".join(part for part in row.spec.name.split(":") if not part.startswith(("W=", "window=")))
    return f"{words}\n{'base' if row.spec.weights == 'base' else 'tuned'}, W = {row.config.width}"


def _watched(
    plan: Plan, rows: Sequence[Contender], result: BenchResult, folder: Path, data: dict[str, Any], progress: Progress
) -> list[Figure]:
    rows = [row for row in rows if row.config.window != AUTO and row.config.width > 1]
    if not rows:
        return []
    contenders = [(_label(row), row.engine, row.config) for row in rows]
    watched = studies.watch_all(contenders, plan.cases[: studies.WATCHED], plan.seed, _batch(plan), progress("watch"))
    count, used = min(MAP_PICTURES, len(plan.cases)), min(studies.WATCHED, len(plan.cases))
    shown = [[row.images[i] for i in range(count)] for row in rows]
    figures.acceptance_maps(
        [figures.CostMaps(w.label, pictures, w.maps[:count], w.mean) for w, pictures in zip(watched, shown)],
        folder / "acceptance_map.png",
        f"a pass that accepts n tokens costs each of them 1/n; mean over {used} pictures; {_where(result)}",
    )
    figures.trajectories(
        {w.label.replace("\n", ", "): w.first.states() for w in watched},
        TRAJECTORY,
        folder / "trajectories.png",
        f"“{plan.cases[0].text}”, seed {plan.seed}: one line per forward pass; {_where(result)}",
    )
    data["acceptance_maps"] = {w.label: np.round(w.mean, 4).tolist() for w in watched}
    data["trajectory"] = {w.label: w.first.states().tolist() for w in watched}
    return [
        Figure(
            "acceptance_map.png",
            "Where decoding is slow",
            "Dark tokens needed a pass of their own, pale ones came many at a time; below each map its mean. Above the "
            "maps are the decoder's pictures, where they are not those of the decoder before it.",
            photos=True,
        ),
        Figure(
            "trajectories.png",
            "Tokens over iterations",
            "How the window moves over the picture, pass by pass from top to bottom: drafts appear at its right end, "
            "as tokens or as noise, and change until they are accepted.",
        ),
    ]


def _of_sjd2(
    plan: Plan, tuned: Engine, result: BenchResult, folder: Path, data: dict[str, Any], progress: Progress
) -> list[Figure]:
    assert tuned.model.noise is not None
    cells = studies.sweep_cells(tuned, plan.cases, plan.seed, progress("sweep"))
    pictures = min(studies.SWEEP_PROMPTS, len(plan.cases))
    where = f"{tuned.model_name}, {result.device}, {result.dtype}"
    said = f"match, {pictures} pictures one at a time; {where}"
    figures.sweep(cells, tuned.model.noise.levels, folder / "windows_and_levels.png", said)
    judged = bool(plan.cases[0].judge)
    cases = scene_cases(studies.MANY, plan.seed) if judged else plan.cases
    parts = studies.take_parts(tuned, cases, plan.seed, _batch(plan), VARIANT_PICTURES, progress("parts"))
    said = f"{len(cases)} pictures; {where}"
    normalisation = ("AR", "SJD2", "SJD2, raw noise", "denoising alone", "denoising alone, raw noise")
    figures.variants(
        [parts.variants[k] for k in normalisation],
        "With and without normalised embeddings, with and without the Jacobi test",
        folder / "parts.png",
        said,
    )
    _grid(cases, parts, ("SJD2", "denoising alone", "denoising alone, raw noise"), folder / "parts_grid.png")
    data["sweep"] = [asdict(cell) for cell in cells]
    data["parts"] = {label: asdict(variant) for label, variant in parts.variants.items()}
    return [
        Figure(
            "windows_and_levels.png",
            "Windows and noise levels",
            "SJD2 in match mode. A draft takes one pass per level before it can be accepted, so many levels want wide "
            "windows; a frame marks the best cell. (The publication's Figure 4.)",
        ),
        Figure(
            "parts.png",
            "What normalisation and the Jacobi test are worth",
            "SJD2 gives AR's own tokens whatever its drafts, so raw noise costs it passes only. Denoising alone takes "
            "every block as it comes out of the last level: few passes, and nothing that repairs the pictures. (The "
            "publication's Figures 5 and 9.)",
        ),
        Figure(
            "parts_grid.png",
            "The same prompts and seeds, with and without the Jacobi test",
            "SJD2; denoising alone in normalised space; denoising alone with noise on raw embeddings.",
            photos=True,
        ),
    ]


def _grid(cases: Sequence[Case], parts: studies.PartsTaken, labels: Sequence[str], path: Path) -> None:
    shown = {label: parts.images[label] for label in labels}
    captions = [case.text for case in cases[: len(shown[labels[0]])]]
    plots.image_grid(captions, shown, path)


def data_uri(raw: bytes) -> str:
    """A PNG as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def _picture_uri(image: Image.Image, side: int = 192) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())


def render(
    plan: Plan,
    rows: Sequence[Contender],
    result: BenchResult,
    lines: Sequence[Line],
    shown: Sequence[Figure],
    folder: Path,
    command: str,
) -> str:
    """The page: every picture inside it, no script, no address outside of it."""
    import jinja2

    template = Path(__file__).parent / "templates" / "report.html.j2"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    prompts = [case.text for case in plan.cases[:GRID_ROWS]]
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        result=result,
        plan=plan,
        lines=lines,
        judged=any(line.scene_eval for line in lines),
        most=max(line.compression.value for line in lines),
        figures=[(figure, data_uri((folder / figure.file).read_bytes())) for figure in shown],
        columns=[plots.row_label(data, " · ") for data in result.decoders],
        grid=[(prompt, [_picture_uri(row.images[i]) for row in rows]) for i, prompt in enumerate(prompts)],
        command=command or "sjd2 bench --report DIR",
    )
