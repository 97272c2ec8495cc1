"""What each choice in a decoder is worth, on the bundled model: the tables of docs/experiments.md.

    PYTHONPATH=.:kernels python benchmarks/ablations.py [--only NAME …] [--results FILE] [--tables]

Counts forward passes and right pictures, which do not depend on how busy the machine is. Every batch is appended to the
results as soon as it is decoded; a run that is killed goes on where it was. --tables decodes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sjd2_engine
from sjd2_engine import Engine
from sjd2_engine.evaluation.intervals import Interval, bootstrap, paired
from sjd2_engine.evaluation.prompts import Case, scene_cases
from sjd2_engine.evaluation.records import append_record, read_records
from sjd2_engine.scenes.scene_eval import Score, Summary, Verdict, summarise
from sjd2_engine.scenes.world import CATEGORIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablations.jsonl"
MODELS = {"base": "scenes", "sjd2": "scenes-sjd2"}
SEED = 7  # of the captions, and of the first picture: captions that no default was chosen on
BATCH = 16
# Pictures: for forward passes, for shares of right ones, for differences of some points, and of one point.
COUNTS, SOME, MANY, MOST = 48, 288, 480, 7200


@dataclass(frozen=True)
class Cell:
    """One line of a table: a decoder with its options on one set of weights, over so many pictures."""

    label: str
    weights: str
    decoder: str
    pictures: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What is decoded, whatever the label: cells of several tables share their pictures."""
        return " ".join([self.weights, self.decoder, *(f"{k}={v}" for k, v in sorted(self.options.items()))])


def _verification() -> Iterator[Cell]:
    yield Cell("ar", "sjd2", "ar", SOME)
    for name, options in {
        "match": {},
        "ratio, gumbel": {"verification": "ratio", "coupling": "gumbel"},
        "ratio, maximal": {"verification": "ratio", "coupling": "maximal"},
        "ratio, none": {"verification": "ratio", "coupling": "none"},
        "paper": {"verification": "paper", "coupling": "none"},
        "paper, gumbel": {"verification": "paper", "coupling": "gumbel"},
        "paper, K = 3, W = 64": {"verification": "paper", "coupling": "none", "denoise_levels": 3, "window": 64},
    }.items():
        yield Cell(name, "sjd2", "sjd2", SOME, {"window": 32, "denoise_levels": 2, **options})


def _coupling() -> Iterator[Cell]:
    # The last column flattens the distributions: where draws agree by chance, coupling has nothing to win.
    for weights, where, options in (
        ("base", "base, W = 16", {"window": 16}),
        ("base", "base, W = 32", {"window": 32}),
        ("sjd2", "tuned, W = 16", {"window": 16}),
        ("sjd2", "tuned, W = 32", {"window": 32}),
        ("base", "base, W = 32, temperature 2", {"window": 32, "temperature": 2.0}),
    ):
        yield Cell(f"none (sjd), {where}", weights, "sjd", COUNTS, options)
        for coupling in ("gumbel", "maximal"):
            yield Cell(f"{coupling}, {where}", weights, "coupled", COUNTS, {**options, "coupling": coupling})
        yield Cell(f"fixed noise (jacobi), {where}", weights, "jacobi", COUNTS, options)


def _levels() -> Iterator[Cell]:
    for levels in (1, 2, 3, 4, 6):
        for window in (8, 16, 32, 64):
            options = {"denoise_levels": levels, "window": window}
            yield Cell(f"K = {levels}, W = {window}", "sjd2", "sjd2", COUNTS, options)


def _guidance() -> Iterator[Cell]:
    for label, weights, decoder, pictures, options in (
        ("ar, base", "base", "ar", 2 * COUNTS, {}),
        ("sjd, base, W = 16", "base", "sjd", COUNTS, {"window": 16}),
        ("sjd2, tuned, W = 32", "sjd2", "sjd2", COUNTS, {"window": 32, "denoise_levels": 2}),
    ):
        for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
            yield Cell(f"{label}, s = {scale:g}", weights, decoder, pictures, {"guidance_scale": scale, **options})


def _maximal() -> Iterator[Cell]:
    # The exact decoder that was furthest from AR over fewer pictures, with earlier weights.
    options = {"window": 32, "denoise_levels": 2, "verification": "ratio", "coupling": "maximal"}
    yield Cell("ar", "sjd2", "ar", MANY)
    yield Cell("ratio, maximal", "sjd2", "sjd2", MANY, options)


def _weights() -> Iterator[Cell]:
    # By jacobi, whose pictures are those of ar, in a third of the time.
    for weights, label in (("base", "base"), ("sjd2", "tuned")):
        yield Cell(f"jacobi, {label}", weights, "jacobi", MOST, {"window": 16})


EXPERIMENTS = {
    "verification": _verification,
    "coupling": _coupling,
    "levels": _levels,
    "guidance": _guidance,
    "maximal": _maximal,
    "weights": _weights,
    "categories": _weights,
}


def weights_digest(model: str) -> str:
    """The first 12 hex digits of the SHA-256 of a bundled model's decoder."""
    path = Path(sjd2_engine.__file__).parent / "weights" / model / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@dataclass
