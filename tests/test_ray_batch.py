"""`sjd2 batch`: every prompt exactly once, whoever is killed; the same pictures as `sjd2 generate`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batching import PROMPTS, WEIGHTS, Line, items_of, manifest_of, plan_for, same, sjd2, times
from safetensors.torch import load_file, save_file

from sjd2_engine import Engine
from sjd2_engine.distributed import folder
from sjd2_engine.distributed.crew import FAILED_STARTS, STRIKES, Crew
from sjd2_engine.distributed.prompts import read_items
from sjd2_engine.distributed.run import run_batch
from sjd2_engine.distributed.worker import Worker
from sjd2_engine.errors import BackendError
from sjd2_engine.files import png_facts


def start_ray(ray: Any, attempts: int = 3) -> None:
    """Ray gives its processes half a minute, which a busy machine may need more than once."""
    for attempt in range(attempts):
        try:
            ray.init(
                "local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20,
                log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == attempts - 1:
                raise


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of this host, as `ray start --head --num-cpus 2` makes it."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))  # for the workers
        start_ray(ray)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def drawn(address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Prompts, folder and result of one undisturbed run through the command."""
    root = tmp_path_factory.mktemp("batch")
    lines: list[Line] = [{"prompt": prompt, "id": f"p{i}"} for i, prompt in enumerate(PROMPTS)]
    lines[1] |= {"seed": 77}
    lines[2] |= {"negative_prompt": "a red ring"}
    (root / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["batch", root / "p.jsonl", "-o", root / "out", "--workers", 2, "--decoder", "jacobi", "--max-batch", 2]
    return root / "p.jsonl", root / "out", sjd2(*args)


def test_pictures_manifest_and_figures(drawn: tuple[Path, Path, Any], tuned: Engine, tmp_path: Path) -> None:
    _, out, result = drawn
    assert result.exit_code == 0, (result.exception, result.output)
    summary = json.loads(result.stdout.splitlines()[-1])
    lines = manifest_of(out)
    assert [(line["index"], line["id"], line["prompt"]) for line in lines] == [
        (i, f"p{i}", prompt) for i, prompt in enumerate(PROMPTS)
    ]
    assert [line["seed"] for line in lines] == [0, 77, 2, 3, 4]
    assert set(times(out)) == {line["picture"] for line in lines}
    assert not list((out / folder.STATE).glob("*/*")), "the logs are in the manifest now"
    for line in lines:
        options = {"negative_prompt": "a red ring"} if line["index"] == 2 else {}
        own = tuned.generate(line["prompt"], "jacobi", seed=line["seed"], **options)
        picture = own.images[0]
        assert picture is not None and line["forward_passes"] == own.stats.forward_passes[0]
        picture.save(tmp_path / "own.png")
        assert same(tmp_path / "own.png", out / line["picture"])
    assert (summary["drawn"], summary["kept"], summary["failed"]) == (5, 0, 0)
    assert sum(worker["pictures"] for worker in summary["workers"]) == 5 and len(summary["workers"]) == 2
    tokens = sum(int(count) * steps for count, steps in summary["accepted_per_step"].items())
    assert tokens == 5 * lines[0]["tokens"]
    passes = sum(line["forward_passes"] for line in lines)
    assert sum(summary["accepted_per_step"].values()) == passes
    assert summary["forward_passes_mean"] == pytest.approx(passes / 5)
    assert summary["step_compression"] == pytest.approx(tokens / passes, abs=1e-3)
    assert summary["images_per_s"] == pytest.approx(5 / summary["seconds"], rel=1e-2)


def test_what_is_drawn_is_kept_and_no_cluster_is_needed_for_it(drawn: tuple[Path, Path, Any]) -> None:
    file, out, _ = drawn
    before, manifest = times(out), manifest_of(out)
    args = ["batch", file, "-o", out, "--decoder", "jacobi", "--address", "nowhere:1"]
    result = sjd2(*args)
    assert result.exit_code == 0, (result.exception, result.output)
    assert json.loads(result.stdout.splitlines()[-1])["kept"] == 5
    assert times(out) == before and manifest_of(out) == manifest


def test_pictures_say_the_same_as_those_of_generate(drawn: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, out, _ = drawn
    assert sjd2("generate", PROMPTS[0], "-o", tmp_path, "--decoder", "jacobi").exit_code == 0
    (own,) = tmp_path.glob("*.png")
    (batch,) = out.glob("00000/000_*.png")
    assert own.name == batch.name and png_facts(own) == png_facts(batch) and same(own, batch)


class Killer(threading.Thread):
    """Kills the first worker that has finished a picture."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.before = out, {}

    def run(self) -> None:
        while True:
            for log in (self.out / folder.STATE).glob("*/*-1.jsonl"):
                records = list(folder.read_records(log))
                if len(records) > 1:
                    self.before = times(self.out)
                    os.kill(records[0]["pid"], signal.SIGKILL)
                    return
            time.sleep(0.02)


@pytest.mark.slow  # some ten seconds: workers start anew, and import torch
def test_a_worker_killed_midway_costs_nothing(address: str, tmp_path: Path) -> None:
    items = items_of(PROMPTS * 4)
    killer = Killer(tmp_path)
    killer.start()
    summary = run_batch(plan_for(tmp_path), items, workers=2)
    assert not killer.is_alive() and len(killer.before) < len(items)
    assert sum(worker["deaths"] for worker in summary["workers"]) == 1
    assert summary["failed"] == 0 and summary["drawn"] + summary["kept"] == len(items)
    assert summary["kept"] <= 1, "the kill may have come between a picture and its line in the log"
    after = times(tmp_path)
    assert {name: after[name] for name in killer.before} == killer.before, "nothing finished was drawn again"
    lines = manifest_of(tmp_path)
    assert [line["index"] for line in lines] == list(range(len(items)))
    assert {line["picture"] for line in lines} == set(after) and len(after) == len(items)


def start_driver(address: str, prompts: Path, out: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    args = ["batch", prompts, "-o", out, "--decoder", "jacobi", "--max-batch", 2, "--address", address, "--workers", 2]
    command = [sys.executable, "-m", "sjd2_engine.cli", *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_pictures(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(times(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow  # some ten seconds: a driver and two workers start
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_stopped_or_killed_is_resumed(how: signal.Signals, address: str, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    many = PROMPTS * 10  # some seconds of work for the signal to arrive in
    prompts.write_text("\n".join(many))
    driver = start_driver(address, prompts, out)
    wait_for_pictures(driver, out, 2)
    driver.send_signal(how)
    _, stderr = driver.communicate(timeout=60)
    if how == signal.SIGINT:
        assert driver.returncode == 130 and "the same command goes on" in stderr and "Traceback" not in stderr
    assert not (out / folder.MANIFEST).exists()
    time.sleep(1)  # until Ray has ended the workers of a driver that is gone
    before = times(out)
    assert 2 <= len(before) < len(many)
    summary = run_batch(plan_for(out), read_items(prompts), workers=2)
    after = times(out)
    assert {name: after[name] for name in before} == before, "nothing finished was drawn again"
    assert (summary["kept"], summary["drawn"], summary["failed"]) == (len(before), len(many) - len(before), 0)
    assert {line["picture"] for line in manifest_of(out)} == set(after) and len(after) == len(many)


@pytest.mark.slow  # some ten seconds: workers start anew, and import torch
def test_a_prompt_that_kills_is_named_and_the_others_are_drawn(address: str, tmp_path: Path) -> None:
    class Fragile(Worker):
        """Dies, as of a fault in a kernel, when one certain prompt gets a slot."""

        def _begins(self, items) -> None:
            if any(item.prompt == "three green stars" for item in items):
                os.kill(os.getpid(), signal.SIGKILL)

        def _pictures(self, items):
            batch = self.plan.config().max_batch
            self._begins(items[:batch])
            for freed, finished in enumerate(super()._pictures(items)):
                yield finished
                self._begins(items[batch + freed : batch + freed + 1])

    summary = run_batch(plan_for(tmp_path), items_of(PROMPTS), workers=1, worker_class=Fragile)
    assert [failure["id"] for failure in summary["failures"]] == ["2"]
    assert f"{STRIKES} workers died" in summary["failures"][0]["error"]
    assert summary["workers"][0]["deaths"] == STRIKES and summary["drawn"] == 4
    lines = manifest_of(tmp_path)
    assert [line["picture"] is None for line in lines] == [False, False, True, False, False]
    assert len(times(tmp_path)) == 4


def test_prompts_that_fail_are_listed_with_their_errors(address: str, tmp_path: Path) -> None:
    model = shutil.copytree(WEIGHTS / "scenes-sjd2", tmp_path / "model")
    words = json.loads((model / "config.json").read_text())["words"]
    tensors = load_file(model / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    table[len(table) - len(words) + words.index("cross")] = float("nan")
    save_file(tensors, model / "model.safetensors")
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red ring\na blue cross\na red elephant\na blue ring\n")
    result = sjd2("batch", prompts, "-o", out, "--model", model, "--decoder", "jacobi", "--workers", 1)
    assert result.exit_code == 1
    summary = json.loads(result.stdout.splitlines()[-1])
    errors = {failure["id"]: failure["error"] for failure in summary["failures"]}
    assert set(errors) == {"1", "2"} and summary["drawn"] == 2 and summary["workers"][0]["deaths"] == 0
    assert "NaN" in errors["1"] and "step" in errors["1"] and "elephant" in errors["2"]
    assert [line.get("error") for line in manifest_of(out)] == [None, errors["1"], errors["2"], None]
    assert "elephant" in result.stderr and "NaN" in result.stderr


def test_workers_that_only_die_end_the_run(address: str, tmp_path: Path) -> None:
    class Stillborn(Worker):
        def start(self, plan, name):
            raise RuntimeError("no such driver")

    crew = Crew(plan_for(tmp_path), items_of(PROMPTS), 1, {"num_cpus": 1}, lambda count: None, Stillborn)
    with pytest.raises(BackendError, match=r"no worker is left.*no such driver"):
        crew.work()
    assert crew.members[0].deaths == FAILED_STARTS
