"""The comparison's figures, one function each, drawn from the results alone (matplotlib's Agg, no window)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from ..files import replace_file
from .results import BenchResult, DecoderResult

DPI = 150
INK, SOFT, RULE = "#1f2430", "#6b7280", "#e5e7eb"
# Okabe and Ito's colours, told apart by colour-blind readers too; AR is the grey everything is held against.
HUES = {"ar": "#9aa0a8", "jacobi": "#56b4e9", "sjd": "#0072b2", "coupled": "#009e73", "sjd2": "#d55e00"}
OTHER_HUES = ("#cc79a7", "#b8860b", "#7a5195")
TINT = 0.38  # how far each further variant of a decoder goes towards white

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "savefig.dpi": DPI,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
}


@contextmanager
def canvas(path: str | Path, *args: Any, tight: bool = True, **kwargs: Any):
    """A figure in our style; what the caller drew on it is saved as a PNG, and the figure closed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(*args, **kwargs)
        try:
            yield figure, axes
            crop: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.15} if tight else {}
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", **crop)
            replace_file(path, drawn.getvalue())
        finally:
            plt.close(figure)


def family(row: DecoderResult) -> str:
    return row.name.split(":")[0]


def colours(rows: Sequence[DecoderResult]) -> list[str]:
    """One colour per row: the decoder's own hue, lighter for each further variant of it."""
    others = [name for name in dict.fromkeys(map(family, rows)) if name not in HUES]
    hues = {**HUES, **{name: OTHER_HUES[i % len(OTHER_HUES)] for i, name in enumerate(others)}}
    seen: dict[str, int] = {}
    result = []
    for row in rows:
        nth = seen.get(family(row), 0)
        seen[family(row)] = nth + 1
        keep = 1.0 if family(row) == "ar" else (1 - TINT) ** nth
        rgb = keep * np.array(to_rgb(hues[family(row)])) + (1 - keep)
        result.append(to_hex(tuple(rgb.tolist())))
    return result


def row_label(row: DecoderResult, join: str = "\n") -> str:
    """A row's name for people: the decoder and its options, then its window and weights."""
    name = " ".join(part for part in row.name.split(":") if not part.startswith(("W=", "window=")))
    window = [f"window {row.window}"] if row.window > 1 else []
    weights = ["tuned"] if row.weights != "base" else []
    return join.join(filter(None, (name, ", ".join(window + weights))))


def heading(figure, title: str, subtitle: str, inches: float = 0.1) -> None:
    """Title and explaining lines, at a fixed distance in inches above the figure's axes."""
    height = figure.get_size_inches()[1]
    above = inches + 0.09 + 0.16 * (1 + subtitle.count("\n"))
    figure.text(0.0, 1 + above / height, title, fontsize=13, fontweight="bold", ha="left", va="bottom")
    figure.text(0.0, 1 + inches / height, subtitle, fontsize=9, color=SOFT, ha="left", va="bottom")


def where(result: BenchResult) -> str:
    return f"{result.model}, {result.prompts} prompts, {result.device}, {result.dtype}"


def _bars(axis, values: Sequence[float], hues: Sequence[str], form: str) -> None:
    y = np.arange(len(values))
    axis.barh(y, values, color=hues, height=0.62)
    beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    for at, value in zip(y, values):
        axis.annotate(form.format(value), (value, at), **beside)
    axis.set_xlim(0, 1.17 * max(values))
    axis.set_ylim(len(values) - 0.45, -0.55)
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.set_xticks([])


def forwards_and_latency(result: BenchResult, path: str | Path) -> None:
    """Two panels of bars: forward passes per image, and median seconds per decode."""
    rows = result.decoders
    hues = colours(rows)
    size = (9.2, 0.55 * len(rows) + 0.7)
    with canvas(path, 1, 2, figsize=size, sharey=True, layout="constrained") as (figure, (left, right)):
        _bars(left, [row.forward_passes_mean for row in rows], hues, "{:.0f}")
        _bars(right, [row.latency_s_median for row in rows], hues, "{:.2f} s")
        left.set_yticks(range(len(rows)), [row_label(row) for row in rows])
        left.set_title("Forward passes per image")
        right.set_title("Seconds per decode (median)")
        heading(figure, "What one image costs", where(result))


def _without_ar(result: BenchResult) -> list[tuple[DecoderResult, str]]:
    return [pair for pair in zip(result.decoders, colours(result.decoders)) if family(pair[0]) != "ar"]


