"""`sjd2 finetune` as processes: killed ones go on bit for bit, two give what one gives, whole or sharded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
import finetuning

# Each process imports everything anew: a minute for all.
pytestmark = pytest.mark.slow

KIND, STEPS = "llamagen-c2i", 6
OPTIONS = (
    "--device cpu --precision float32 --levels 3 --t-min 0.5 --segment 1,2 --clean-run 0,3 --batch 4 --validation 3 "
    f"--warmup 1 --rate 0.002 --log-every 1 --save-every 1 --steps {STEPS}"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data, and what one undisturbed process makes of them."""
    root = tmp_path_factory.mktemp("processes")
    folder = finetuning.write_checkpoint(KIND, root / "base")
    finetuning.write_store(finetuning.load(KIND, folder), root / "data", finetuning.texts_of(KIND))
    (process,) = start(root, root / "one", "--micro-batch", "4")
    finish(process)
    return root


def start(root: Path, out: Path, *options: str, count: int = 1) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "sjd2_engine.cli", "finetune", "--model", str(root / "base")]
    command += ["--data", str(root / "data"), "--out", str(out), *OPTIONS, *options]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | both if count > 1 else {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env={**os.environ, **own}, **pipes))
    return processes


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output[-3000:]
    return output


def test_killed_again_and_again_it_ends_with_the_same_weights(place: Path) -> None:
    out = place / "killed"
    for reached in (2, 4):
        (process,) = start(place, out, "--micro-batch", "4")
        while not any(int(path.name[5:13]) >= reached for path in (out / "run").glob("step-????????")):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "config.json").exists()
    (process,) = start(place, out, "--micro-batch", "4")
    finish(process)
    assert (out / "model.safetensors").read_bytes() == (place / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["whole", "sharded"])
def test_two_processes_give_what_one_gives(options: tuple[str, ...], place: Path) -> None:
    out = place / f"two{''.join(options)}"
    for process in start(place, out, "--micro-batch", "1", *options, count=2):
        finish(process)
    assert len(finetuning.losses(out)) == STEPS
    # Sums of floating-point numbers in another order; the losses themselves fall from 4.6 to 3.9.
    assert finetuning.losses(out) == pytest.approx(finetuning.losses(place / "one"), abs=2e-5)
    mine, theirs = (load_file(path / "model.safetensors") for path in (out, place / "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=2e-4, rtol=1e-3)
    reports = [json.loads((path / "run" / "report.json").read_text()) for path in (out, place / "one")]
    assert reports[0]["validation_loss"] == pytest.approx(reports[1]["validation_loss"], abs=2e-5)
