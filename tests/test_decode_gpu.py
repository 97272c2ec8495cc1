"""The decoding benchmark for GPUs: every part runs in tiny sizes, with the arithmetic of the published models."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_mode  # noqa: F401  (where kernels run is settled before triton is loaded)

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import decode_gpu, gpu_check
from benchmarks.gpu import bundled, decoding, library
from benchmarks.gpu.decoding import predictions
from benchmarks.gpu.floors import Rates, Work, core_weights, step_work
from benchmarks.gpu.geometry import GEOMETRIES, Geometry, random_model, tiny
from benchmarks.gpu.profiling import GAPS, KINDS, REST, kind_of, shares
from benchmarks.gpu.run import Run
from sjd2_engine.cache import StaticCache

KERNELS = Path(decode_gpu.__file__).parents[1] / "kernels" / "sjd2_kernels"
CPU = torch.device("cpu")


def document(part: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    status = decode_gpu.main([part, "--smoke", *more])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    status, found = document("steps", capsys, "--models", "emu3-8b,janus-pro-1b", "--out", str(out))
    assert status == 0 and json.loads(out.read_text()) == found and found["skipped"] == [] and found["complete"]
    for name, result in zip(("emu3-8b", "janus-pro-1b"), found["results"], strict=True):
        assert (result["model"], result["weights"]) == (f"tiny {name}", "random")
        points = [(c["batch"], c["window"], c["entries"]) for c in result["cells"]]
        late = [(1, 8, 60)] if name == "emu3-8b" else []  # where a goal asks for another length
        assert points == [(1, 1, 40), (1, 8, 40), *late, (2, 1, 40), (2, 8, 40)]
        for cell in result["cells"]:
            assert cell["rows"] == 2 * cell["batch"] and cell["estimated_gib"] > 0
            assert cell["step_ms"] == pytest.approx(cell["of_floor"] * cell["floor_ms"])
            assert 0 < cell["floor_ms"] <= cell["serial_floor_ms"] and cell["products_ms"] > 0 < cell["loop_ms"]
        assert len(result["predicted"]) == 2 * len(GEOMETRIES[name].published)
    (goal,) = found["goals"]
    late = found["results"][0]["cells"][2]
    assert goal["value"] == late["of_floor"] and goal["bound"] == "at most 1.4" and goal["met"] is None


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("profile", capsys)
    cells = found["results"][0]["cells"]
    assert status == 0 and [(c["batch"], c["window"]) for c in cells] == [(1, 1), (2, 8)]
    for cell, goal in zip(cells, found["goals"], strict=True):
        assert sum(cell["shares"].values()) == pytest.approx(1.0)
        assert {"matrix products", "attention", "ops of the window", GAPS} <= cell["shares"].keys()
        assert cell["kernels_per_step"] > 10 and cell["dearest"][0]["us_per_step"] > 0
        assert goal["value"] == cell["shares"][GAPS]


def test_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, found = document("transformers", capsys, "--models", "lumina-mgpt-7b,janus-pro-1b")
    assert status == 0 and [r["model"] for r in found["results"]] == ["tiny lumina-mgpt-7b", "tiny janus-pro-1b"]
    for result in found["results"]:
        assert len(result["generate"]) == 3 and list(result["engine_step_ms"]) == ["1", "8"]
        for entry in result["generate"]:
            assert entry["engine_ar_is_faster_by"] == pytest.approx(entry["token_ms"] / result["engine_step_ms"]["1"])
    guided = found["results"][0]["generate"][0]
    sjd2 = next(picture for picture in guided["predicted"] if picture["method"] == "SJD2")
    assert sjd2["engine_s"] == pytest.approx(592 * found["results"][0]["engine_step_ms"]["8"] / 1e3)
    assert sjd2["transformers_s"] == pytest.approx(72 * guided["token_ms"] / 1e3)
    assert [goal["value"] for goal in found["goals"]] == [sjd2["ratio"]]


def test_a_way_of_transformers_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    ways = {"impossible": {"rows": 1, "no_such_option": 1}, "two rows": {"rows": 2}}
    monkeypatch.setattr(library, "ways", lambda *given: ways)
    run = Run(CPU, torch.float32, time.monotonic() + 60, smoke=True, say=lambda line: None)
    geometry = tiny(GEOMETRIES["janus-pro-1b"])
    library.compare(run, geometry, random_model(geometry, CPU, torch.float32), 8)
    assert [entry["way"] for entry in run.results[0]["generate"]] == ["two rows"]
    assert len(run.skipped) == 1 and "no_such_option" in run.skipped[0]


def test_scenes_and_sync(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("scenes", capsys)
    (cell,) = found["results"][0]["cells"]
    assert status == 0 and found["passed"] and cell["same_tokens_as_eager"] and cell["images_per_s"] > 0
    status, found = document("sync", capsys)
    assert status == 0 and found["passed"] and found["results"][0]["checked"] is torch.cuda.is_available()
    assert found["results"][0]["cells"][0]["steps"] > 20


def test_throughput_is_held_against_ar() -> None:
    """Four decoders and two batches by hand: the best exact one of the large batch is judged, by both of AR's rates."""
    rates = {
        ("ar", 1): 2.0,
        ("jacobi", 1): 3.0,
        ("sjd2", 1): 4.0,
        ("ar", 8): 6.0,
        ("jacobi", 8): 9.0,
        ("sjd2", 8): 12.0,
    }
    cells = [
        {"decoder": d, "batch": b, "images_per_s": rate, "exact": d != "sjd2"} for (d, b), rate in rates.items()
    ]  # fmt: skip
    run = Run(CPU, torch.float32, time.monotonic(), say=lambda line: None)
    bundled.hold_against_ar(run, "float32", cells)
    assert [cell["over_ar_alone"] for cell in cells] == [1.0, 1.5, 2.0, 3.0, 4.5, 6.0]
    assert [cell["over_ar_beside"] for cell in cells] == [1.0, 1.5, 2.0, 1.0, 1.5, 2.0]
    assert [(goal["value"], goal["met"]) for goal in run.goals] == [(4.5, True), (1.5, True)]