def speedup_and_compression(result: BenchResult, path: str | Path) -> None:
    """A dumbbell per decoder: how many fewer forwards (ring), and how much less time (dot), against AR."""
    pairs = _without_ar(result)
    size = (9.2, 0.5 * max(len(pairs), 1) + 1.0)
    with canvas(path, figsize=size, layout="constrained") as (figure, axis):
        for at, (row, hue) in enumerate(pairs):
            steps, time = row.step_compression, row.speedup_vs_ar
            axis.plot([steps, time], [at, at], color=hue, linewidth=3, alpha=0.35, solid_capstyle="round")
            axis.scatter(steps, at, s=72, facecolor="white", edgecolor=hue, linewidth=2, zorder=3)
            axis.scatter(time, at, s=84, color=hue, zorder=3)
            for value, other in ((steps, time), (time, steps)):
                side = 1 if value >= other else -1
                axis.annotate(
                    f"{value:.2f}x",
                    (value, at),
                    xytext=(9 * side, 0),
                    textcoords="offset points",
                    fontsize=9,
                    fontweight="bold" if value is time else "normal",
                    ha="left" if side > 0 else "right",
                    va="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                )
        axis.axvline(1.0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axis.text(1.02, len(pairs) - 0.42, "AR", color=SOFT, va="bottom")
        axis.set_yticks(range(len(pairs)), [row_label(row) for row, _ in pairs])
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        most = max([1.5, *(max(row.step_compression, row.speedup_vs_ar) for row, _ in pairs)])
        least = min([1.0, *(min(row.step_compression, row.speedup_vs_ar) for row, _ in pairs)])
        axis.set_xlim(max(0.0, least - 0.12 * most), 1.1 * most)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(axis="x", color=RULE, linewidth=0.8)
        axis.spines["left"].set_visible(False)
        key = "○ fewer forward passes (step compression)   ● less time (speed-up of the median decode)"
        heading(figure, "How much faster than AR on the same weights", f"{key}\n{where(result)}")


def accepted_per_step(result: BenchResult, path: str | Path) -> None:
    """Histograms, one panel per decoder: how many tokens a forward pass accepted; the mean is marked."""
    pairs = [(row, hue) for row, hue in _without_ar(result) if row.accepted_per_step]
    columns = min(3, max(len(pairs), 1))
    lines = -(-max(len(pairs), 1) // columns)
    shape = {"figsize": (3.1 * columns, 2.15 * lines + 0.2), "sharex": True, "sharey": True, "squeeze": False}
    with canvas(path, lines, columns, layout="constrained", **shape) as (figure, grid):
        for axis in grid.flat[len(pairs) :]:
            axis.set_visible(False)
        ends = [_histogram(axis, row, hue) for axis, (row, hue) in zip(grid.flat, pairs)]
        for axis in grid[:, 0]:
            axis.set_ylabel("share of steps")
        # One scale for all panels, with room for the mean above the tallest bar.
        grid[0, 0].set_xlim(0.4, max(ends, default=4) + 0.6)
        grid[0, 0].set_ylim(top=1.12 * grid[0, 0].get_ylim()[1])
        figure.supxlabel("tokens accepted in one step", fontsize=9.5, color=SOFT)
        heading(figure, "Tokens accepted per forward pass", where(result), inches=0.12)


def _histogram(axis, row: DecoderResult, hue: str, keep: float = 0.995) -> int:
    """Shares of steps by tokens accepted, the longest half percent left out; returns the last bar shown."""
    counts = {int(k): v for k, v in row.accepted_per_step.items()}
    most, total = max(counts), sum(counts.values())
    heights = np.array([counts.get(k, 0) for k in range(most + 1)]) / max(total, 1)
    mean = float((np.arange(most + 1) * heights).sum())
    end = min(int(np.searchsorted(np.cumsum(heights), keep)), most)
    axis.bar(np.arange(1, end + 1), heights[1 : end + 1], color=hue, width=0.82)
    axis.axvline(mean, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    axis.text(mean, 0.97, f"  mean {mean:.2f}", transform=axis.get_xaxis_transform(), fontsize=9, va="top")
    axis.set_title(row_label(row, " · "), fontsize=9.5)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axis.grid(axis="y", color=RULE, linewidth=0.8)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", colors=SOFT)
    axis.tick_params(axis="x", labelbottom=True)
    return end


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def image_grid(
    prompts: Sequence[str],
    images: Mapping[str, Sequence[Image.Image]],
    path: str | Path,
    headers: Mapping[str, str] | None = None,
    cell: int = 192,
) -> None:
    """One line per prompt, one column per decoder: the same prompts and seeds next to each other.

    `images`: column name -> one picture per prompt; `headers`: column name -> what stands above it.
    """
    gap, caption, top = 10, 300, 76
    width = caption + len(images) * (cell + gap)
    height = top + len(prompts) * (cell + gap)
    with canvas(path, figsize=(width / DPI, height / DPI), tight=False) as (figure, axis):
        axis.remove()
        for line, prompt in enumerate(prompts):
            middle = 1 - (top + line * (cell + gap) + cell / 2) / height
            words = _wrapped(prompt, 24)
            figure.text((caption - 18) / width, middle, words, fontsize=8.5, ha="right", va="center")
        for column, (name, pictures) in enumerate(images.items()):
            left = caption + column * (cell + gap)
            header = _wrapped((headers or {}).get(name, name), 17)
            at = ((left + cell / 2) / width, 1 - (top - 12) / height)
            figure.text(*at, header, fontsize=8, fontweight="bold", ha="center", va="bottom", linespacing=1.35)
            for line, picture in enumerate(pictures[: len(prompts)]):
                pixels = picture.convert("RGB").resize((cell - 2, cell - 2), Image.Resampling.LANCZOS)
                pixels = ImageOps.expand(pixels, 1, RULE)  # an edge for pictures as white as the page
                bottom = height - top - line * (cell + gap) - cell
                figure.figimage(np.asarray(pixels), left, bottom, origin="upper")


def draw_all(result: BenchResult, folder: str | Path) -> list[Path]:
    """Draw every figure that needs the results only."""
    figures = {
        "accepted_per_step.png": accepted_per_step,
        "forwards_and_latency.png": forwards_and_latency,
        "speedup.png": speedup_and_compression,
    }
    for name, draw in figures.items():
        draw(result, Path(folder) / name)
    return [Path(folder) / name for name in figures]
