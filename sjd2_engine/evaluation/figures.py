"""Figures of how the decoders work, drawn from what was watched or taken away; in the style of `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, Normalize, to_rgb
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from .intervals import Interval
from .plots import HUES, INK, RULE, SOFT, canvas, heading
from .traces import ACCEPTED_BEFORE, HIDDEN, KEPT, NEW

# Light is cheap, dark is dear.
COST = LinearSegmentedColormap.from_list("cost", ["#f7f7f4", "#fde0b6", "#f2a25c", "#d55e00", "#7a2c00"])
BEST = LinearSegmentedColormap.from_list("best", ["#f2f7fb", "#9ecae1", "#0072b2"])
STATES = {HIDDEN: "#ffffff", ACCEPTED_BEFORE: "#e3e5e9", NEW: "#0072b2", KEPT: "#9fd0ee"}


def _bare(axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


@dataclass(frozen=True)
class CostMaps:
    """A decoder's pictures, the passes it spent on their tokens (float [rows, columns] each), a mean over more."""

    label: str
    pictures: Sequence[Image.Image]
    maps: Sequence[np.ndarray]
    mean: np.ndarray


def acceptance_maps(rows: Sequence[CostMaps], path: str | Path, subtitle: str) -> None:
    """Every decoder's maps, below the pictures that they belong to; the mean over all pictures at the end."""
    lines: list[CostMaps | Sequence[Image.Image]] = []
    above: list[bytes] = []
    for row in rows:
        # Decoders that give the same tokens draw the same pictures: once is enough.
        if (pixels := [picture.tobytes() for picture in row.pictures]) != above:
            lines.append(row.pictures)
        lines.append(row)
        above = pixels
    columns = len(rows[0].pictures) + 1
    first = rows[0].pictures[0]
    size = (1.5 * columns + 1.6, (1.3 * first.height / first.width + 0.2) * len(lines) + 0.2)
    with canvas(path, len(lines), columns, figsize=size, squeeze=False, layout="constrained") as (figure, grid):
        for axis in grid.flat:
            _bare(axis)
        for axes, line in zip(grid, lines):
            if isinstance(line, CostMaps):
                _map_line(axes, line)
            else:
                for axis, picture in zip(axes, line):
                    axis.imshow(np.asarray(picture.convert("RGB")))
        last = grid[0, -1]
        last.text(0.5, 0.02, "mean of all", ha="center", va="bottom", color=SOFT, transform=last.transAxes)
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, 1), COST), ax=grid.ravel().tolist(), shrink=0.6, aspect=26, pad=0.02
        )
        bar.set_label("forward passes per token")
        bar.outline.set_visible(False)
        heading(figure, "Where decoding is slow", subtitle)


def _map_line(axes, row: CostMaps) -> None:
    for axis, cost in zip(axes, [*row.maps, row.mean]):
        axis.imshow(cost, cmap=COST, vmin=0, vmax=1)
        axis.set_xlabel(f"{cost.mean():.2f}", fontsize=8, labelpad=2)
    axes[0].set_ylabel(row.label, fontsize=9.5, fontweight="bold", color=INK, rotation=0, ha="right", va="center")


@dataclass(frozen=True)
class SweepCell:
    """SJD2 at one number of levels and one window."""

    levels: int
    window: int
    latency_s: Interval
    compression: Interval


