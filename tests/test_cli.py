"""The `sjd2` command end to end on the bundled model: what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sjd2_engine
from sjd2_engine.cli import app
from sjd2_engine.evaluation.results import BenchResult
from sjd2_engine.files import png_facts

WEIGHTS = Path(sjd2_engine.__file__).parent / "weights"
needs_model = pytest.mark.skipif(
    not (WEIGHTS / "scenes-sjd2").is_dir(), reason="the bundled weights are not in this tree"
)
PROMPT = "a red circle left of a blue square"


def sjd2(*args: object):
    """Run the command in this process; usage errors and exits come back as results."""
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="sjd2")


def assert_refused(result, *words: str) -> None:
    """Exit code 2, one line on stderr that holds the words, nothing on stdout, no traceback."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, (result.exception, result.output)
    assert len(lines) == 1 and lines[0].startswith("sjd2: error: "), result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0]


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


# ------------------------------------------------------------------ without weights


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate"], ["no prompt given"]),
        (["generate", PROMPT, "--windo", 3], ["--windo", "sjd2 generate --help"]),
        (["generate", PROMPT, "--seed", "x"], ["--seed"]),
        (["generate", "--prompt-file", "no/such/file"], ["no/such/file"]),
        (["generat", PROMPT], ["generat", "Did you mean"]),
        (["bench", "--prompts", 0], ["--prompts is 0", "at least 1"]),
        (["bench", "--batch", -1], ["--batch is -1"]),
        (["bench", "--decoders", ","], ["no decoder"]),
        (["bench", "--decoders", "sjd2:gumble"], ["gumble", "did you mean 'gumbel'"]),
        (["bench", "--decoders", "sjd@mine"], ["@base or @sjd2"]),
        (["bench", "--windows", "0,4"], ["--windows"]),
        (["evaluate", "--prompts", 0], ["--prompts is 0"]),
    ],
)
def test_bad_arguments_are_one_line(args: list, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Last, so that `generat` is still the word in the command's place.
    assert_refused(sjd2(*args, "--out", out), *words)
    assert not files_in(out)


@pytest.mark.parametrize("command", [["generate", PROMPT], ["bench"], ["evaluate"]])
def test_an_unwritable_folder_is_found_before_the_model_is_loaded(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert_refused(sjd2(*command, "--out", out, "--model", "no-such-model"), "cannot write", str(out))


@pytest.mark.parametrize("command", [["generate", PROMPT], ["bench"], ["evaluate"]])
def test_an_unknown_model_is_named(command: list[str], tmp_path: Path) -> None:
    result = sjd2(*command, "--model", "scenez", "--out", tmp_path)
    assert_refused(result, "scenez")
    assert not files_in(tmp_path)


def test_doctor_names_every_op_and_its_backend() -> None:
    from sjd2_kernels.ops import NAMES

    result = sjd2("doctor", "--json")
    assert result.exit_code == 0, result.exception
    facts = json.loads(result.stdout)
    assert {row["op"] for row in facts["ops"]} == set(NAMES)
    assert all(row["backend"] and row["why"] for row in facts["ops"])
    assert facts["devices"][-1]["device"] == "cpu" and "torch" in facts["versions"]


def test_doctor_as_tables() -> None:
    result = sjd2("doctor")
    assert result.exit_code == 0 and "embed_window" in result.stdout


def test_help_of_every_command() -> None:
    for command in ([], ["generate"], ["bench"], ["evaluate"], ["doctor"]):
        result = sjd2(*command, "--help")
        assert result.exit_code == 0 and "--help" in result.stdout


# ------------------------------------------------------------------ generate


@needs_model
def test_generate_writes_pictures_that_say_how_they_were_made(tmp_path: Path) -> None:
    prompts = [PROMPT, "three green stars"]
    result = sjd2("generate", *prompts, "-o", tmp_path, "--decoder", "jacobi", "--seed", 5, "--window", 16)
    assert result.exit_code == 0, (result.exception, result.stderr)
    names = ["000_a-red-circle-left-of-a-blue-square_seed5.png", "001_three-green-stars_seed6.png"]
    assert [path.name for path in files_in(tmp_path)] == names
    for name, prompt, seed in zip(names, prompts, ("5", "6")):
        facts = png_facts(tmp_path / name)
        assert (facts["prompt"], facts["seed"], facts["decoder"]) == (prompt, seed, "jacobi")
        assert facts["model"] == "scenes-sjd2" and json.loads(facts["settings"])["window"] == 16
        with Image.open(tmp_path / name) as image:
            assert image.size == (128, 128)


@needs_model
def test_generate_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = ["generate", PROMPT, "a large ring", "-o", tmp_path, "--decoder", "jacobi"]
    assert sjd2(*args).exit_code == 0
    kept, cut = files_in(tmp_path)
    before, whole = kept.stat().st_mtime_ns, cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    again = sjd2(*args)
    assert again.stdout.count("kept") == 1
    assert kept.stat().st_mtime_ns == before and cut.read_bytes() == whole
    other = sjd2(*args, "--temperature", 0.5)
    assert other.exit_code == 0 and "kept" not in other.stdout
    assert json.loads(png_facts(kept)["settings"])["temperature"] == 0.5


@needs_model
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([PROMPT, "--decoder", "sjdd"], ["sjdd", "sjd"]),
        ([PROMPT, "--window", 0], ["window=0"]),
        ([PROMPT, "--temperature", -1], ["temperature=-1"]),
        ([PROMPT, "--top-p", 2], ["top_p"]),
        ([PROMPT, "--seed", -1], ["seed"]),
        ([PROMPT, "--verification", "mach"], ["mach", "match"]),
        ([PROMPT, "--device", "gpu7"], ["gpu7"]),
        ([PROMPT, "--dtype", "float99"], ["float99"]),
        ([""], ["empty"]),
        ([PROMPT, "a red elephant"], ["elephant"]),
        (["a red circle " * 200], []),
        ([PROMPT, "--negative-prompt", "an elephant"], ["elephant"]),
        ([PROMPT, "--model", "scenes", "--decoder", "sjd2"], ["finetune"]),
    ],
)
def test_generate_refuses_in_one_line_and_writes_nothing(args: list, words: list[str], tmp_path: Path) -> None:
    result = sjd2("generate", *args, "-o", tmp_path)
    assert_refused(result, *words)
    assert not files_in(tmp_path)


