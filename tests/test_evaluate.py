"""`sjd2 evaluate` end to end on the bundled model: prompts from files, samples, several metrics, going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from sjd2_engine.cli import app
from sjd2_engine.files import png_facts


def evaluate(*args: object):
    """Run the command in this process."""
    return CliRunner().invoke(app, ["evaluate", *(str(arg) for arg in args)], prog_name="sjd2")


def document(result) -> dict:
    assert result.exit_code == 0, (result.exception, result.output)
    return json.loads(result.stdout.splitlines()[-1])


def refused(result, *words: str) -> None:
    assert result.exit_code == 2, (result.exception, result.output)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


FAST = ("--decoder", "jacobi", "--window", 32, "--batch", 3)


class Means(nn.Module):
    """Mean colour of the picture's quarters: features of a picture, cheaply."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def test_it_goes_on_and_keeps_its_settings(tmp_path: Path) -> None:
    args = [*FAST, "--out", tmp_path]
    document(evaluate(*args, "--prompts", 2))
    first = (tmp_path / "images.jsonl").read_text()
    found = document(evaluate(*args, "--prompts", 3))
    text = (tmp_path / "images.jsonl").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 3
    scores = found["metrics"]["scene_eval"]
    assert scores["overall"]["total"] == found["pictures"] == 3 and len(scores["categories"]) == 3
    assert 0 <= scores["overall"]["low"] <= scores["overall"]["score"] <= scores["overall"]["high"] <= 1
    assert "| scene_eval | overall |" in (tmp_path / "evaluation.md").read_text()
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    refused(evaluate(*args, "--prompts", 3, "--temperature", 0.5), "temperature", "choose another")
    refused(evaluate(*args, "--prompts", 3, "--samples", 2), "samples was 1, is 2")


def test_a_picture_that_is_gone_is_drawn_again(tmp_path: Path) -> None:
    args = [*FAST, "--prompts", 2, "--out", tmp_path]
    document(evaluate(*args))
    record = lines(tmp_path / "images.jsonl")[1]
    lost = tmp_path / record["file"]
    before = lost.read_bytes()
    lost.unlink()
    document(evaluate(*args))
    assert lost.read_bytes() == before


def test_prompts_from_json_lines_with_samples_clip_and_fid(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(
        '{"prompt": "a red circle", "id": "x", "seed": 40}\n{"prompt": "a blue ring", "metadata": {"n": 1}}\n'
    )
    extractor = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(extractor))
    common = [*FAST, "--prompt-file", prompts, "--samples", 2, "--out", out]
    fid = ["--inception", extractor, "--reference", out / "images"]
    refused(evaluate(*common), "--prompt-file", "SceneEval")
    (out / "images").mkdir()
    refused(evaluate(*common, "--metrics", "fid", *fid), "two at least")
    assert not (out / "images.jsonl").exists(), "refused before anything was drawn"
    refused(evaluate(*common, "--metrics", "clip"), "--clip")
    refused(evaluate(*common, "--metrics", "clap"), "clap", "scene_eval, fid, clip, geneval")
    refused(evaluate(*common, "--metrics", "geneval"), "evaluation_metadata.jsonl")
    reference = tmp_path / "reference.npz"
    import numpy as np

    np.savez(reference, mu=np.zeros(12), sigma=np.eye(12))
    found = document(evaluate(*common, "--metrics", "fid", "--inception", extractor, "--reference", reference))
    drawn = lines(out / "images.jsonl")
    assert [(r["id"], r["sample"], r["seed"]) for r in drawn] == [
        ("x", 0, 40),
        ("x", 1, 41),
        (None, 0, 2),
        (None, 1, 3),
    ]
    assert drawn[2]["metadata"] == {"n": 1}
    assert png_facts(out / drawn[1]["file"])["seed"] == "41"
    assert found["metrics"]["fid"]["value"] > 1000, "far from black pictures"
    # The same command against its own pictures.
    refused(evaluate(*common, "--metrics", "fid", *fid), "fid: reference was")
    same = tmp_path / "same"
    own = ["--inception", extractor, "--reference", out / "images"]
    args = [*FAST, "--prompt-file", prompts, "--samples", 2, "--out", same, "--metrics", "fid", *own]
    assert document(evaluate(*args))["metrics"]["fid"]["value"] == pytest.approx(0, abs=0.05)


def test_other_prompts_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    line = {"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"}
    prompts.write_text(json.dumps(line) + "\n")
    args = [*FAST, "--prompt-file", prompts, "--metrics", "geneval", "--out", out]
    assert document(evaluate(*args))["metrics"]["geneval"] == {"prompts": 1, "pictures": 1, "scores": None}
    assert json.loads((out / "geneval/00000/metadata.jsonl").read_text()) == line
    prompts.write_text(json.dumps({**line, "prompt": "a blue circle"}) + "\n")
    refused(evaluate(*args), "a red circle", "a blue circle", "choose another")