class Measured:
    """Every picture of a cell, in the order of the captions."""

    forward_passes: list[int]
    correct: list[bool]
    tokens: int

    @classmethod
    def of(cls, cell: Cell, records: Sequence[dict[str, Any]]) -> Measured | None:
        """Put the batches of a cell together; None while some of its pictures are missing."""
        mine = {r["first"]: r for r in records if r["cell"] == cell.key}
        wanted = range(0, cell.pictures, BATCH)
        if not all(first in mine for first in wanted):
            return None
        passes = [n for first in wanted for n in mine[first]["forward_passes"]]
        right = [bool(flag) for first in wanted for flag in mine[first]["correct"]]
        return cls(passes, right, mine[0]["tokens"])

    def compression(self) -> Interval:
        """Tokens per forward pass."""
        return bootstrap(self.forward_passes).inverse(self.tokens)

    def scene_eval(self) -> Summary:
        """Shares of the six categories, which captions have in turn, and their mean."""
        groups: dict[str, list[Verdict]] = {}
        for category, right in zip(cycle(CATEGORIES), self.correct):
            groups.setdefault(category, []).append(Verdict(right, ""))
        return summarise(groups)


def usable(path: Path) -> list[dict[str, Any]]:
    """The batches on file that were decoded with the weights of this tree."""
    digests = {weights: weights_digest(model) for weights, model in MODELS.items()}
    return [r for r in read_records(path) if r["digest"] == digests[r["cell"].split()[0]]]


def missing(cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> list[tuple[Cell, int]]:
    """Batches that are not on file, each once: the cell and the index of the first caption."""
    done = {(r["cell"], r["first"]) for r in records}
    wanted = {(cell.key, first): cell for cell in cells for first in range(0, cell.pictures, BATCH)}
    return [(cell, first) for (key, first), cell in wanted.items() if (key, first) not in done]


def decode(engine: Engine, cell: Cell, cases: Sequence[Case], first: int) -> dict[str, Any]:
    """Decode and judge one batch; the record of it."""
    part = cases[first : first + BATCH]
    seeds = [SEED + first + i for i in range(len(part))]
    options = {**cell.options, "max_batch": BATCH}
    result = engine.generate([case.text for case in part], cell.decoder, seed=seeds, **options)
    if result.failures:
        raise result.failures[0]
    verdicts = [case.judge(image) if case.judge and image else None for case, image in zip(part, result.images)]
    return {
        "cell": cell.key,
        "first": first,
        "digest": weights_digest(MODELS[cell.weights]),
        "tokens": result.stats.tokens,
        "forward_passes": result.stats.forward_passes,
        "correct": [int(verdict is not None and verdict.correct) for verdict in verdicts],
    }


def run(cells: Sequence[Cell], path: Path) -> None:
    """Decode what is missing, appending each batch to the file at `path`."""
    todo = missing(cells, usable(path))
    engines = {name: Engine.from_pretrained(MODELS[name]) for name in dict.fromkeys(cell.weights for cell, _ in todo)}
    cases = scene_cases(max((first + BATCH for _, first in todo), default=0), SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell, first in tqdm(todo, desc="ablations", unit="batch", disable=not sys.stderr.isatty()):
        append_record(path, decode(engines[cell.weights], cell, cases, first))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _percent(score: Score) -> str:
    return Interval(score.score, score.low, score.high).text("{:.1f} %", 100)


def listing(cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> str:
    """One line per setting: passes, and shares of right pictures where there are enough; differences to the first."""
    base: Measured | None = None
    rows = []
    for cell in cells:
        measured = Measured.of(cell, records)
        if measured is None:
            rows.append((cell.label, "not measured", "", "", "", ""))
            continue
        base = base or measured
        quality = difference = "–"
        if cell.pictures > COUNTS:
            quality = _percent(measured.scene_eval().overall)
            if measured is not base:
                difference = paired(measured.correct, base.correct).text("{:+.1f}", 100)
        passes = bootstrap(measured.forward_passes)
        compression = passes.inverse(measured.tokens).text("{:.2f}") if passes.low < passes.high else "1"
        rows.append((cell.label, str(cell.pictures), f"{passes.value:.1f}", compression, quality, difference))
    return _markdown(("setting", "pictures", "passes", "tokens per pass", "SceneEval", "difference, points"), rows)


def grid(cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> str:
    """Tokens per pass in a table of two options, which the labels name as `line, column`."""
    values = {}
    for cell in cells:
        measured = Measured.of(cell, records)
        values[tuple(cell.label.split(", ", 1))] = measured.compression().text("{:.2f}") if measured else "not measured"
    lines, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    return _markdown(("", *columns), ((line, *(values[line, column] for column in columns)) for line in lines))


def categories(cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> str:
    """SceneEval by category, one column per setting."""
    found = [measured and measured.scene_eval() for measured in (Measured.of(cell, records) for cell in cells)]
    rows = [
        (category, *(_percent(result.categories[category]) if result else "not measured" for result in found))
        for category in CATEGORIES
    ]
    return _markdown(("category", *(cell.label for cell in cells)), rows)


DRAW = {"coupling": grid, "levels": grid, "categories": categories}  # the others: listing


def table(name: str, records: Sequence[dict[str, Any]]) -> str:
    """The table of an experiment, in Markdown."""
    return DRAW.get(name, listing)(list(EXPERIMENTS[name]()), records)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="these experiments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one batch each")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, decode nothing")
    options = parser.parse_args(argv)
    if not options.tables:
        run([cell for name in options.only for cell in EXPERIMENTS[name]()], options.results)
    records = usable(options.results)
    for name in options.only:
        print(f"## {name}\n\n{table(name, records)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
