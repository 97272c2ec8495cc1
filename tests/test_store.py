"""Prepared data on disk: what goes in comes out, and what is damaged or of another model is named."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.training import store as store_file
from sjd2_engine.training.store import DatasetInfo, ShardWriter, Store, fingerprint, shard_paths

INFO = DatasetInfo("scenes", "0123456789abcdef", (128, 128), 6, 50, shard_size=4, settings={"source": "here"})


def picture(index: int) -> torch.Tensor:
    return torch.randint(50, (6,), generator=torch.Generator().manual_seed(index))


def caption(index: int) -> str:
    return ["", "a red círcle 圆", "plain"][index % 3] + str(index)


def write(folder: Path, indices: range, finish: bool = True, info: DatasetInfo = INFO) -> None:
    with ShardWriter(folder, info) as writer:
        for index in indices:
            if f"{index}.png" not in writer.done:
                writer.add(f"{index}.png", picture(index), caption(index))
        if finish:
            writer.finish()


def assert_holds(folder: Path, indices: range) -> None:
    store = Store(folder)
    rows = [store[i] for i in range(len(store))]
    sources = [name for path in shard_paths(folder) for name in store_file.Shard(path, 6).sources()]
    assert sorted(sources) == sorted(f"{i}.png" for i in indices)
    for name, (tokens, text) in zip(sources, rows):
        index = int(name.removesuffix(".png"))
        assert tokens.dtype == torch.int64 and torch.equal(tokens, picture(index)) and text == caption(index)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    assert_holds(tmp_path, range(10))
    assert [len(store_file.Shard(path, 6)) for path in shard_paths(tmp_path)] == [4, 4, 2]
    store = Store(tmp_path)
    assert store.info == replace(INFO, pictures=10) and store.caption(9) == caption(9)
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            store[wrong]
    copied = pickle.loads(pickle.dumps(store))
    assert torch.equal(copied[7][0], store[7][0])


def test_a_run_goes_on_behind_whole_shards(tmp_path: Path) -> None:
    write(tmp_path, range(6), finish=False)  # the last two are in no shard yet
    with ShardWriter(tmp_path, INFO) as writer:
        assert writer.done == {f"{i}.png" for i in range(4)} and len(writer) == 4
    write(tmp_path, range(10))
    assert_holds(tmp_path, range(10))
    write(tmp_path, range(12))  # a source that grew
    assert_holds(tmp_path, range(12))


KILLED = """
import sys
from pathlib import Path
from test_store import write
write(Path(sys.argv[1]), range(100000))
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    for wanted in (2, 5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
        while len(shard_paths(tmp_path)) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = 4 * len(shard_paths(tmp_path))
    assert_holds(tmp_path, range(done))
    write(tmp_path, range(done + 3))
    assert_holds(tmp_path, range(done + 3))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("kind", ["cut", "empty", "header", "bit"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, kind: str) -> None:
    write(tmp_path, range(10))
    path = shard_paths(tmp_path)[1]
    raw = bytearray(path.read_bytes())
    if kind == "header":
        raw[8] ^= 255
    elif kind == "bit":
        raw[-1] ^= 1
    path.write_bytes(raw[: {"cut": len(raw) // 2, "empty": 0}.get(kind, len(raw))])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .* delete it and run"):
        Store(tmp_path)[5]
    path.unlink()
    with pytest.raises(CheckpointError, match="holds 6 pictures, expected at least 10"):
        Store(tmp_path)
    write(tmp_path, range(10))
    assert_holds(tmp_path, range(10))


def test_data_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    for change, words in (
        ({"family": "emu3"}, "model family is 'scenes' there"),
        ({"tokenizer": "f" * 16}, "picture tokenizer"),
        ({"image_size": (64, 64)}, "picture size"),
        ({"prompt": "class"}, "kind of prompt"),
    ):
        with pytest.raises(ConfigError, match=words):
            ShardWriter(tmp_path, replace(INFO, **change))
    with pytest.raises(ConfigError, match="begun with source='here', now it is 'there'"):
        ShardWriter(tmp_path, replace(INFO, settings={"source": "there"}))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, INFO), pytest.raises(ConfigError, match="another run is writing"):
        ShardWriter(tmp_path, INFO)
    ShardWriter(tmp_path, INFO).close()


def test_wrong_pictures_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, INFO) as writer:
        writer.add("a", picture(0), "")
        for tokens in (picture(0)[:5], picture(0) + 50, picture(0) - 50):
            with pytest.raises(ConfigError, match="expected"):
                writer.add("b", tokens, "")
        with pytest.raises(ConfigError, match="already"):
            writer.add("a", picture(0), "")


def test_a_full_disk_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(4), finish=False)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ShardWriter(tmp_path, INFO) as writer, monkeypatch.context() as patch:
        patch.setattr("sjd2_engine.files.os.fsync", full)
        for index in range(4, 7):
            writer.add(f"{index}.png", picture(index), caption(index))
        with pytest.raises(ConfigError, match=r"No space left on device.*make room"):
            writer.add("7.png", picture(7), caption(7))
    assert not list(tmp_path.glob(".*.tmp"))
    assert_holds(tmp_path, range(4))
    write(tmp_path, range(8))
    assert_holds(tmp_path, range(8))


def test_folders_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="sjd2 prepare SOURCE"):
        Store(tmp_path)
    write(tmp_path, range(0))
    with pytest.raises(CheckpointError, match="holds 0 pictures"):
        Store(tmp_path)
    info = tmp_path / "dataset.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2"):
        Store(tmp_path)
    for text in ("{", "[]", '{"format": 1}'):
        info.write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Store(tmp_path)


def test_skipped_items_are_listed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, INFO) as writer:
        writer.skip("x.png", "no caption 'ü'")
        writer.skip("y.png", "empty")
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"source": "x.png", "reason": "no caption 'ü'"} and len(lines) == 2


def test_fingerprints() -> None:
    codebook = torch.randn(16, 4)
    same = fingerprint(codebook)
    assert fingerprint(codebook.bfloat16().float()) == same and len(same) == 16
    assert fingerprint(codebook + 0.1) != same and fingerprint(codebook.view(4, 16)) != same