def test_a_part_ends_in_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("steps", capsys, "--budget", "-1")
    assert status == 0 and found["results"] == [] and found["skipped"] == ["lumina-mgpt-7b: no time left"]


def test_points_that_take_too_long_are_left_out() -> None:
    """After a cell as slow as the time that is left, the others of its slots are named and not begun."""
    said: list[str] = []
    run = Run(CPU, torch.float32, time.monotonic() + 1000, attention="cpu", say=said.append)
    geometry = tiny(GEOMETRIES["janus-pro-1b"])

    def save() -> None:
        run.slowest = 900.0

    run.save = save
    decoding.steps(run, geometry, Rates(1e9, 1e9), widths=(4, 8), batches=(1, 2))
    assert [(c["batch"], c["window"]) for c in run.results[0]["cells"]] == [(1, 4)]
    assert run.skipped == ["jacobi B=1 W=8: no time left", "jacobi B=2 W=4, W=8: no time left"]
    assert any(line.startswith("skipped jacobi B=1 W=8") for line in said)


def test_what_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode_gpu.main(["steps"]) == 2 and "--smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        decode_gpu.main(["steps", "--models", "lumina"])
    assert "lumina-mgpt-7b" in capsys.readouterr().err


def test_sizes_of_the_published_models() -> None:
    seven, emu, small = (GEOMETRIES[name] for name in ("lumina-mgpt-7b", "emu3-8b", "janus-pro-1b"))
    assert [len(g.layout) for g in (seven, emu, small)] == [48 * 49 + 2, 90 * 91 + 3, 576]
    layer = 4096 * (3 * 4096) + 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096 + 4 * 32 * 128
    assert core_weights(seven) == 32 * layer + 4096 + 8192 * 4096
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert core_weights(emu) == 32 * layer + 4096 + 32768 * 4096
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048
    assert core_weights(small) == 24 * layer + 2048 + (2048 * 2048 + 2048) + (16384 * 2048 + 16384)


def test_the_floor_of_a_step() -> None:
    """Against a count by hand: every query sees the entries before it and itself."""
    geometry = tiny(GEOMETRIES["emu3-8b"])
    work = step_work(geometry, geometry.config("jacobi", 4), 2, 4, torch.bfloat16)
    entries, layers, heads, kv_heads, dim = geometry.prompt - 1 + 36, 2, 4, 2, 16
    assert entries == geometry.middle
    assert work.weights == 2 * core_weights(geometry)
    assert work.cache == 4 * (entries + 4) * layers * 2 * kv_heads * dim * 2
    pairs = sum(entries + t + 1 for t in range(4))
    assert work.operations == 2 * core_weights(geometry) * 16 + 4 * 4 * pairs * heads * dim * layers
    slow = Work(300, 100, 1000)
    assert slow.floor(Rates(100.0, 1000.0)) == 4.0 and slow.serial(Rates(100.0, 1000.0)) == 5.0
    assert slow.floor(Rates(1000.0, 100.0)) == 10.0


def test_predictions_take_the_published_windows_in_mid_picture() -> None:
    geometry = GEOMETRIES["lumina-mgpt-7b"]
    cells = [
        {"batch": b, "window": w, "loop_ms": 10.0 * b + w, "entries": entries}
        for b in (1, 8) for w in (1, 96) for entries in (geometry.middle, 9)
    ]  # fmt: skip
    found = predictions(geometry, cells)
    assert [(entry["method"], entry["batch"]) for entry in found] == [
        (method, batch) for batch in (1, 8) for method in ("AR", "SJD", "SJD2")
    ]
    seconds = [2357 * 0.011, 1060 * 0.106, 592 * 0.106, 2357 * 0.081, 1060 * 0.176, 592 * 0.176]
    assert [entry["predicted_s"] for entry in found] == pytest.approx(seconds)
    last = found[-1]
    assert last["predicted_images_per_s"] == pytest.approx(8 / seconds[-1])
    assert last["over_ar_alone"] == pytest.approx(8 * seconds[0] / seconds[-1])
    assert last["over_ar_beside"] == pytest.approx(seconds[3] / seconds[-1])


