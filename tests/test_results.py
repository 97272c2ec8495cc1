"""Results of a comparison: JSON both ways, tables, figures, decoder specs, and files whole or absent."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sjd2_engine.config import DecodeConfig
from sjd2_engine.errors import ConfigError, PromptError
from sjd2_engine.evaluation import results
from sjd2_engine.evaluation.prompts import read_prompts, scene_cases
from sjd2_engine.evaluation.records import read_records
from sjd2_engine.evaluation.results import BenchResult, DecoderResult
from sjd2_engine.evaluation.specs import DecoderSpec, parse_spec, parse_specs
from sjd2_engine.files import (
    check_writable,
    picture_facts,
    picture_path,
    png_facts,
    replace_file,
    save_png,
    slug,
)

ROW = DecoderResult(
    name="sjd2", weights="sjd2", exact=True, window=64, forward_passes_mean=64.0, tokens=272,
    step_compression=4.25, latency_s_mean=0.5, latency_s_median=0.4, speedup_vs_ar=2.5, images_per_s=2.0,
    peak_memory_bytes=3 * 2**20, accepted_per_step={"1": 4, "4": 50, "9": 3}, scene_eval={"overall": 0.75},
)  # fmt: skip
AR = replace(ROW, name="ar", weights="base", window=1, accepted_per_step={"1": 272}, speedup_vs_ar=1.0)
RESULT = BenchResult(
    "scenes", "a device", "float32", "abc", {"torch": "2"}, prompts=3, seed=0,
    decoders=[AR, replace(ROW, name="jacobi", weights="base"), replace(AR, weights="sjd2"), ROW,
              replace(ROW, name="sjd2:ratio:W=32:K=3", window=32)],
)  # fmt: skip


def test_json_has_exactly_the_documented_keys() -> None:
    document = json.loads(RESULT.to_json())
    assert list(document) == [
        "model", "device", "dtype", "commit", "versions", "prompts", "seed", "decoders",
    ]  # fmt: skip
    assert list(document["decoders"][0]) == [
        "name", "weights", "exact", "window", "forward_passes_mean", "tokens", "step_compression",
        "latency_s_mean", "latency_s_median", "speedup_vs_ar", "images_per_s", "peak_memory_bytes",
        "accepted_per_step", "scene_eval",
    ]  # fmt: skip


def test_json_comes_back_equal_and_stands_on_one_line() -> None:
    assert BenchResult.from_json(RESULT.to_json()) == RESULT
    assert "\n" not in RESULT.to_json()


@pytest.mark.parametrize("change", [{"colour": 1}, {"decoders": [{"name": "ar"}]}, {"decoders": 3}])
def test_json_with_wrong_keys_is_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match="expected the keys"):
        BenchResult.from_json(json.dumps({**asdict(RESULT), **change}))


def test_markdown_has_one_line_per_decoder(tmp_path: Path) -> None:
    results.write(RESULT, tmp_path, ["a note"], [tmp_path / "plots" / "a_b.png"])
    text = (tmp_path / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(RESULT.decoders)
    assert len({line.count("|") for line in table}) == 1
    assert "| sjd2 | sjd2 | yes | 64 | 64.0 | 4.25x | 0.400 s | 2.50x | 3 MiB | 75 % |" in table
    assert "- a note" in text and "![a b](plots/a_b.png)" in text
    assert results.load(tmp_path / "results.json") == RESULT


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("sjd2_engine.evaluation.plots")
    figures = plots.draw_all(RESULT, tmp_path)
    assert len(figures) == 3
    for path in figures:
        with Image.open(path) as image:
            image.load()
            assert image.width > 600 and np.asarray(image.convert("L")).std() > 5
    assert not list(tmp_path.glob(".*"))


def test_figures_of_ar_alone(tmp_path: Path) -> None:
    plots = pytest.importorskip("sjd2_engine.evaluation.plots")
    assert all(path.exists() for path in plots.draw_all(replace(RESULT, decoders=[AR]), tmp_path))


def test_variants_of_a_decoder_have_different_colours() -> None:
    plots = pytest.importorskip("sjd2_engine.evaluation.plots")
    hues = plots.colours(RESULT.decoders)
    assert hues[0] == hues[2], "AR is grey on all weights"
    assert len(set(hues)) == 4


def test_grid_shows_each_picture_in_its_place(tmp_path: Path) -> None:
    plots = pytest.importorskip("sjd2_engine.evaluation.plots")
    pictures = {"a": ["red", "lime"], "b": ["blue", "yellow"]}
    images = {name: [Image.new("RGB", (64, 64), c) for c in row] for name, row in pictures.items()}
    plots.image_grid(["one", "two"], images, tmp_path / "grid.png", cell=100)
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        assert (pixels == colour).all(-1).sum() == 98 * 98
    lines, columns = ((pixels == (0, 0, 255)).all(-1)).nonzero()
    assert lines.mean() < pixels.shape[0] / 2 and columns.mean() > pixels.shape[1] / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ar", DecoderSpec("ar", "base")),
        ("sjd2", DecoderSpec("sjd2", "sjd2")),
        ("jacobi@sjd2", DecoderSpec("jacobi", "sjd2")),
        ("coupled:gumbel", DecoderSpec("coupled", "base", (("coupling", "gumbel"),), ("gumbel",))),
        (
            "sjd2:ratio:W=64:top_p=0.9",
            DecoderSpec(
                "sjd2", "sjd2", (("verification", "ratio"), ("window", 64), ("top_p", 0.9)),
                ("ratio", "W=64", "top_p=0.9"),
            ),
        ),
    ],
)  # fmt: skip
def test_spec_grammar(text: str, expected: DecoderSpec) -> None:
    spec = parse_spec(text)
    assert spec == expected
    assert spec.name == text.replace("@sjd2", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sjd2:gumble", "did you mean 'gumbel'"),
        ("sjd2:", "expected key=value"),
        (":ratio", "names no decoder"),
        ("sjd@mine", "expected @base or @sjd2"),
        ("sjd:W=3:window=4", "twice"),
        ("  ,", "no decoder"),
    ],
)
def test_spec_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_specs(text)


def test_ar_comes_first_on_every_set_of_weights() -> None:
    rows = [(spec.name, spec.weights) for spec in parse_specs("sjd2,sjd,ar,jacobi@sjd2")]
    assert rows == [("ar", "base"), ("sjd", "base"), ("ar", "sjd2"), ("sjd2", "sjd2"), ("jacobi", "sjd2")]


def test_windows_are_swept_where_none_is_named() -> None:
    assert [spec.name for spec in parse_specs("ar,sjd,jacobi:W=4", "8,16")] == [
        "ar", "sjd:W=8", "sjd:W=16", "jacobi:W=4",
    ]  # fmt: skip
    for bad in ("0", "a", "8,"):
        with pytest.raises(ConfigError, match="--windows"):
            parse_specs("sjd", bad)


def test_png_carries_how_it_was_made(tmp_path: Path) -> None:
    facts = picture_facts("ein grüner Ring – 环", 7, "scenes", DecodeConfig(decoder="sjd2", window=64))
    path = save_png(Image.new("RGB", (8, 8)), picture_path(tmp_path, 3, "A green ring!", 7), facts)
    assert path.name == "003_a-green-ring_seed7.png"
    assert png_facts(path) == facts
    assert json.loads(facts["settings"])["window"] == 64
    assert list(tmp_path.iterdir()) == [path]


def test_facts_of_a_cut_off_picture_are_none(tmp_path: Path) -> None:
    path = save_png(Image.effect_noise((64, 64), 50), tmp_path / "a.png", {"prompt": "p"})
    path.write_bytes(path.read_bytes()[:-100])
    assert png_facts(path) == {} and png_facts(tmp_path / "none.png") == {}


def test_replace_file_leaves_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    path = replace_file(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        replace_file(path, 3)  # pyright: ignore[reportArgumentType]
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_folders_are_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        check_writable(tmp_path / "file" / "sub")
    assert check_writable(tmp_path / "new" / "folder").is_dir()


def test_slugs() -> None:
    assert slug("A red circle, left of…") == "a-red-circle-left-of"
    assert slug("环") == "prompt" and len(slug("word " * 40)) <= 48


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ring\n\n  a star \n")
    assert read_prompts(tmp_path / "p.txt") == ["a ring", "a star"]
    (tmp_path / "empty.txt").write_text("\n")
    for bad in ("empty.txt", "none.txt"):
        with pytest.raises(PromptError):
            read_prompts(tmp_path / bad)


def test_scene_cases_grow_at_the_end_and_judge_their_own_size_only() -> None:
    few, many = scene_cases(6, seed=1), scene_cases(12, seed=1)
    assert [case.text for case in few] == [case.text for case in many[:6]]
    assert len({case.category for case in few}) == 6
    judge = few[0].judge
    assert judge is not None
    assert judge(Image.new("RGB", (64, 64))) is None
    verdict = judge(Image.new("RGB", (128, 128), "white"))
    assert verdict is not None and not verdict.correct


def test_a_record_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    path.write_text('{"index": 0}\n{"index": 1}\n{"ind')
    assert [r["index"] for r in read_records(path)] == [0, 1]
    assert path.read_text() == '{"index": 0}\n{"index": 1}\n'
    path.write_text('{"index": 0}\n{"ind\n{"index": 2}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_records(path)
