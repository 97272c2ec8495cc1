"""Ctrl-C and SIGKILL in the middle of `sjd2 generate`: finished pictures stay, the same command draws the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sjd2_engine import Engine
from sjd2_engine.cli import app

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = 12


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on(base: Engine, tmp_path: Path, how: signal.Signals) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a ring\n" * PROMPTS)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, "-m", "sjd2_engine.cli", "generate", "--prompt-file", str(prompts), "-o", str(out),
               "--model", "scenes", "--decoder", "jacobi", "--max-batch", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    done = sorted(out.glob("*.png"))
    assert 1 <= len(done) < PROMPTS
    if how == signal.SIGINT:
        assert run.returncode == 130 and "the same command draws the others" in said and "Traceback" not in said
        assert not list(out.glob(".*.tmp"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("kept") == len(done)
    assert len(list(out.glob("*.png"))) == PROMPTS
    assert stamps == {path: path.stat().st_mtime_ns for path in done}
    expected = base.generate(["a ring"] * PROMPTS, "jacobi", seed=0).images
    for path, image in zip(sorted(out.glob("*.png")), expected, strict=True):
        assert image is not None and Image.open(path).tobytes() == image.tobytes()


def test_window_auto_on_the_command_line(tmp_path: Path) -> None:
    arguments = ["generate", "a ring", "-o", str(tmp_path), "--model", "scenes", "--window"]
    assert CliRunner().invoke(app, [*arguments, "auto"]).exit_code == 0
    refused = CliRunner().invoke(app, [*arguments, "wide"])
    assert refused.exit_code == 2 and "expected a number, or auto" in refused.output