@needs_model
@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_weights_are_named(damage: str, tmp_path: Path) -> None:
    model = shutil.copytree(WEIGHTS / "scenes-sjd2", tmp_path / "model")
    file = max(model.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "garbage":
        file.write_bytes(b"not a checkpoint" * 100)
    else:
        file.unlink()
    assert_refused(sjd2("generate", PROMPT, "--model", model, "-o", tmp_path / "out"), file.name)
    assert not files_in(tmp_path / "out")


@needs_model
@pytest.mark.parametrize("batch", [1, 4])
def test_a_picture_that_fails_is_named_and_the_others_are_written(batch: int, tmp_path: Path) -> None:
    model = shutil.copytree(WEIGHTS / "scenes-sjd2", tmp_path / "model")
    words = json.loads((model / "config.json").read_text())["words"]
    tensors = load_file(model / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    table[len(table) - len(words) + words.index("star")] = float("nan")
    save_file(tensors, model / "model.safetensors")
    out = tmp_path / "out"
    result = sjd2(
        "generate", "a red ring", "a blue star", "a green cross", "--model", model, "-o", out,
        "--decoder", "jacobi", "--max-batch", batch,
    )  # fmt: skip
    assert result.exit_code == 2
    assert [path.name[:3] for path in files_in(out)] == ["000", "002"]
    assert "001_a-blue-star_seed1.png" in result.stderr and len(result.stderr.splitlines()) == 1
    alone = sjd2("generate", "a blue star", "--model", model, "-o", tmp_path / "none", "--decoder", "sjd2")
    assert_refused(alone, "000_a-blue-star_seed0.png", "NaN")
    assert not files_in(tmp_path / "none")


# ------------------------------------------------------------------ bench


@needs_model
def test_bench_writes_the_whole_comparison(tmp_path: Path) -> None:
    result = sjd2(
        "bench", "--decoders", "jacobi,sjd2:W=32", "--prompts", 2, "--warmup", 0, "--out", tmp_path
    )  # fmt: skip
    assert result.exit_code == 0, (result.exception, result.stderr)
    bench = BenchResult.from_json(result.stdout.splitlines()[-1])
    assert bench == BenchResult.from_json((tmp_path / "results.json").read_text())
    rows = [(row.name, row.weights) for row in bench.decoders]
    assert rows == [("ar", "base"), ("jacobi", "base"), ("ar", "sjd2"), ("sjd2:W=32", "sjd2")]
    ar, jacobi, tuned_ar, sjd2_row = bench.decoders
    assert ar.forward_passes_mean == tuned_ar.forward_passes_mean >= ar.tokens - 16
    assert jacobi.forward_passes_mean < ar.forward_passes_mean > sjd2_row.forward_passes_mean
    assert ar.speedup_vs_ar == tuned_ar.speedup_vs_ar == 1.0
    assert jacobi.step_compression == pytest.approx(jacobi.tokens / jacobi.forward_passes_mean)
    for row in bench.decoders:
        accepted = sum(int(count) * steps for count, steps in row.accepted_per_step.items())
        assert accepted == 2 * row.tokens, "every token of every picture was accepted once"
        assert row.exact and row.peak_memory_bytes > 0 and 0 <= row.scene_eval["overall"] <= 1
    names = {path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path)}
    assert {"results.json", "results.md", "runs.jsonl", "grid.png", "plots/speedup.png"} <= names
    assert sum(name.startswith("images/") for name in names) == 8
    assert "jacobi (base weights) 2 of 2" in (tmp_path / "results.md").read_text()


@needs_model
def test_bench_refuses_sjd2_on_base_weights_before_decoding(tmp_path: Path) -> None:
    result = sjd2("bench", "--decoders", "sjd2@base", "--prompts", 1, "--out", tmp_path)
    assert_refused(result, "finetune")
    assert not files_in(tmp_path)


@needs_model
@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    args = ["generate", PROMPT, "-o", str(tmp_path), "--decoder", "jacobi"]
    command = [sys.executable, "-m", "sjd2_engine.cli", *args]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and len(files_in(tmp_path)) == 1, run.stderr
