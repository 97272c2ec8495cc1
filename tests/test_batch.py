"""`sjd2 batch` without a cluster: prompts, the plan, the folder, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from batching import PROMPTS, items_of, plan_for, sjd2, times
from PIL import Image

from sjd2_engine import Engine
from sjd2_engine.distributed import folder
from sjd2_engine.distributed.crew import WAVES, Queue
from sjd2_engine.distributed.plan import PER_FOLDER, Plan
from sjd2_engine.distributed.prompts import Item, read_items
from sjd2_engine.distributed.worker import Worker
from sjd2_engine.errors import CheckpointError, ConfigError, PromptError
from sjd2_engine.files import save_png

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
