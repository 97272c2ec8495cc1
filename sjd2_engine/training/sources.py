"""Captioned pictures as people keep them: a folder of images, webdataset tars, parquet files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
# Where images and captions are looked for if no column is named, in this order.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt", "label")
METADATA = "metadata.jsonl"
TAR_END, GZIP = bytes(1024), b"\x1f\x8b"
ROWS_AT_ONCE = 64  # of a parquet file: bounds memory
INSTALL = "pip install 'sjd2-engine[train]'"


@dataclass(frozen=True)
class Item:
    """One entry of a source.

    name     the same in every run, and no other entry's
    caption  as it is stored
    read     gives the bytes of the image file
    problem  why it can give no picture, if that is known already
    """

    name: str
    caption: str = ""
    read: Callable[[], bytes] = bytes
    problem: str | None = None


class Source(ABC):
    """A sequence of items, always in the same order. `count`: how many there are, None where that is not known."""

    count: int | None = None

    @abstractmethod
    def items(self, done: Container[str]) -> Iterator[Item]:
        """All items but those whose names are in `done`, whose bytes are not read again where that can be helped."""


def open_source(path: Path, image_column: str | None = None, caption_column: str | None = None) -> Source:
    """The source of a folder or file; ConfigError for what is none, and for missing libraries."""
    if path.is_file():
        files, folder = [path], path.parent
    elif path.is_dir():
        files, folder = sorted(file for file in path.rglob("*") if not file.name.startswith(".")), path
    else:
        raise ConfigError(f"source '{path}' is not there; expected a folder, a .tar or a .parquet file")
    kinds = {
        "tars": [file for file in files if file.suffix == ".tar"],
        "parquet files": [file for file in files if file.suffix == ".parquet"],
        "images": [file for file in files if file.suffix[1:].lower() in IMAGES] if path.is_dir() else [],
    }
    found = [kind for kind, list_of in kinds.items() if list_of]
    if len(found) > 1:
        raise ConfigError(f"source '{path}' holds {' and '.join(found)}; name a folder with one kind of them")
    if kinds["tars"]:
        return TarSource(folder, kinds["tars"], caption_column)
    if kinds["parquet files"]:
        return ParquetSource(folder, kinds["parquet files"], image_column, caption_column)
    if not path.is_dir() or not (kinds["images"] or (path / METADATA).is_file()):
        raise ConfigError(
            f"source '{path}' holds no pictures; expected images ({', '.join(IMAGES)}) with a .txt beside each or a "
            f"{METADATA}, webdataset .tar files, or .parquet files"
        )
    return FolderSource(path, kinds["images"], caption_column)


def _pick(given: dict[str, Any], column: str | None) -> Any:
    """The caption among named values; None where there is none."""
    names = [column] if column else CAPTION_COLUMNS
    return next((given[name] for name in names if given.get(name) is not None), None)


def _captioned(name: str, caption: Any, read: Callable[[], bytes]) -> Item:
    if caption is None:
        return Item(name, problem="it has no caption")
    if isinstance(caption, bytes):
        try:
            caption = caption.decode()
        except UnicodeDecodeError:
            return Item(name, problem="its caption is not UTF-8")
    if isinstance(caption, int) and not isinstance(caption, bool):  # numbers of classes
        caption = str(caption)
    if not isinstance(caption, str):
        return Item(name, problem=f"its caption is no text but a {type(caption).__name__}")
    return Item(name, caption, read)


class FolderSource(Source):
    """Images with a text file of the same name beside each, or a metadata.jsonl with "file_name" and "text"."""

    def __init__(self, folder: Path, images: list[Path], caption_column: str | None) -> None:
        self.folder, self.images, self.column = folder, images, caption_column
        self.count = len(images)

    def items(self, done: Container[str]) -> Iterator[Item]:
        if (self.folder / METADATA).is_file():
            yield from self._listed(done)
            return
        for path in self.images:
            name = path.relative_to(self.folder).as_posix()
            if name not in done:
                beside = path.with_suffix(".txt")
                caption = beside.read_bytes() if beside.is_file() else None
                yield _captioned(name, caption, path.read_bytes)

    def _listed(self, done: Container[str]) -> Iterator[Item]:
        named = set()
        with open(self.folder / METADATA, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    name = entry["file_name"]
                    path = self.folder / name
                except (ValueError, KeyError, TypeError):
                    yield Item(f"{METADATA}:{number}", problem='it is no JSON object with a "file_name"')
                    continue
                named.add(path)
                if name not in done:
                    missing = Item(name, problem=f"{METADATA} names it and it is not there")
                    yield _captioned(name, _pick(entry, self.column), path.read_bytes) if path.is_file() else missing
        for path in self.images:
            if path not in named:
                yield Item(path.relative_to(self.folder).as_posix(), problem=f"{METADATA} does not name it")


class TarSource(Source):
    """Webdataset shards: files of one name make a sample, its caption in .txt, or in .json by its column."""

    def __init__(self, folder: Path, files: list[Path], caption_column: str | None) -> None:
        try:
            import webdataset
        except ImportError:
            raise ConfigError(f"reading .tar files needs: {INSTALL}") from None
        self.library: Any = webdataset
        self.folder, self.files, self.column = folder, files, caption_column

    def items(self, done: Container[str]) -> Iterator[Item]:
        for path in self.files:
            yield from self._samples(path, path.relative_to(self.folder).as_posix(), done)

    def _samples(self, path: Path, shard: str, done: Container[str]) -> Iterator[Item]:
        problems: list[str] = []

        def note(error: Exception) -> bool:
            # The library adds names of files and streams to what went wrong.
            reason = str(error.args[0] if error.args else repr(error)).partition(" @ ")[0].strip("\"'")
            problems.append(f"it cannot be read to its end ({reason})")
            return True

        def wanted(file: str) -> bool:
            folder, _, name = file.rpartition("/")
            return "/".join([shard, *([folder] if folder else []), name.partition(".")[0]]) not in done

        # One tar at a time: where one is cut, its last sample must not get files of the next one's first.
        samples = self.library.WebDataset(
            [str(path)], shardshuffle=False, handler=note, select_files=wanted, empty_check=False
        )
        for sample in samples:
            name = f"{shard}/{sample['__key__']}"
            image = next((sample[kind] for kind in IMAGES if kind in sample), None)
            if image is None:
                yield Item(name, problem="it has no image")
            else:
                yield _captioned(name, self._caption(sample), lambda image=image: image)
        if not problems and _is_cut(path):
            problems.append("it cannot be read to its end (it has no end mark)")
        yield from (Item(shard, problem=problem) for problem in problems[:1])

    def _caption(self, sample: dict[str, Any]) -> Any:
        if self.column and self.column in sample:
            return sample[self.column]
        if "txt" in sample and not self.column:
            return sample["txt"]
        try:
            entry = json.loads(sample.get("json", b"{}"))
        except ValueError:
            return None
        return _pick(entry, self.column) if isinstance(entry, dict) else None


def _is_cut(path: Path) -> bool:
    """Whether a tar lacks the zeros at its end: cut between two files, it reads like a shorter one."""
    with open(path, "rb") as file:
        if file.read(2) == GZIP:  # which has a check of its own
            return False
        file.seek(max(0, path.stat().st_size - len(TAR_END)))
        return file.read() != TAR_END


class ParquetSource(Source):
    """Parquet files with a column of images, as bytes or as {bytes, path}, and one of captions."""

    def __init__(self, folder: Path, files: list[Path], image_column: str | None, caption_column: str | None) -> None:
        try:
            import pyarrow.parquet as library
        except ImportError:
            raise ConfigError(f"reading .parquet files needs: {INSTALL}") from None
        self.library = library
        self.folder, self.files = folder, files
        self.columns = (image_column, caption_column)
        self.count = sum(self._rows(path) for path in files)

    def _rows(self, path: Path) -> int:
        try:
            return self.library.read_metadata(path).num_rows
        except (OSError, ValueError):  # what pyarrow's errors derive from; `items` says it
            return 0

    def _column(self, path: Path, names: list[str], index: int) -> str:
        option = ("image", "caption")[index]
        given = self.columns[index]
        wanted = (given,) if given else (IMAGE_COLUMNS, CAPTION_COLUMNS)[index]
        found = [name for name in wanted if name in names]
        if not found:
            raise ConfigError(
                f"{path} has no column {' or '.join(wanted)}; name one of its columns ({', '.join(names)}) by "
                f"--{option}-column"
            )
        return found[0]

    def items(self, done: Container[str]) -> Iterator[Item]:
        for path in self.files:
            shard = path.relative_to(self.folder).as_posix()
            try:
                with self.library.ParquetFile(path) as file:
                    yield from self._samples(path, shard, file, done)
            except (OSError, ValueError) as error:
                if isinstance(error, ConfigError):
                    raise
                yield Item(
                    shard, problem=f"it cannot be read to its end ({(str(error) or repr(error)).splitlines()[0]})"
                )

    def _samples(self, path: Path, shard: str, file: Any, done: Container[str]) -> Iterator[Item]:
        names = file.schema_arrow.names
        image, caption = (self._column(path, names, index) for index in (0, 1))
        first = 0
        for group in range(file.num_row_groups):
            rows = range(first, first + file.metadata.row_group(group).num_rows)
            first = rows.stop
            if all(f"{shard}:{row}" in done for row in rows):
                continue
            row = rows.start
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[image, caption]):
                for entry in batch.to_pylist():
                    name = f"{shard}:{row}"
                    row += 1
                    if name not in done:
                        yield self._item(name, path.parent, entry[image], entry[caption])

    def _item(self, name: str, folder: Path, image: Any, caption: Any) -> Item:
        if isinstance(image, dict):
            place = image.get("path")
            image = image.get("bytes")
            if image is None and isinstance(place, str):
                return _captioned(name, caption, (folder / place).read_bytes)
        if not isinstance(image, bytes):
            return Item(name, problem="it has no image bytes")
        return _captioned(name, caption, lambda: image)
