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

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import decode_gpu
from benchmarks.gpu import library
from benchmarks.gpu.decoding import Run, predictions
from benchmarks.gpu.floors import Rates, Work, core_weights, step_work
from benchmarks.gpu.geometry import GEOMETRIES, random_model, tiny
from benchmarks.gpu.profiling import GAPS, KINDS, REST, kind_of, shares
from sjd2_engine.cache import StaticCache

KERNELS = Path(decode_gpu.__file__).parents[1] / "kernels" / "sjd2_kernels"
CPU = torch.device("cpu")


def document(part: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    status = decode_gpu.main([part, "--smoke", *more])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    status, found = document("steps", capsys, "--models", "emu3-8b,janus-pro-1b", "--out", str(out))
    assert status == 0 and json.loads(out.read_text()) == found and found["skipped"] == []
    for name, result in zip(("emu3-8b", "janus-pro-1b"), found["results"], strict=True):
        assert (result["model"], result["weights"]) == (name, "random")
        assert [(c["batch"], c["window"]) for c in result["cells"]] == [(b, w) for b in (1, 2) for w in (1, 4, 8)]
        for cell in result["cells"]:
            assert cell["rows"] == 2 * cell["batch"]
            assert cell["step_ms"] == pytest.approx(cell["of_floor"] * cell["floor_ms"])
            assert 0 < cell["floor_ms"] <= cell["serial_floor_ms"] and cell["products_ms"] > 0 < cell["loop_ms"]
        for entry, published in zip(result["predicted"], GEOMETRIES[name].published, strict=True):
            assert entry["predicted_s"] == pytest.approx(published.forwards * entry["step_ms"] / 1e3)


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("profile", capsys)
    cells = found["results"][0]["cells"]
    assert status == 0 and [(c["batch"], c["window"]) for c in cells] == [(1, 1), (2, 8)]
    for cell in cells:
        assert sum(cell["shares"].values()) == pytest.approx(1.0)
        assert {"matrix products", "ops of the window", GAPS} <= cell["shares"].keys()
        assert cell["kernels_per_step"] > 10 and cell["dearest"][0]["us_per_step"] > 0


def test_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, found = document("transformers", capsys)
    (result,) = found["results"]
    assert status == 0 and len(result["generate"]) == 3
    for entry in result["generate"]:
        assert entry["engine_is_faster_by"] == pytest.approx(entry["token_ms"] / result["engine_ar_ms"])


def test_scenes_and_sync(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("scenes", capsys)
    (cell,) = found["cells"]
    assert status == 0 and found["passed"] and cell["same_tokens_as_eager"] and cell["images_per_s"] > 0
    status, found = document("sync", capsys)
    assert status == 0 and found["passed"] and found["checked"] is torch.cuda.is_available()
    assert found["decoders"][0]["steps"] > 20


def test_a_part_ends_in_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = document("steps", capsys, "--budget", "-1")
    assert status == 0 and found["results"] == [] and found["skipped"] == ["lumina-mgpt-7b: no time left"]


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
    entries, layers, heads, kv_heads, dim = geometry.prompt - 1 + geometry.middle, 2, 4, 2, 16
    assert work.weights == 2 * core_weights(geometry)
    assert work.cache == 4 * (entries + 4) * layers * 2 * kv_heads * dim * 2
    pairs = sum(entries + t + 1 for t in range(4))
    assert work.operations == 2 * core_weights(geometry) * 16 + 4 * 4 * pairs * heads * dim * layers
    slow = Work(300, 100, 1000)
    assert slow.floor(Rates(100.0, 1000.0)) == 4.0 and slow.serial(Rates(100.0, 1000.0)) == 5.0
    assert slow.floor(Rates(1000.0, 100.0)) == 10.0


def test_predictions_take_the_published_window_of_one_picture() -> None:
    geometry = GEOMETRIES["lumina-mgpt-7b"]
    cells = [{"batch": b, "window": w, "step_ms": 10.0 * b + w} for b in (1, 8) for w in (1, 96)]
    assert [entry["predicted_s"] for entry in predictions(geometry, cells)] == [
        pytest.approx(2357 * 0.011), pytest.approx(1060 * 0.106), pytest.approx(592 * 0.106)
    ]  # fmt: skip


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


@pytest.mark.parametrize("name", ["lumina-mgpt-7b", "emu3-8b"])
def test_transformers_has_the_same_weights(name: str) -> None:
    pytest.importorskip("transformers")
    geometry = tiny(GEOMETRIES[name])
    model = random_model(geometry, CPU, torch.float64).transformer
    theirs = library.library_model(geometry, model)
    ids = torch.randint(2, geometry.vocabulary, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = StaticCache(geometry.core, 1, 9, 0, CPU, torch.float64)
        ours = F.linear(cache.forward(model, model.embedding[ids]), model.embedding)
        got = theirs(ids).logits
    columns = [0, *range(2, geometry.vocabulary)]  # Chameleon leaves one image id out
    torch.testing.assert_close(got[..., columns], ours[..., columns], rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_noted() -> None:
    run = Run(CPU, torch.float32, time.monotonic() + 10, say=lambda line: None)
    assert run.has_time_for("short", 1) and not run.has_time_for("long", 100)
    assert run.skipped == ["long: no time left"]
