"""What the plan of a large run rests on: its arithmetic, and the driver with very many prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import batch_driver, plan_run


def lines(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    plan_run.main(options)
    table, document = capsys.readouterr().out.rsplit("\n", 2)[:2]
    found = json.loads(document)["lines"]
    assert table.count("\n| ") == len(found) + 1 and "nothing measured" in table
    return found


def test_plain_decoding_is_bound_by_memory_and_wide_windows_by_products(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        (line["model"], line["decoder"], line["batch"]): line
        for line in lines(capsys, "--images", "3600", "--copy", "2", "--matmul", "500", "--slack", "1")
    }
    ar = found["lumina-mgpt-7b", "AR", 1]
    # 6.6 billion numbers in the blocks, norms and the head over 8192 ids; keys and values of two half pictures.
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    entries = 95 + 2357 // 2 + 1
    kv = 2 * entries * 2 * 32 * 4096
    assert ar["step_ms"] == pytest.approx(1e3 * 2 * (blocks + 8192 * 4096 + kv) / 2e12, rel=1e-3)
    assert ar["picture_s"] == pytest.approx(2357 * ar["step_ms"] / 1e3)
    assert ar["gpu_hours"] == pytest.approx(ar["picture_s"])  # 3600 pictures
    wide = found["lumina-mgpt-7b", "SJD2", 16]
    products = 2 * (blocks + 8192 * 4096) * 2 * 16 * 96
    assert 1e3 * products / 500e12 < wide["step_ms"] < 1.1 * 1e3 * products / 500e12
    assert wide["picture_s"] == pytest.approx(592 * wide["step_ms"] / 1e3 / 16)


def test_batches_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, "--memory", "20")
    assert all(line["memory_gib"] < 20 for line in found)
    assert {line["batch"] for line in found if line["model"] == "lumina-mgpt-7b"} == {1}
    assert {line["batch"] for line in found if line["model"] == "janus-pro-1b"} == {1, 4, 16}


def test_memory_counts_weights_and_whole_pictures() -> None:
    lumina = plan_run.GEOMETRIES["lumina-mgpt-7b"]
    one, five = (plan_run.memory_bytes(lumina, batch, 96) for batch in (1, 5))
    assert (five - one) // 4 == 2 * (96 + len(lumina.layout) + 96) * 2 * 32 * 4096 * 2
    assert 13.3e9 < one - (five - one) / 4 < 14.2e9  # 6.9 billion numbers of two bytes


def test_the_driver_finds_every_picture_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["batch_driver.py", "--prompts", "1200"])  # in two folders
    batch_driver.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["prompts"] == 1200 and found["manifest_bytes"] > 1200 * 200
    assert all(found[part]["cpu_s"] >= 0 < found[part]["peak_mib"] for part in ("read", "open", "finish", "resume"))
