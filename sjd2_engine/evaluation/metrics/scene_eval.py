"""SceneEval as a metric: is the picture what its caption asked for? For pictures of the bundled models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...scenes.scene_eval import Score, Summary, Verdict, summarise
from ..prompts import Case
from .base import Finding, MetricResult, Picture, Progress, score_each


class SceneEval:
    """Shares of right pictures in GenEval's six categories, with Wilson's intervals; overall is their mean."""

    name = "scene_eval"
    settings: dict[str, Any] = {}  # noqa: RUF012  (there are none)

    def check(self, cases: Sequence[Case], family: str) -> None:
        """It judges the bundled models' pictures, against captions of their own grammar."""
        if family != "scenes":
            raise ConfigError(
                f"SceneEval cannot judge pictures of the family {family}, only those of the bundled models' family, "
                "scenes; for others: --metrics fid, clip or geneval"
            )
        if any(case.judge is None for case in cases):
            raise ConfigError(
                "SceneEval judges its own captions only, not those of --prompt-file; leave the file out, or use "
                "--metrics clip"
            )

    def score(self, pictures: Sequence[Picture], out: Path, progress: Progress) -> MetricResult:
        """Judge every picture; verdicts are kept in `scene_eval.jsonl`."""
        records = score_each(pictures, out / "scene_eval.jsonl", _verdicts, progress)
        return shares(records)


def _verdicts(pictures: Sequence[Picture]) -> Iterable[dict[str, Any]]:
    for picture in pictures:
        verdict = picture.case.judge(picture.open()) if picture.case.judge else None
        assert verdict is not None  # checked before anything was drawn
        yield {"category": picture.case.category, "correct": verdict.correct, "reason": verdict.reason}


def shares(records: Iterable[dict[str, Any]]) -> MetricResult:
    """Shares of right pictures from records with `category`, `correct` and `reason`; GenEval's, too."""
    groups: dict[str, list[Verdict]] = {}
    for record in records:
        groups.setdefault(record["category"], []).append(Verdict(bool(record["correct"]), record["reason"]))
    summary = summarise(groups)
    return MetricResult(asdict(summary), findings(summary), ["overall: mean of the categories' shares, as in GenEval"])


def findings(summary: Summary) -> list[Finding]:
    """One line per category, and the overall score."""
    parts: dict[str, Score] = {**summary.categories, "overall": summary.overall}
    return [
        Finding(name, f"{s.correct} of {s.total}", _percent(s.score), f"{_percent(s.low)} – {_percent(s.high)}")
        for name, s in parts.items()
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
