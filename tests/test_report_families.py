"""The report on checkpoints of other families, whose pictures nothing here can judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import finetuning

from sjd2_engine import Engine
from sjd2_engine.evaluation import bench, report, studies
from sjd2_engine.evaluation.experiments import denoise_and_test
from sjd2_engine.evaluation.prompts import Case
from sjd2_engine.evaluation.specs import parse_specs

KINDS = ("chameleon", "emu3", "llamagen-t2i")


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_any_family(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "windows_of", lambda default: [8])
    (tmp_path / "models").mkdir()
    folder = finetuning.write_checkpoint(kind, tmp_path / "models" / "base")
    (folder / "sjd2.json").write_text('{"levels": 2, "t_min": 0.5}')
    size = finetuning.options_of(kind).image_size
    engine = Engine.from_pretrained(str(folder), "cpu", image_size=size, allow_pickle=True)
    texts = finetuning.texts_of(kind)
    rows = bench.contenders(parse_specs("jacobi@sjd2:W=6,sjd2:W=8"), {"sjd2": engine})
    plan = bench.Plan([Case(text) for text in texts], warmup=0)
    page = report.write_report(plan, rows, bench.run(plan, rows, tmp_path / "out"), tmp_path / "report")
    assert "SceneEval" not in page.read_text(encoding="utf-8")
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    height, width = engine.model.facts.image_size
    for cost in data["acceptance_maps"].values():
        assert len(cost) / len(cost[0]) == height / width
    assert all(part["share"] is None for part in data["parts"].values())
    config = engine.config_for("sjd2", window=8)
    assert torch.equal(
        denoise_and_test(engine, config, texts, [5, 6]).tokens, engine.generate(texts, "ar", seed=5).tokens
    )
