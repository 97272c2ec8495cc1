"""The GPU check runs: its checks in the interpreter, its times with a clock that calls everything once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_mode import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_check
from benchmarks.gpu import checks, timing
from benchmarks.gpu.cases import Case, Sizes
from benchmarks.gpu.document import write
from sjd2_kernels import dispatch, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks of logarithms of 0

TINY = Sizes(
    batch=2, window=5, vocab=37, dim=24, feed=40, heads=4, kv_heads=2, head=16, length=12, layers=2,
    dtype=torch.float32, top_k=9, top_p=0.9,
)  # fmt: skip
LONE = replace(TINY, batch=1, window=2, norm=reference.RMS_NORM, rule=reference.RATIO, top_k=0)
DEVICE_ = torch.device(DEVICE)


@pytest.fixture(scope="module")
def results() -> list[checks.Check]:
    ops = tuple(dispatch.TRITON)
    plan = (TINY, (torch.float32, torch.bfloat16), ops), (LONE, (torch.float16,), ops)
    return list(checks.run_checks(DEVICE_, plan))


def test_every_op_passes(results: list[checks.Check]) -> None:
    assert [(c.op, c.dtype, c.reason) for c in results if not c.passed] == []
    assert len(results) == 3 * len(dispatch.TRITON)
    assert any(c.max_error > 0.0 for c in results)


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(TINY, DEVICE_)
    right = {op: dispatch.implementation("triton", op) for op in ("rms_norm", "verify", "commit", "sample_window")}

    def wrong(backend: str, op: str) -> Any:
        def run(*args: Any) -> Any:
            out = right[op](*args)
            if op == "commit":
                args[4][0] += 1
            elif op == "verify":
                out[1][0] += 1
            elif op == "sample_window":
                out[0][0, 0] = (out[0][0, 0] + 1) % TINY.vocab
            else:
                out[..., 0] *= 1.001
            return out

        return run if backend == "triton" else getattr(reference, op)

    monkeypatch.setattr(dispatch, "implementation", wrong)
    for op in right:
        assert not checks.check(op, case.arguments(op), torch.float32).passed, op


def test_a_refused_call_fails() -> None:
    args = Case(TINY, DEVICE_).arguments("swiglu")
    result = checks.check("swiglu", [args[0].double()], torch.float64)
    assert not result.passed and "torch.float64" in result.reason


def test_report(
    results: list[checks.Check],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "COMPILE_BUDGET", float("inf"))
    measured = []

    def once(calls: Sequence[timing.Call]) -> float:
        measured.append(len(calls))
        for call in calls:
            call()
        return 1e-5

    bench = timing.Bench(DEVICE_, once, lambda function: function, cache=1000)
    sizes = {"copy": {"size": 4096}, "ops": {"timed": [(op, TINY) for op in dispatch.TRITON]}, "step": {"sizes": TINY}}
    document = gpu_check.report(bench, results, **sizes)
    write(document, tmp_path / "out.json")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(document))
    assert document["passed"] and document["copy_gb_s"] == pytest.approx(2 * 4096 / 1e-5 / 1e9)
    assert [entry["name"] for entry in document["ops"]] == list(dispatch.TRITON)
    assert all(entry["us"] == pytest.approx(10.0) and entry["speedup_vs_compile"] == 1.0 for entry in document["ops"])
    attention = next(entry for entry in document["ops"] if entry["name"] == "window_attention")
    assert attention["speedup_vs_flash"] == 1.0 and attention["max_err"] > 0.0
    assert min(measured[1:]) >= 2  # arguments rotate
    assert document["step_us"] == pytest.approx(10.0)


def test_a_step_moves_on() -> None:
    case = Case(TINY, DEVICE_)
    run = timing.step(case)
    before = case.state["lengths"].clone()
    run()
    assert bool((case.state["lengths"] > before).all()) and bool((case.state["steps"] == 6).all())
    assert case.state["histogram"].sum() == TINY.batch


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_what_pytest_says_counts(
    results: list[checks.Check], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    groups = {"fine": ["--version"], "broken": ["tests/no_such_test.py"]}
    monkeypatch.setattr(gpu_check, "test_groups", lambda: groups)
    bench = timing.Bench(DEVICE_, lambda calls: 1.0, lambda function: function, cache=1000)
    saved: list[bool] = []
    document: dict[str, Any] = {}
    gpu_check.report(
        bench, results, False, lambda: gpu_check.run_tests(time.monotonic() + 100), document,
        lambda: saved.append(document["passed"]),
    )  # fmt: skip
    assert [(group["name"], group["passed"]) for group in document["tests"]] == [("fine", True), ("broken", False)]
    assert saved == [True, False] and "tests: broken: pytest ended with status" in capfd.readouterr().out
