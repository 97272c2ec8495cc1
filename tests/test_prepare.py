"""`sjd2 prepare` from files to shards: what is read, what is skipped and why, and what survives a kill."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sjd2_engine.cli import app
from sjd2_engine.errors import BackendError, ConfigError
from sjd2_engine.models import ImageModel, LoadOptions, load_model
from sjd2_engine.models.llamagen_vq import LlamaGenEncoder
from sjd2_engine.training import prepare as preparation
from sjd2_engine.training.data import _draw
from sjd2_engine.training.prepare import Plan, Unusable, draw, prepare, read_picture
from sjd2_engine.training.sources import open_source
from sjd2_engine.training.store import Shard, Store, shard_paths

COUNT = 20
DRAWN = _draw((3, 0))
PICTURES, CAPTIONS = DRAWN[0][:COUNT], DRAWN[1][:COUNT]
NAMES = [f"{i:03d}.png" for i in range(COUNT)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = [png(picture) for picture in PICTURES]


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return load_model("scenes", torch.device("cpu"), torch.float32, LoadOptions(core=False))


def run(*args: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["prepare", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def sources(folder: Path) -> list[str]:
    count = Store(folder).info.image_count
    return [name for path in shard_paths(folder) for name in Shard(path, count).sources()]


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}
    assert len(listed) == len(lines)
    return listed


def assert_holds(folder: Path, model: ImageModel, names: dict[str, int]) -> None:
    """The folder has exactly the pictures `names` (source -> number), once each, as the model encodes them."""
    store, found = Store(folder), sources(folder)
    store.check(model)
    assert sorted(found) == sorted(names) and len(store) == len(names)
    # In one batch here and in others there: the same codes but for rare near ties.
    expected = model.encode_pixels(torch.from_numpy(np.stack([PICTURES[names[name]] for name in found])))
    tokens = torch.stack([store[i][0] for i in range(len(store))])
    assert int((tokens != expected).sum()) <= 2
    assert [store.caption(i) for i in range(len(store))] == [CAPTIONS[names[name]] for name in found]


def write_folder(folder: Path) -> Path:
    for name, raw, caption in zip(NAMES, FILES, CAPTIONS):
        path = folder / ("inner" if name > "010" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        path.with_suffix(".txt").write_text(f" {caption}\n")
    return folder


def folder_names() -> dict[str, int]:
    return {f"inner/{name}" if name > "010" else name: i for i, name in enumerate(NAMES)}


def write_tars(folder: Path) -> Path:
    """Two shards, one with captions in .txt and one with captions in .json, with the same keys in both."""
    folder.mkdir()
    for shard in (0, 1):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(COUNT // 2):
                index = shard * (COUNT // 2) + i
                text = CAPTIONS[index]
                beside = ("json", json.dumps({"caption": text, "url": "x"})) if shard else ("txt", text)
                for kind, raw in (("png", FILES[index]), (beside[0], beside[1].encode())):
                    entry = tarfile.TarInfo(f"{i:04d}.{kind}")
                    entry.size = len(raw)
                    tar.addfile(entry, io.BytesIO(raw))
    return folder


def tar_names() -> dict[str, int]:
    return {f"{i // (COUNT // 2):05d}.tar/{i % (COUNT // 2):04d}": i for i in range(COUNT)}


def write_parquet(folder: Path, struct: bool = True) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    images = [{"bytes": raw, "path": None} for raw in FILES] if struct else FILES
    columns = {"image": images, "text": CAPTIONS} if struct else {"pic": images, "alt": CAPTIONS}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=6)
    return folder


def parquet_names() -> dict[str, int]:
    return {f"a.parquet:{i}": i for i in range(COUNT)}


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[], dict[str, int]]]] = {
    "folder": (write_folder, folder_names),
    "tars": (write_tars, tar_names),
    "parquet": (write_parquet, parquet_names),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source(kind: str, model: ImageModel, tmp_path: Path) -> None:
    if kind == "tars":
        pytest.importorskip("webdataset")
    write, names = KINDS[kind]
    source, out = write(tmp_path / "source"), tmp_path / "out"
    text = run(source, "-o", out, "--shard-size", 8, "--batch", 3, "--workers", 2, "--limit", 9)
    assert "9 pictures, 9 of them new" in text and f"--data {out}" in text
    first = sources(out)
    text = run(source, "-o", out, "--shard-size", 8, "--batch", 3)
    assert f"{COUNT} pictures, {COUNT - 9} of them new" in text
    assert_holds(out, model, names())
    assert sources(out)[:9] == first and skipped(out) == {}
    assert f"{COUNT} pictures, 0 of them new" in run(source, "-o", out)
    assert Store(out).info.pictures == COUNT


def test_other_columns_and_single_files(model: ImageModel, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "p", struct=False) / "a.parquet"
    text = run(source, "-o", tmp_path / "no", code=2)
    assert "has no column image or" in text and "(pic, alt) by --image-column" in text
    run(source, "-o", tmp_path / "out", "--image-column", "pic", "--caption-column", "alt")
    assert_holds(tmp_path / "out", model, parquet_names())
    pytest.importorskip("webdataset")
    write_tars(tmp_path / "t")
    run(tmp_path / "t" / "00001.tar", "-o", tmp_path / "tar")
    assert_holds(tmp_path / "tar", model, {name: i for name, i in tar_names().items() if i >= COUNT // 2})


def test_metadata_lists_the_pictures(model: ImageModel, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, raw in zip(NAMES, FILES):
        (source / name).write_bytes(raw)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(NAMES[2:], CAPTIONS[2:])]
    lines += ["{", '{"text": "a star"}', "", json.dumps({"file_name": "gone.png", "text": "a star"})]
    lines += [json.dumps({"file_name": NAMES[2], "text": "a star"}), json.dumps({"file_name": NAMES[0]})]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    run(source, "-o", out)
    assert_holds(out, model, {name: i for i, name in enumerate(NAMES) if i >= 2})
    listed = skipped(out)
    assert listed == {
        "metadata.jsonl:19": 'it is no JSON object with a "file_name"',
        "metadata.jsonl:20": 'it is no JSON object with a "file_name"',
        "gone.png": "metadata.jsonl names it and it is not there",
        "002.png": "another item has the same name",
        "000.png": "it has no caption",
        "001.png": "metadata.jsonl does not name it",
    }


def test_bad_items_are_skipped_and_listed(model: ImageModel, tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    (source / "000.png").write_bytes(FILES[0][: len(FILES[0]) // 2])
    (source / "001.png").write_bytes(b"")
    (source / "002.png").write_bytes(b"<html>not found</html>")
    (source / "003.txt").unlink()
    (source / "004.txt").write_text(" \n")
    (source / "005.txt").write_text("a red elephant")
    (source / "006.txt").write_text("a red star and " * 20)
    (source / "007.png").write_bytes(png(PICTURES[7][:, :100]))
    (source / "008.txt").write_bytes(b"\xff\xfe")
    text = run(source, "-o", out, "--shard-size", 4)
    assert_holds(out, model, {name: i for name, i in folder_names().items() if i >= 9})
    damaged = "it is damaged, or no image that Pillow reads"
    listed = skipped(out)
    assert (listed["000.png"], listed["001.png"], listed["002.png"]) == (damaged, "the file is empty", damaged)
    assert (listed["003.png"], listed["004.png"]) == ("it has no caption", "its caption is empty")
    assert "'elephant'" in listed["005.png"] and "its caption is none for this model" in listed["006.png"]
    assert listed["007.png"] == "it is smaller than 128x128 pixels" and listed["008.png"] == "its caption is not UTF-8"
    assert "9 items skipped" in text and f"2 x {damaged}" in text and "2 x its caption is none" in text
    (source / "000.png").write_bytes(FILES[0])
    (source / "003.txt").write_text(CAPTIONS[3])
    assert "13 pictures, 2 of them new" in run(source, "-o", out, "--shard-size", 4)
    assert set(skipped(out)) == set(listed) - {"000.png", "003.png"}
    assert "upscale=False, now it is True" in run(source, "-o", out, "--upscale", code=2)


@pytest.mark.parametrize(("kind", "cut"), [("tars", 100), ("tars", 700), ("parquet", 0)])
def test_damaged_containers_cost_only_what_they_hold(kind: str, cut: int, model: ImageModel, tmp_path: Path) -> None:
    if kind == "tars":
        pytest.importorskip("webdataset")
    write, names = KINDS[kind]
    source, out = write(tmp_path / "source"), tmp_path / "out"
    first = sorted(source.iterdir())[0]
    raw = first.read_bytes()
    if kind == "tars":
        first.write_bytes(raw[: len(raw) // 2 + cut])
    else:
        (source / "b.parquet").write_bytes(raw[:-9])
    run(source, "-o", out)
    listed = skipped(out)
    broken = "00000.tar" if kind == "tars" else "b.parquet"
    assert "cannot be read to its end" in listed.pop(broken)
    kept = {name: i for name, i in names().items() if kind == "parquet" or i >= COUNT // 2 or name in sources(out)}
    assert len(kept) >= COUNT // 2 + 3 and len(listed) <= 1  # the sample at the cut
    assert_holds(out, model, kept)


KILLED = "from sjd2_engine.cli import main; main()"


def test_killed_at_any_moment(model: ImageModel, tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    (source / "000.png").write_bytes(b"broken")
    arguments = ["prepare", source, "-o", out, "--shard-size", "2", "--batch", "1", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(shard_paths(out)) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Its shards are whole, whenever it died.
    assert all(len(Shard(path, 256).sources()) == 2 for path in shard_paths(out))
    left = sum(len(Shard(path, 256)) for path in shard_paths(out))
    assert 6 <= left < 19
    text = run(*arguments[1:])
    assert f"19 pictures, {19 - left} of them new" in text
    assert_holds(out, model, {name: i for name, i in folder_names().items() if i})
    assert list(skipped(out)) == ["000.png"]


def test_a_full_disk_is_said_and_leaves_whole_shards(
    model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    writes = iter(range(99))

    def full(descriptor: int) -> None:
        if next(writes) >= 4:  # dataset.json, skipped.jsonl and two shards fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("sjd2_engine.files.os.fsync", full)
        text = run(source, "-o", out, "--shard-size", 4, code=2)
    assert "No space left on device" in text and "run the same command again" in text
    assert [len(Shard(path, 256).sources()) for path in shard_paths(out)] == [4, 4]
    run(source, "-o", out, "--shard-size", 4)
    assert_holds(out, model, folder_names())


def test_what_cannot_be_prepared_is_said(model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not there" in run(tmp_path / "nowhere", "-o", out, code=2)
    assert "holds no pictures; expected images" in run(empty, "-o", out, code=2)
    assert "either a SOURCE" in run("-o", out, code=2)
    assert "and not both" in run(source, "--synthetic", 3, "-o", out, code=2)
    assert "batch is 0" in run(source, "-o", out, "--batch", 0, code=2)
    assert "device='quantum'" in run(source, "-o", out, "--device", "quantum", code=2)
    assert "there is no model 'unknown'" in run(source, "-o", out, "--model", "unknown", code=2)
    (empty / "a.png").write_bytes(b"")
    (empty / "a.txt").write_text("a star")
    assert "gives no picture: 1 items were skipped (a.png: the file is empty)" in run(empty, "-o", out, code=2)
    (source / "b.parquet").write_bytes(b"")
    assert "holds parquet files and images" in run(source, "-o", out, code=2)
    (source / "b.parquet").unlink()
    run(source, "-o", tmp_path / "first", "--limit", 2)
    assert "begun with source=" in run(empty, "-o", tmp_path / "first", code=2)

    monkeypatch.setitem(sys.modules, "webdataset", None)
    (empty / "a.png").rename(empty / "a.tar")
    assert "sjd2-engine[train]" in run(empty, "-o", out, code=2)

    def too_much(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "encode_pixels", too_much)
    with pytest.raises(BackendError, match=r"16 pictures at once do not fit.*smaller --batch"):
        prepare(model, open_source(source), tmp_path / "second", Plan(), {})


def test_drawn_scenes(model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "CHUNK", 8)
    monkeypatch.setattr("sjd2_engine.training.data.CHUNK", 8)
    out = tmp_path / "out"
    assert draw(model, out, 20, Plan(shard_size=4), seed=3).pictures == 20
    whole = [Store(out)[i] for i in range(20)]
    shard_paths(out)[2].unlink()
    assert draw(model, out, 20, Plan(shard_size=4), seed=3).added == 4
    assert draw(model, out, 24, Plan(shard_size=4), seed=3).added == 4
    store = Store(out)
    rows = {name: store[i] for i, name in enumerate(sources(out))}
    assert sorted(rows) == [f"scene-{i:07d}" for i in range(24)]
    for (tokens, caption), name in zip(whole, sorted(rows)):
        assert rows[name][1] == caption and int((rows[name][0] != tokens).sum()) <= 1
    with pytest.raises(ConfigError, match="seed=3, now it is 4"):
        draw(model, out, 20, Plan(), seed=4)
    monkeypatch.setattr(model, "family", "emu3")
    with pytest.raises(ConfigError, match="mean nothing to the family emu3"):
        draw(model, out, 20, Plan(), seed=3)


def test_drawn_scenes_by_the_command(tmp_path: Path) -> None:
    assert "10 pictures, 10 of them new" in run("--synthetic", 10, "-o", tmp_path / "out")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_pictures_are_cut_from_the_middle_and_turned() -> None:
    ramp = np.zeros((40, 100, 3), np.uint8)
    ramp[..., 0] = np.arange(100)
    ramp[..., 1] = np.arange(40)[:, None]
    assert np.array_equal(read_picture(png(ramp), (40, 60)), ramp[:, 20:80])
    assert np.array_equal(read_picture(png(ramp), (40, 100)), ramp)
    half = read_picture(png(ramp), (20, 20)).astype(int)
    assert abs(half[..., 0] - (30.5 + 2 * np.arange(20))).max() <= 1.5
    assert abs(half[..., 1] - (0.5 + 2 * np.arange(20))[:, None]).max() <= 1.5
    with pytest.raises(Unusable, match="smaller than 60x41"):
        read_picture(png(ramp), (41, 60))
    assert read_picture(png(ramp), (80, 80), upscale=True).shape == (80, 80, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    turned = read_picture(encoded(Image.fromarray(ramp), exif=exif), (100, 40))
    assert np.array_equal(turned, np.rot90(ramp, -1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "F"])
def test_images_of_every_mode_become_rgb(mode: str) -> None:
    base = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 256 + 9, np.uint16))
    elif mode in ("RGBA", "LA"):
        image = base.convert(mode)
        image.putalpha(Image.new("L", (16, 16), 0))
    else:
        image = base.quantize(4) if mode == "P" else base.convert(mode)
    kind = {"CMYK": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    expected = 255 if mode in ("RGBA", "LA") else None if mode == "1" else 200  # transparent is white
    pixels = read_picture(encoded(image, kind), (16, 16))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert expected is None or abs(pixels.astype(int) - expected).max() <= 1


def test_classes_as_captions(tmp_path: Path) -> None:
    """LlamaGen's models of classes: captions are numbers, wherever they come from; the core is not loaded."""
    pytest.importorskip("transformers")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    import tiny_llamagen as tiny
    from safetensors.torch import load_file, save_file

    folder = tiny.write(tmp_path / "model", "c2i")
    encoder = LlamaGenEncoder(tiny.VQ)
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("quantize")}
    save_file({**load_file(folder / "vq.safetensors"), **own}, folder / "vq.safetensors")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    table = pa.table({"image": FILES[:4], "label": [3, 0, tiny.CLASSES, 5]})
    pq.write_table(table, source / "a.parquet")
    run(source, "-o", out, "--model", folder)
    store = Store(out)
    store.check(load_model(str(folder), torch.device("cpu"), torch.float32))
    assert store.info.prompt == "class" and store.info.family == "llamagen"
    assert [store.caption(i) for i in range(3)] == ["3", "0", "5"] and list(skipped(out)) == ["a.parquet:2"]
    assert store[0][0].shape == (tiny.GRID**2,) and int(store[0][0].max()) < tiny.CODES
    with pytest.raises(ConfigError, match="the model family is 'llamagen' there"):
        store.check(load_model("scenes", torch.device("cpu"), torch.float32))
    assert "prepared for another model" in run(source, "-o", out, "--model", "scenes", code=2)
