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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sjd2_engine
from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.distributed import folder
from sjd2_engine.distributed.crew import FAILED_STARTS, STRIKES, WAVES, Crew, Queue
from sjd2_engine.distributed.plan import PER_FOLDER, Plan, make_plan
from sjd2_engine.distributed.prompts import Item, read_items
from sjd2_engine.distributed.run import run_batch
from sjd2_engine.distributed.worker import Worker
from sjd2_engine.errors import BackendError, CheckpointError, ConfigError, PromptError
from sjd2_engine.files import png_facts, save_png

WEIGHTS = Path(sjd2_engine.__file__).parent / "weights"
pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "scenes-sjd2").is_dir(), reason="the bundled weights are not in this tree"
)
PROMPTS = ["a red circle", "a blue ring", "three green stars", "a large red ring", "a green cross"]
Line = dict[str, Any]


def sjd2(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="sjd2")


def plan_for(out: Path, run: str = "run", **given: Any) -> Plan:
    given = {"decoder": "jacobi", "device": "cpu", "options": {"max_batch": 2}, **given}
    return make_plan(given.pop("model", "scenes-sjd2"), out, run, **given)


def items_of(prompts: Sequence[str]) -> list[Item]:
    return [Item(i, str(i), prompt, i) for i, prompt in enumerate(prompts)]


def manifest_of(out: Path) -> list[Line]:
    return [json.loads(line) for line in (out / folder.MANIFEST).read_text().splitlines()]


def times(out: Path) -> dict[str, int]:
    """When each picture was written."""
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.glob("*/*.png")}


def same(a: Path, b: Path) -> bool:
    with Image.open(a) as left, Image.open(b) as right:
        return ImageChops.difference(left.convert("RGB"), right.convert("RGB")).getbbox() is None


# ------------------------------------------------------------------ prompts


def test_prompts_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b\xe2\x80\xa8c", "id": 7, "seed": 3, "negative_prompt": "d"}\r\n'
        b'{"prompt": "a", "id": "x"}'
    )
    assert read_items(file, 10) == [
        Item(0, "0", "a", 10), Item(1, "7", "b\u2028c", 3, "d"), Item(2, "x", "a", 12)
    ]  # fmt: skip
    text = tmp_path / "p.txt"
    text.write_text("one\n\n two \n")
    assert [(item.prompt, item.seed) for item in read_items(text)] == [("one", 0), ("two", 1)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not JSON"]),
        ("[1]", ["object", "list"]),
        ("{}", ['no "prompt"']),
        ('{"prompt": ""}', ["empty"]),
        ('{"prompt": 5}', ["prompt is 5"]),
        ('{"prompt": "a", "sed": 1}', ["'sed'", "did you mean 'seed'"]),
        ('{"prompt": "a", "seed": -1}', ["seed is -1"]),
        ('{"prompt": "a", "seed": true}', ["seed is True"]),
        ('{"prompt": "a", "seed": 1.5}', ["seed is 1.5"]),
        ('{"prompt": "a", "id": []}', ["id is []"]),
        ('{"prompt": "a", "id": "0"}', ["'0'", "line 1 already"]),
        ('{"prompt": "a", "negative_prompt": 1}', ["negative_prompt is 1"]),
        ('{"prompt": "\\ud800"}', ["surrogates"]),
        ("[" * 100_000, []),
    ],
)
def test_broken_lines_are_named(line: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + '\n{"prompt": "fine too"}\n')
    with pytest.raises(PromptError) as caught:
        read_items(file)
    for word in ["line 2", "1 broken line", *words]:
        assert word in str(caught.value)


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    for name, content in (("p.jsonl", b"\n"), ("p.csv", b"a"), ("p.txt", b"\xff\xfe"), ("p.jsonl", b"{\n" * 50)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=name):
            read_items(tmp_path / name)
    with pytest.raises(PromptError, match="missing"):
        read_items(tmp_path / "missing.jsonl")


# ------------------------------------------------------------------ the plan and the folder


def test_a_plan_is_checked_without_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="windo"):
        plan_for(tmp_path, options={"windo": 3})
    with pytest.raises(ConfigError, match="sjdd"):
        plan_for(tmp_path, decoder="sjdd")
    with pytest.raises(CheckpointError, match="finetune"):
        plan_for(tmp_path, model="scenes", decoder="sjd2")
    with pytest.raises(CheckpointError, match="no-such"):
        plan_for(tmp_path, model="no-such")


def test_names_and_keys(tmp_path: Path, tuned: Engine) -> None:
    plan = plan_for(tmp_path)
    assert plan.picture(Item(12_345, "x", "A red ring!", 7)) == f"{12_345 // PER_FOLDER:05d}/12345_a-red-ring_seed7.png"
    assert plan.model_name == tuned.model_name
    assert plan.config() == tuned.config_for("jacobi", max_batch=2)
    item = Item(0, "0", "a ring", 1)
    others = [Item(0, "0", "a ring", 2), Item(0, "0", "rings", 1), Item(0, "0", "a ring", 1, "blue")]
    keys = [plan.key(other) for other in [item, *others]]
    keys += [plan_for(tmp_path, decoder="ar").key(item), plan_for(tmp_path, image_size=128).key(item)]
    assert len(set(keys)) == len(keys)
    # Batching and place do not change a picture.
    assert plan.key(item) == plan_for(tmp_path / "x", options={"max_batch": 9}, dtype="float32").key(item)


def finished(plan: Plan, item: Item) -> Path:
    return save_png(Image.new("RGB", (8, 8)), plan.out / plan.picture(item), plan.facts(item))


