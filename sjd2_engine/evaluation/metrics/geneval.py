"""GenEval (Ghosh et al., arXiv 2310.11513): pictures laid out as its scripts expect, and what these found.

GenEval scores with an object detector of its own environment, so it runs outside of this package:

    python evaluation/evaluate_images.py OUT/geneval --outfile OUT/geneval/results.jsonl --model-path DETECTOR

After that, the same `sjd2 evaluate` command shows the shares with their intervals.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import ConfigError
from ...files import replace_file
from ..prompts import Case
from ..records import read_records
from .base import Finding, MetricResult, Picture, Progress
from .scene_eval import shares

RESULTS = "results.jsonl"
GRID_COLUMNS = 2


class GenEval:
    """Writes `geneval/00000/metadata.jsonl`, `samples/0000.png`, … and `grid.png` for every prompt."""

    name = "geneval"
    settings: dict[str, Any] = {}  # noqa: RUF012  (there are none)

    def check(self, cases: Sequence[Case], family: str) -> None:
        """The prompts must be GenEval's: with a tag and the things that should be seen."""
        for number, case in enumerate(cases, 1):
            if "tag" not in case.metadata or "include" not in case.metadata:
                raise ConfigError(
                    f"prompt {number} ({case.text!r}) has no 'tag' and 'include', by which GenEval scores it; give its "
                    "prompts/evaluation_metadata.jsonl as --prompt-file"
                )

    def score(self, pictures: Sequence[Picture], out: Path, progress: Progress) -> MetricResult:
        """Lay the pictures out under `out/geneval`; read GenEval's results from there if it has been run."""
        root = out / "geneval"
        by_case = [list(group) for _, group in groupby(pictures, key=lambda picture: picture.index - picture.sample)]
        for number, samples in enumerate(progress(by_case)):
            _lay_out(root / f"{number:05d}", samples)
        found = root / RESULTS
        if not found.exists():
            note = (
                f"GenEval's layout is in {root}; run its evaluation/evaluate_images.py on it with --outfile {found}, "
                "then this command again for the table"
            )
            values = {"prompts": len(by_case), "pictures": len(pictures), "scores": None}
            return MetricResult(values, [Finding("GenEval", str(len(pictures)), "not scored yet")], [note])
        result = shares(_scored(found, len(pictures)))
        values = {"prompts": len(by_case), "pictures": len(pictures), "scores": result.values}
        return MetricResult(values, result.findings, [f"GenEval: from {found}", *result.notes])


def _lay_out(folder: Path, samples: Sequence[Picture]) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    case = samples[0].case
    replace_file(folder / "metadata.jsonl", json.dumps({**case.metadata, "prompt": case.text}, ensure_ascii=False))
    written = False
    for picture in samples:
        path = folder / "samples" / f"{picture.sample:04d}.png"
        if not path.exists():
            replace_file(path, picture.path.read_bytes())
            written = True
    if written or not (folder / "grid.png").exists():
        replace_file(folder / "grid.png", _grid([picture.open() for picture in samples]))


def _grid(images: Sequence[Image.Image]) -> bytes:
    """The samples of a prompt as one PNG, two columns wide."""
    width, height = images[0].size
    columns = min(GRID_COLUMNS, len(images))
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for place, image in enumerate(images):
        grid.paste(image, (place % columns * width, place // columns * height))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()


def _scored(path: Path, pictures: int) -> Iterable[dict[str, Any]]:
    records = read_records(path)
    if len(records) != pictures or any(not {"tag", "correct"} <= record.keys() for record in records):
        raise ConfigError(
            f"'{path}' holds {len(records)} scores for {pictures} pictures, or not GenEval's; run its "
            "evaluate_images.py again, or remove the file"
        )
    return [{"category": r["tag"], "correct": r["correct"], "reason": r.get("reason") or ""} for r in records]
