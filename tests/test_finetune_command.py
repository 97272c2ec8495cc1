"""`sjd2 finetune` on the command line: what cannot work is said at once, the dry run says whether it fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import finetuning

from sjd2_engine.cli import app


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["finetune", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    for kind in ("llamagen-c2i", "chameleon"):
        folder = finetuning.write_checkpoint(kind, root / kind)
        model = finetuning.load(kind, folder)
        finetuning.write_store(model, root / f"{kind}-data", finetuning.texts_of(kind))
    return root


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--levels", "0"), "levels=0"),
        (("--levels", "many"), "--levels is 'many'"),
        (("--segment", "3"), "--segment is '3'"),
        (("--t-min", "2"), "t_min=2.0"),
        (("--rate", "-1"), "rate=-1.0"),
        ((), "needs --data"),
        (("--data", "nowhere"), "dataset.json is missing"),
        (("--data", "DATA"), "prepared for another model: the model family is 'chameleon'"),
        (("--data", "OWN"), "12 pictures: 256 are kept apart and one step takes 64"),
        (("--data", "OWN", "--batch", "3", "--micro-batch", "2"), "batch=3 is no multiple of micro_batch=2"),
        (("--data", "OWN", "--track", "abacus"), "--track abacus is not installed"),
        (("--data", "OWN", "--shard"), "single one; start it by: accelerate launch"),
        (("--model", "nothing-here"), "there is no model"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    words: tuple[str, ...], expected: str, places: Path, tmp_path: Path
) -> None:
    named = {"DATA": places / "chameleon-data", "OWN": places / "llamagen-c2i-data"}
    given = [named.get(word, word) for word in words]
    if "--shard" in words:
        given += ["--batch", "4", "--validation", "2"]
    code, output = command("--model", places / "llamagen-c2i", "--out", tmp_path, "--device", "cpu", *given)
    assert code == 2 and output.startswith("sjd2: error:") and expected in output, output


def test_a_folder_that_cannot_be_written_to(places: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = command("--model", places / "llamagen-c2i", "--out", tmp_path / "file")
    assert code == 2 and "cannot write to folder" in output


def test_a_damaged_shard_is_named(places: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(places / "llamagen-c2i-data", data)
    shard = sorted(data.glob("shard-*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-300] ^= 1
    shard.write_bytes(raw)
    words = ("--data", data, "--out", tmp_path / "out", "--batch", "4", "--validation", "2", "--steps", "9")
    code, output = command("--model", places / "llamagen-c2i", "--device", "cpu", *words)
    assert code == 2 and shard.name in output and "damaged" in output


def test_the_dry_run_says_whether_it_fits(places: Path) -> None:
    words = ("--model", places / "llamagen-c2i", "--data", places / "llamagen-c2i-data", "--dry-run", "--devices", "2")
    words += ("--batch", "2", "--validation", "2", "--gpu", "H100")
    code, output = command(*words, "--memory", "80")
    assert code == 0 and "fits: 2." in output and "30 steps of 2 of 10 pictures" in output and "peak of H100" in output
    code, output = command(*words, "--memory", "1")
    assert code == 1 and "does not fit" in output and "--shard" in output
