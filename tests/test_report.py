"""The HTML report: from a real comparison of the bundled model, and nothing in it that lies elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.evaluation import figures, studies
from sjd2_engine.evaluation.figures import SweepCell, Variant
from sjd2_engine.evaluation.intervals import Interval
from sjd2_engine.evaluation.prompts import Case, scene_cases

PNGS = {
    "accepted_per_step.png", "acceptance_map.png", "forwards_and_latency.png", "parts.png", "parts_grid.png",
    "speedup.png", "trajectories.png", "windows_and_levels.png",
}  # fmt: skip


class Page(HTMLParser):
    """Everything in a page that an attribute points to, and the tags that are open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def png(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64", uri[:60]
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a comparison and of its report, by the command, with the report's own studies made small."""
    out, report = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "windows_of", lambda default: [16, default])
        patch.setattr(studies, "SWEEP_PROMPTS", 1)
        patch.setattr(studies, "MANY", 2)
        args = ["bench", "--decoders", "jacobi,sjd2", "--prompts", "2", "--warmup", "0"]
        result = CliRunner().invoke(app, [*args, "--out", str(out), "--report", str(report)], prog_name="sjd2")
    assert result.exit_code == 0, (result.exception, result.output)
    assert f"The report is {report / 'index.html'}" in result.stdout
    return out, report


def test_the_page_needs_nothing_beside_it(made: tuple[Path, Path]) -> None:
    text = (made[1] / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    pictures = [png(source) for source in page.sources]
    assert len(pictures) == len(PNGS) + 2 * 4, "every figure, and two prompts under four rows"
    assert all(np.asarray(picture.convert("L")).std() > 1 for picture in pictures)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text


def test_the_pngs_lie_beside_the_page(made: tuple[Path, Path]) -> None:
    assert {path.name for path in made[1].iterdir()} == {*PNGS, "index.html", "report.json"}


def test_the_numbers_of_the_figures_are_there(made: tuple[Path, Path], tuned: Engine) -> None:
    out, report = made
    data = json.loads((report / "report.json").read_text())
    assert data["bench"] == json.loads((out / "results.json").read_text())
    assert [line["label"] for line in data["decoders"]] == ["ar", "jacobi", "ar", "sjd2"]
    for line, row in zip(data["decoders"], data["bench"]["decoders"]):
        low, value, high = (line["forward_passes"][key] for key in ("low", "value", "high"))
        assert low <= value == row["forward_passes_mean"] <= high
        assert line["compression"]["value"] == pytest.approx(row["step_compression"])
        assert line["scene_eval"]["value"] == row["scene_eval"]["overall"]
    assert {(cell["levels"], cell["window"]) for cell in data["sweep"]} == {
        (k, w) for k in (1, 2, 3, 4) for w in (16, 32)
    }
    assert np.array(data["acceptance_maps"]["sjd2\ntuned, W = 32"]).shape == (16, 16)
    parts = data["parts"]
    passes = {label: part["forward_passes"]["value"] for label, part in parts.items()}
    assert passes["AR"] == len(tuned.model.layout)
    assert passes["denoising alone"] == passes["denoising alone, raw noise"] == 2 * 9  # blocks of 31 of 272 positions
    assert passes["SJD2"] != passes["SJD2, raw noise"]
    assert max(passes["SJD2"], passes["SJD2, raw noise"]) < passes["AR"] / 3
    assert parts["SJD2"]["share"] == parts["SJD2, raw noise"]["share"] == parts["AR"]["share"]


def test_prompts_cannot_break_the_page(base: Engine, tmp_path: Path) -> None:
    from sjd2_engine.evaluation import bench, report
    from sjd2_engine.evaluation.specs import parse_specs

    nasty = scene_cases(1, 0)[0].text
    rows = bench.contenders(parse_specs("ar"), {"base": base})
    plan = bench.Plan([Case(nasty)], warmup=0)
    result = bench.run(plan, rows, tmp_path / "out")
    shown = bench.Plan([Case('<script>alert(1)</script> & "more"')], warmup=0)
    lines = report.lines_of(rows, result)
    assert lines[0].scene_eval is None
    text = report.render(shown, rows, result, lines, [], tmp_path, "sjd2 bench --report <DIR>")
    assert "<script>" not in text and "&lt;script&gt;" in text and "&lt;DIR&gt;" in text
    assert "SceneEval" not in text, "nothing could be judged"


def test_what_the_page_needs_is_missed_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    args = ["bench", "--prompts", "1", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    result = CliRunner().invoke(app, args, prog_name="sjd2")
    assert result.exit_code == 2
    assert "jinja2 not installed" in result.stderr and "sjd2-engine[eval]" in result.stderr
    assert not any((tmp_path / "out").rglob("*.png"))


def test_levels_to_try() -> None:
    assert studies.levels_of(3) == [1, 2, 3, 4]
    assert studies.levels_of(25) == [5, 10, 15, 20, 25]


def test_windows_to_try() -> None:
    assert studies.windows_of(32) == [8, 16, 32, 64]
    assert studies.windows_of(2) == [2, 4]


def test_figures_without_judged_pictures_and_with_one_cell(tmp_path: Path) -> None:
    one = Interval(1.0, 0.9, 1.1)
    figures.variants([Variant("x", one, None)], "title", tmp_path / "v.png", "where")
    figures.sweep([SweepCell(1, 8, one, one)], 3, tmp_path / "s.png", "where")
    figures.trajectories({"x": np.array([[0, -1], [-2, 0]])}, 2, tmp_path / "t.png", "where")
    for name in ("v", "s", "t"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_decoders_with_the_same_pictures_show_them_once(tmp_path: Path) -> None:
    red, blue, cost = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue"), np.full((4, 4), 0.5)
    heights = {}
    for name, pictures in {"same": [red, red], "other": [red, blue]}.items():
        rows = [figures.CostMaps(str(i), [picture], [cost], cost) for i, picture in enumerate(pictures)]
        figures.acceptance_maps(rows, tmp_path / f"{name}.png", "where")
        with Image.open(tmp_path / f"{name}.png") as image:
            heights[name] = image.height
            colours = {pixel for _, pixel in image.convert("RGB").getcolors(2**24) or []}
        assert (255, 0, 0) in colours and ((0, 0, 255) in colours) == (name == "other")
    assert heights["other"] > heights["same"] + 150