def test_shares_count_every_moment_once() -> None:
    spans = [
        ("sm90_xmma_gemm_bf16", 0.0, 4.0), ("_window_attention_kernel", 3.0, 5.0), ("_sample_kernel", 6.0, 9.0),
        ("elementwise_kernel", 7.0, 8.0), ("elementwise_kernel", 9.0, 10.0),
    ]  # fmt: skip
    parts = shares(spans)
    expected = {"matrix products": 0.4, "attention": 0.1, GAPS: 0.1, "ops of the window": 0.3, REST: 0.1}
    assert parts == pytest.approx(expected)


def test_every_kernel_of_ours_has_a_kind() -> None:
    names = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    kinds = {name: kind_of(name) for name in names}
    assert len(names) > 12 and REST not in kinds.values(), kinds
    assert {kinds["_window_attention_kernel"], kinds["_rms_norm_kernel"], kinds["_commit_kernel"]} == {
        kind for kind, _ in KINDS[:3]
    }
    for name in ("nvjet_tst_192x192_64x4_1x2_h_bz_TNT", "ampere_sgemm_128x64_tn", "void cublasLt::splitKreduce_kernel"):
        assert kind_of(name) == "matrix products"
    assert kind_of("void flash_fwd_splitkv_kernel") == "attention"


@pytest.mark.parametrize("name", ["lumina-mgpt-7b", "emu3-8b", "janus-pro-1b"])
def test_transformers_has_the_same_weights(name: str) -> None:
    pytest.importorskip("transformers")
    geometry = tiny(GEOMETRIES[name])
    model = random_model(geometry, CPU, torch.float64).transformer
    theirs = library.library_model(geometry, model)
    ids = torch.randint(2, geometry.vocabulary, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = StaticCache(geometry.core, 1, 9, 0, CPU, torch.float64)
        hidden = cache.forward(model, model.embedding[ids])
        ours = model.head(hidden) if geometry.core.head_hidden else F.linear(hidden, model.embedding)
        got = theirs(ids).logits
    columns = [0, *range(2, ours.shape[-1])]  # Chameleon leaves one image id out
    torch.testing.assert_close(got[..., columns], ours[..., columns], rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_noted() -> None:
    run = Run(CPU, torch.float32, time.monotonic() + 10, say=lambda line: None)
    assert run.has_time_for("short", 1) and not run.has_time_for("long", 100)
    assert run.skipped == ["long: no time left"]


def test_goals() -> None:
    run = Run(CPU, torch.float32, 0.0, say=lambda line: None)
    for value in (1.2, 1.3):
        run.goal("ratio", value, at_most=1.25)
        run.goal("speed", value, at_least=1.25)
    assert [goal["met"] for goal in run.goals] == [True, False, False, True]


def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "steps.json"
    seen = []

    def stop(run: Run, geometry: Geometry, result: dict[str, Any]) -> None:
        seen.append(json.loads(out.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "judge", stop)
    with pytest.raises(KeyboardInterrupt):
        decode_gpu.main(["steps", "--smoke", "--models", "janus-pro-1b", "--out", str(out)])
    assert len(seen[0]["results"][0]["cells"]) == 4 and not seen[0]["complete"]
    assert json.loads(out.read_text()) == seen[0]


def test_the_gpu_check_runs_the_engines_tests_first() -> None:
    groups = gpu_check.test_groups()
    first, others, kernels = groups.values()
    assert first == [str(KERNELS.parents[1] / "tests" / "test_gpu_engine.py")]
    assert others[:2] == ["-m", "gpu"] and any(path.endswith("test_attention.py") for path in others)
    assert all(Path(path).is_file() for path in (*first, *others[2:]))
    assert sum("test_triton_" in path for path in kernels) >= 6


def test_floors_in_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/performance.md repeats what the command beside its table prints, which needs no GPU."""
    assert decode_gpu.main(["floors", "--models", ",".join(GEOMETRIES)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = {
        (result["model"], cell["batch"], cell["window"], cell["entries"]): cell
        for result in found["results"] for cell in result["cells"]
    }  # fmt: skip
    text = (KERNELS.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    row = r"^\| ([a-z0-9-]+b)(?:, ([\d,]+) entries)? \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ms \|"
    rows = re.findall(row, text, re.M)
    assert len(rows) > 10
    for name, entries, batch, window, *numbers in rows:
        entries = int(entries.replace(",", "")) if entries else GEOMETRIES[name].middle
        cell = cells[name, int(batch), int(window), entries]
        got = f"{cell['gigabytes']:.1f}", f"{cell['teraflop']:.2f}", f"{cell['floor_ms']:.2f}"
        assert got == tuple(numbers), (name, batch, window)
