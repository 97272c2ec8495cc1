"""The ablations: a run that was cut goes on where it was, and the documents show what is on file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.ablations import Cell, Measured
from sjd2_engine import Engine
from sjd2_engine.evaluation.prompts import scene_cases
from sjd2_engine.evaluation.records import read_records

ROOT = Path(__file__).resolve().parents[1]
CELL = Cell("jacobi", "base", "jacobi", 4, {"window": 16})


@pytest.mark.parametrize("name", ablations.EXPERIMENTS)
def test_the_document_shows_the_tables_of_the_results(name: str) -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name} -->\n+(.*?)\n+<!-- /table -->", text, re.DOTALL)
    made = ablations.table(name, read_records(ablations.RESULTS))
    assert found and found[1] == made
    assert "not measured" not in made


def test_a_cut_run_goes_on_where_it_was(base: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "BATCH", 2)
    monkeypatch.setattr(Engine, "from_pretrained", lambda model: base)
    path = tmp_path / "results.jsonl"
    ablations.run([CELL], path)
    whole = path.read_text()
    first, second = whole.splitlines()
    path.write_text(first + "\n" + second[: len(second) // 2])
    assert [start for _, start in ablations.missing([CELL], ablations.usable(path))] == [2]
    ablations.run([CELL], path)
    assert path.read_text() == whole, "the same captions and seeds: the same passes and verdicts"
    measured = Measured.of(CELL, ablations.usable(path))
    assert measured and len(measured.correct) == 4
    result = base.generate([case.text for case in scene_cases(4, 7)], "jacobi", window=16, seed=7)
    assert measured.forward_passes == result.stats.forward_passes
    assert Measured.of(Cell("more", "base", "jacobi", 6, {"window": 16}), ablations.usable(path)) is None


def test_results_of_other_weights_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(ablations.RESULTS.read_text().splitlines()[0] + "\n")
    (record,) = read_records(path)
    monkeypatch.setattr(ablations, "weights_digest", lambda model: record["digest"])
    assert ablations.usable(path) == [record]
    monkeypatch.setattr(ablations, "weights_digest", lambda model: "0" * 12)
    assert ablations.usable(path) == []
