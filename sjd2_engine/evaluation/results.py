"""The comparison's results as data: JSON both ways, a Markdown table, and the raw record of every decode."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import replace_file


@dataclass(frozen=True)
class DecoderResult:
    """One row of the comparison: a decoder on one set of weights, over all prompts."""

    name: str
    weights: str  # "base" or "sjd2" (the sibling trained for noisy inputs)
    exact: bool  # the decoder's output law is the AR law of the same weights
    window: int
    forward_passes_mean: float  # per image
    tokens: int  # per image, forced structure tokens included
    step_compression: float  # tokens / forward_passes_mean
    latency_s_mean: float  # of whole decodes: text in, picture out
    latency_s_median: float
    speedup_vs_ar: float  # ratio of median latencies to AR on the same weights, same prompts and seeds
    images_per_s: float
    peak_memory_bytes: int
    accepted_per_step: dict[str, int] = field(default_factory=dict)  # tokens accepted -> number of steps
    scene_eval: dict[str, float] = field(default_factory=dict)  # share of right pictures, "overall" first

    @property
    def label(self) -> str:
        """What tables and plots call this row."""
        return self.name if self.weights == "base" else f"{self.name} ({self.weights} weights)"


@dataclass(frozen=True)
class BenchResult:
    """The whole comparison."""

    model: str
    device: str
    dtype: str
    commit: str
    versions: dict[str, str]
    prompts: int
    seed: int
    decoders: list[DecoderResult]

    def to_json(self, indent: int | None = None) -> str:
        """The document of `results.json`; without an indent it is one line."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """Read back what `to_json` wrote; a missing or unknown key is an error."""
        try:
            raw = json.loads(text)
            rows = [DecoderResult(**row) for row in raw.pop("decoders")]
            return cls(**raw, decoders=rows)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            expected = ", ".join(f.name for f in fields(cls))
            raise ConfigError(f"not the results of a bench ({error}); expected the keys {expected}") from error


def load(path: str | Path) -> BenchResult:
    """Read a `results.json`."""
    return BenchResult.from_json(Path(path).read_text(encoding="utf-8"))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def memory_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.0f} MiB" if count else "–"


HEADERS = (
    "decoder",
    "weights",
    "exact",
    "window",
    "forwards",
    "compression",
    "latency",
    "speed-up",
    "memory",
    "SceneEval",
)


def table_rows(result: BenchResult) -> list[tuple[str, ...]]:
    """The cells of the comparison as text, one tuple per decoder, under `HEADERS`."""
    return [
        (
            row.name,
            row.weights,
            "yes" if row.exact else "no",
            str(row.window),
            f"{row.forward_passes_mean:.1f}",
            f"{row.step_compression:.2f}x",
            f"{row.latency_s_median:.3f} s",
            f"{row.speedup_vs_ar:.2f}x",
            memory_text(row.peak_memory_bytes),
            _percent(row.scene_eval.get("overall")),
        )
        for row in result.decoders
    ]


def to_markdown(result: BenchResult, notes: Iterable[str] = (), figures: Iterable[str] = ()) -> str:
    """The comparison as a Markdown document: where it was measured, the table, how to read it."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        f"# Decoders on `{result.model}`",
        "",
        f"{result.prompts} prompts, seed {result.seed}; {result.device}, {result.dtype}; commit {result.commit}.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "|".join("---" if i < 3 else "---:" for i in range(len(HEADERS))) + "|",
        *("| " + " | ".join(cells) + " |" for cells in table_rows(result)),
        "",
        "- exact: the decoder samples from the same distribution as AR on the same weights.",
        "- compression: tokens per image over forward passes per image. Latency: median of whole decodes"
        " (text in, picture out), decoders taking turns on the same prompts and seeds, after warm-up.",
        "- speed-up: median AR latency over this decoder's, both on the same weights.",
        "- memory: the most held during a decode: on CUDA by torch, on a CPU by the whole process.",
        *(f"- {note}" for note in notes),
        "",
        f"Versions: {versions}.",
        "",
        *(line for path in figures for line in (f"![{Path(path).stem.replace('_', ' ')}]({path})", "")),
    ]
    return "\n".join(lines)


def write(result: BenchResult, folder: str | Path, notes: Iterable[str] = (), figures: Iterable[Path] = ()) -> None:
    """Write `results.json` and `results.md` (which shows the figures), each whole or not at all."""
    folder = Path(folder)
    shown = [path.relative_to(folder).as_posix() for path in figures]
    replace_file(folder / "results.json", result.to_json(indent=2) + "\n")
    replace_file(folder / "results.md", to_markdown(result, notes, shown))


def write_runs(runs: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Write the raw record, one JSON object per decode and line."""
    replace_file(path, "".join(json.dumps(run, ensure_ascii=False) + "\n" for run in runs))