def sweep(cells: Sequence[SweepCell], trained: int, path: str | Path, subtitle: str) -> None:
    """Two tables in colour, levels down and windows across: seconds per picture, and tokens per pass."""
    levels, windows = sorted({c.levels for c in cells}), sorted({c.window for c in cells})
    at = {(cell.levels, cell.window): cell for cell in cells}
    panels = {
        "Seconds per picture (median)": (lambda c: c.latency_s.value, "{:.2f}", COST, np.argmin),
        "Tokens per forward pass": (lambda c: c.compression.value, "{:.2f}", BEST, np.argmax),
    }
    size = (1.05 * len(windows) * 2 + 1.8, 0.62 * len(levels) + 1.0)
    with canvas(path, 1, 2, figsize=size, layout="constrained") as (figure, axes):
        for axis, (title, (value, form, colours, best)) in zip(axes, panels.items()):
            table = np.array([[value(at[k, w]) for w in windows] for k in levels])
            low, high = table.min(), table.max()
            axis.imshow(
                table, cmap=colours, vmin=low - 0.05 * (high - low), vmax=high + 0.25 * (high - low), aspect="auto"
            )
            for (line, column), number in np.ndenumerate(table):
                axis.text(column, line, form.format(number), ha="center", va="center", fontsize=9.5)
            line, column = np.unravel_index(best(table), table.shape)
            axis.add_patch(
                Rectangle((column - 0.47, line - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.6)
            )
            axis.set_xticks(range(len(windows)), [str(w) for w in windows])
            axis.set_yticks(range(len(levels)), [f"{k}{'' if k <= trained else ' *'}" for k in levels])
            axis.set_xlabel("window")
            axis.set_title(title)
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[0].set_ylabel("noise levels")
        untrained = "   * more levels than the weights were trained on" if max(levels) > trained else ""
        heading(figure, "SJD2 over windows and noise levels", f"{subtitle}{untrained}")


def trajectories(states: Mapping[str, np.ndarray], positions: int, path: str | Path, subtitle: str) -> None:
    """One panel per decoder: what every position of one picture was in every forward pass.

    states: label -> i64 [passes, N], the states of `traces`, level k of noise as k + 1. `positions`: how many to show.
    """
    deepest = max(1, *(int(found.max()) for found in states.values()))
    # From the last level, pale, to pure noise.
    dark, pale = np.array(to_rgb("#b34700")), np.array(to_rgb("#fbd5b0"))
    noise = [tuple(pale + (dark - pale) * (k / max(1, deepest - 1))) for k in range(deepest)]
    colours = ListedColormap([*STATES.values(), *noise])
    norm = BoundaryNorm(np.arange(HIDDEN - 0.5, deepest + 1), colours.N)
    shown = {label: _until(found, positions) for label, found in states.items()}
    heights = [max(len(found), 6) for found in shown.values()]
    size = (9.2, 0.052 * sum(heights) + 0.75 * len(shown) + 0.3)
    grid = {"height_ratios": heights}
    with canvas(
        path, len(shown), 1, figsize=size, squeeze=False, sharex=True, gridspec_kw=grid, layout="constrained"
    ) as (
        figure,
        axes,
    ):
        for axis, (label, found) in zip(axes[:, 0], shown.items()):
            axis.imshow(found, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
            axis.set_title(f"{label}: {len(found)} passes for {found.shape[1]} tokens", fontsize=9.5)
            axis.set_ylabel("pass")
            axis.tick_params(colors=SOFT)
            for side in ("left", "bottom"):
                axis.spines[side].set_color(RULE)
        axes[-1, 0].set_xlabel("position in raster order")
        words = {ACCEPTED_BEFORE: "accepted", KEPT: "draft, same as before", NEW: "draft, new or changed"}
        marks = [Patch(facecolor=STATES[state], label=word) for state, word in words.items()]
        if deepest > 0 and any((found > 0).any() for found in shown.values()):
            marks += [Patch(facecolor=noise[k], label=f"noise, level {k}") for k in reversed(range(deepest))]
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8.5)
        heading(figure, "Tokens over iterations", subtitle)


def _until(states: np.ndarray, positions: int) -> np.ndarray:
    """The first positions, and the passes until all of them are accepted."""
    cut = states[:, :positions]
    return cut[(cut != ACCEPTED_BEFORE).any(1)]


@dataclass(frozen=True)
class Variant:
    """A way to decode: forward passes per picture, and the share of right pictures where one can tell."""

    label: str
    forward_passes: Interval
    share: Interval | None
    hue: str = HUES["sjd2"]


def variants(rows: Sequence[Variant], title: str, path: str | Path, subtitle: str) -> None:
    """Bars of forward passes, and shares of right pictures with their 95 % intervals."""
    judged = any(row.share for row in rows)
    size = (9.2 if judged else 5.4, 0.5 * len(rows) + 0.8)
    with canvas(path, 1, 2 if judged else 1, figsize=size, sharey=True, squeeze=False, layout="constrained") as (
        figure,
        axes,
    ):
        left, y = axes[0, 0], np.arange(len(rows))
        values = [row.forward_passes.value for row in rows]
        left.barh(y, values, color=[row.hue for row in rows], height=0.58)
        for at, row in zip(y, rows):
            left.annotate(
                f"{row.forward_passes.value:.0f}", (row.forward_passes.high, at), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=9,
            )  # fmt: skip
            left.plot([row.forward_passes.low, row.forward_passes.high], [at, at], color=INK, linewidth=1.2)
        left.set_xlim(0, 1.15 * max(values))
        left.set_title("Forward passes per image")
        left.set_yticks(y, [row.label for row in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        for axis in axes[0]:
            axis.spines["left"].set_visible(False)
        left.spines["bottom"].set_visible(False)
        left.set_xticks([])
        if judged:
            _shares(axes[0, 1], rows)
        heading(figure, title, subtitle)


def _shares(axis, rows: Sequence[Variant]) -> None:
    for at, row in enumerate(rows):
        if row.share is None:
            continue
        low, high = 100 * row.share.low, 100 * row.share.high
        axis.plot([low, high], [at, at], color=row.hue, linewidth=3, alpha=0.4, solid_capstyle="round")
        axis.scatter(100 * row.share.value, at, s=64, color=row.hue, zorder=3)
        axis.annotate(
            f"{100 * row.share.value:.0f} %", (high, at), xytext=(8, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axis.set_xlim(-4, 116)
    axis.set_xticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.grid(axis="x", color=RULE, linewidth=0.8)
    axis.set_title("Right pictures (SceneEval, 95 % interval)")