def test_what_is_there_is_believed_on_proof_only(tmp_path: Path) -> None:
    plan, items = plan_for(tmp_path), items_of(PROMPTS)
    records = [{"picture": plan.picture(item), "key": plan.key(item), "forward_passes": 9} for item in items]
    log = folder.log_path(plan_for(tmp_path, "old"), "0-1")
    log.parent.mkdir(parents=True)
    # 0: logged and there. 1: logged, not there. 2: there, not logged. 3: not there. 4: there, of another decoder.
    lines = [json.dumps(record) for record in records[:2]]
    log.write_text('{"worker": "0-1"}\n' + "\n".join(lines) + '\n{"picture": "00000/00')
    finished(plan, items[0])
    finished(plan, items[2])
    finished(plan_for(tmp_path, decoder="ar"), items[4])
    (tmp_path / "00000" / ".000_x.png.77.tmp").write_bytes(b"half")
    (tmp_path / "00000" / "notes.txt").write_text("mine")
    (tmp_path / folder.MANIFEST).write_text(json.dumps({**records[4], "index": 4}).replace("key", "kee") + "\n")
    found = folder.open_run(plan, items)
    assert found == {0: records[0], 2: {"picture": records[2]["picture"], "key": records[2]["key"]}}
    assert not list(tmp_path.glob("*/*.tmp")) and (tmp_path / "00000" / "notes.txt").exists()
    # What was true is kept in one log, what will be replaced is forgotten: nothing vouches for 4 any longer.
    assert not log.exists() and not (tmp_path / folder.MANIFEST).exists()
    assert [r["picture"] for r in folder.read_records(folder.log_path(plan, "before"))] == [
        records[0]["picture"], records[2]["picture"]
    ]  # fmt: skip
    assert folder.open_run(plan_for(tmp_path, "next"), items) == found


def test_an_old_line_does_not_vouch_for_a_new_picture(tmp_path: Path) -> None:
    """Drawn with A; redrawn with B and killed before that was logged; asked for A again: it has to be drawn."""
    item = items_of(PROMPTS)[0]
    a, b = plan_for(tmp_path, "a"), plan_for(tmp_path, "b", decoder="ar")
    folder.open_run(a, [item])
    finished(a, item)
    folder.close_run(a, [{"picture": a.picture(item), "key": a.key(item)}])
    assert folder.open_run(b, [item]) == {}
    finished(b, item)
    assert folder.open_run(plan_for(tmp_path, "c"), [item]) == {}
    assert set(folder.open_run(plan_for(tmp_path, "d", decoder="ar"), [item])) == {0}


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with folder.locked(tmp_path), pytest.raises(ConfigError, match="another"), folder.locked(tmp_path):
        pass
    with folder.locked(tmp_path):
        pass


def test_a_worker_on_another_host_or_version_says_so(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    with pytest.raises(ConfigError, match="does not see"):
        Worker().start(plan, "0-1")
    with pytest.raises(ConfigError, match=r"has sjd2-engine .* 0\.0\.0"):
        Worker().start(Plan(**{**vars(plan), "version": "0.0.0"}), "0-1")


def test_a_worker_left_over_stops_writing(tmp_path: Path) -> None:
    plan, items = plan_for(tmp_path), items_of(PROMPTS[:1])
    folder.open_run(plan, items)
    worker = Worker()
    worker.start(plan, "0-1")
    folder.open_run(plan_for(tmp_path, "next"), items)
    with pytest.raises(RuntimeError, match="another run"):
        worker.draw(items)
    assert not times(tmp_path)


def test_chunks_shrink_towards_the_end() -> None:
    items = [Item(i, str(i), "a", i, "none" if 100 <= i < 103 else None) for i in range(1000)]
    queue, sizes, seen = Queue(items, workers=4, batch=8), [], []
    while queue:
        chunk = queue.take()
        assert len({item.negative_prompt for item in chunk}) == 1
        sizes.append(len(chunk))
        seen += chunk
    assert seen == items and max(sizes) == sizes[0] == WAVES * 8 and max(sizes[-8:]) <= 8
    few = Queue(items[:6], workers=4, batch=16)
    assert [len(few.take()) for _ in range(3)] == [2, 2, 2], "every worker gets something"


# ------------------------------------------------------------------ on Ray


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


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["missing.jsonl"], ["missing.jsonl"]),
        (["p.txt", "--workers", 0], ["--workers is 0"]),
        (["p.txt", "--windo", 3], ["--windo", "sjd2 batch --help"]),
        (["p.txt", "--window", 0], ["window=0"]),
        (["p.txt", "--model", "scenez"], ["scenez"]),
        (["p.txt", "--image-size", "big"], ["--image-size"]),
        (["p.txt", "--device", "cuda:1"], ["--device cuda:1"]),
        ([], ["Missing argument"]),
    ],
)
def test_bad_arguments_are_one_line(args: list, words: list[str], tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red ring")
    result = sjd2("batch", *args)
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("sjd2: error: ")
    for word in words:
        assert word in result.stderr
    assert not times(tmp_path / "out")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = sjd2("batch", "p.txt")
    assert result.exit_code == 2 and "pip install 'sjd2-engine[ray]'" in result.stderr


def test_a_cluster_that_does_not_start_is_said_in_one_line(tmp_path: Path, monkeypatch) -> None:
    ray = pytest.importorskip("ray")

    def init(*args: Any, **given: Any) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")  # as Ray itself raises it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "p.txt").write_text("a red ring")
    result = sjd2("batch", tmp_path / "p.txt", "-o", tmp_path / "out", "--decoder", "jacobi")
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert "no Ray cluster at 'this host' (The current node timed out during startup. See the logs.)" in result.stderr
