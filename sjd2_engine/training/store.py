"""Pictures as tokens on disk, ready for training: `sjd2 prepare` writes such a folder, `sjd2 finetune` reads it.

    dataset.json                 what the tokens are: model family, picture tokenizer, picture size (DatasetInfo)
    shard-00000.safetensors …    tokens int32 [n, image_count], captions and names of the sources as UTF-8
    skipped.jsonl                one line per item of the source that gave no picture: its name and the reason

A shard is written whole or not at all, and names the sources of its pictures: whatever moment a run is killed at, the
next one knows what is done.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import check_writable, replace_file
from ..models import ImageModel

FORMAT = 1
SHARD_SIZE = 1024  # pictures; what a killed run encodes again
INFO, SKIPPED, LOCK = "dataset.json", "skipped.jsonl", ".lock"
PATTERN = "shard-*.safetensors"


def fingerprint(codebook: Tensor) -> str:
    """16 hex digits that tell picture tokenizers apart, from their codebook [V, c]."""
    # Rounded to bfloat16, so that a checkpoint saved again with fewer bits keeps its tokenizer.
    rounded = codebook.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(str(tuple(rounded.shape)).encode())
    digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DatasetInfo:
    """What the tokens of a folder are.

    family            the model family whose tokens these are
    tokenizer         fingerprint of the picture tokenizer's codebook
    image_size        (height, width) in pixels
    image_count       image tokens per picture, forced tokens left out
    image_vocabulary  V; tokens are 0 … V-1
    prompt            what captions are: "text", or "class" (a number or name)
    shard_size        pictures per finished shard
    settings          how the pictures were made; a run goes on only with the same ones
    pictures          how many there are, written when a source is finished; None before
    """

    family: str
    tokenizer: str
    image_size: tuple[int, int]
    image_count: int
    image_vocabulary: int
    prompt: str = "text"
    shard_size: int = SHARD_SIZE
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: int | None = None

    @classmethod
    def of(cls, model: ImageModel, shard_size: int = SHARD_SIZE, settings: dict[str, Any] | None = None) -> DatasetInfo:
        """The description of data that fits a model."""
        facts = model.facts
        return cls(
            facts.family, fingerprint(model.codebook), facts.image_size, facts.layout.image_count,
            facts.image_vocabulary, model.prompt_kind, shard_size, settings or {},
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> DatasetInfo:
        """That of a folder; CheckpointError where there is none or it cannot be read."""
        path = folder / INFO
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            version = stored.pop("format")
            if version != FORMAT:
                raise CheckpointError(
                    f"{path} has format {version!r}, this version of sjd2-engine reads {FORMAT}: prepare the data "
                    "again, or use the version that wrote it"
                )
            known = {entry.name for entry in fields(cls)}
            return cls(**{**{k: v for k, v in stored.items() if k in known}, "image_size": tuple(stored["image_size"])})
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: the folder holds no prepared data; make it by: sjd2 prepare SOURCE -o {folder}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}); run sjd2 prepare again") from error

    def write(self, folder: Path) -> None:
        replace_file(folder / INFO, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    def check(self, wanted: DatasetInfo, folder: Path) -> None:
        """Raise ConfigError unless these tokens are what `wanted` describes; settings do not matter."""
        names = {
            "family": "the model family", "tokenizer": "the picture tokenizer", "image_size": "the picture size",
            "image_count": "tokens per picture", "image_vocabulary": "image ids", "prompt": "the kind of prompt",
        }  # fmt: skip
        for name, words in names.items():
            given, expected = getattr(self, name), getattr(wanted, name)
            if given != expected:
                raise ConfigError(
                    f"the data in '{folder}' was prepared for another model: {words} is {given!r} there, the model "
                    f"({wanted.family}) needs {expected!r}; prepare it with this model into another folder"
                )


class Shard:
    """One file of a folder: headers are checked on opening, contents on first use; CheckpointError names the file.

    `tokens` int32 [n, image_count], memory-mapped.
    """

    def __init__(self, path: Path, image_count: int) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            shape = tuple(self._file.get_slice("tokens").get_shape())
            self._sum = (self._file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        if len(shape) != 2 or shape[1] != image_count:
            raise self._damaged(f"tokens of shape {shape}, expected [n, {image_count}]")
        self._length = shape[0]
        self._tensors: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self._length

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged ({reason}); delete it and run the same sjd2 prepare again, which makes what is "
            "missing"
        )

    def _read(self) -> dict[str, Tensor]:
        if self._tensors is None:
            try:
                tensors = {name: self._file.get_tensor(name) for name in NAMES}
            except (SafetensorError, OSError, RuntimeError) as error:
                raise self._damaged(str(error)) from error
            if checksum(tensors) != self._sum:
                raise self._damaged("its contents do not match their checksum")
            self._tensors = tensors
        return self._tensors

    @property
    def tokens(self) -> Tensor:
        return self._read()["tokens"]

    def caption(self, index: int) -> str:
        """Caption of a picture."""
        return self._text("caption", index)

    def sources(self) -> list[str]:
        """Names of the sources of all pictures."""
        tensors = self._read()
        raw, ends = tensors["source_bytes"].numpy().tobytes(), tensors["source_offsets"].tolist()
        return [raw[first:end].decode() for first, end in itertools.pairwise(ends)]

    def _text(self, name: str, index: int) -> str:
        tensors = self._read()
        first, end = tensors[f"{name}_offsets"][index : index + 2].tolist()
        return tensors[f"{name}_bytes"][first:end].numpy().tobytes().decode()


# In this order under the checksum.
NAMES = ("tokens", "caption_bytes", "caption_offsets", "source_bytes", "source_offsets")


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of a shard's contents, in decimal digits."""
    total = 0
    for name in NAMES:
        total = zlib.crc32(tensors[name].numpy().data, total)
    return str(total)


def _packed(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    raw = [text.encode() for text in texts]
    ends = torch.tensor([0, *map(len, raw)]).cumsum(0)
    joined = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8) if any(raw) else torch.empty(0).byte()
    return {f"{name}_bytes": joined, f"{name}_offsets": ends}


def pack(tokens: Tensor, captions: Sequence[str], sources: Sequence[str]) -> bytes:
    """The bytes of a shard."""
    texts = {**_packed("caption", captions), **_packed("source", sources)}
    tensors = {"tokens": tokens.to(torch.int32).contiguous(), **texts}
    return save(tensors, {"crc32": checksum(tensors)})


class Store:
    """The pictures of a prepared folder, in the order they were written: `store[i]` -> (tokens int64 [n], caption).

    Nothing but headers is read before it is asked for. Raises CheckpointError for missing and damaged files, which are
    named; `check(model)` raises ConfigError for data of another model. May be sent to other processes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = DatasetInfo.read(self.folder)
        self._open()

    def _open(self) -> None:
        self._shards = [Shard(path, self.info.image_count) for path in shard_paths(self.folder)]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        wanted = self.info.pictures or 1
        if len(self) < wanted:
            raise CheckpointError(
                f"'{self.folder}' holds {len(self)} pictures, expected at least {wanted}; run the same sjd2 prepare "
                "again, which makes what is missing"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def check(self, model: ImageModel) -> None:
        """Raise ConfigError unless the tokens are this model's."""
        self.info.check(DatasetInfo.of(model), self.folder)

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._shards[shard], index - self._starts[shard]

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        shard, row = self._place(index)
        return shard.tokens[row].long(), shard.caption(row)

    def caption(self, index: int) -> str:
        """A picture's caption alone."""
        shard, row = self._place(index)
        return shard.caption(row)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob(PATTERN))


class ShardWriter:
    """Writes a folder shard by shard; `done` has the names of the sources in it, from earlier runs too.

    A folder is taken up where it was left, if its description is the same; ConfigError if it is not, or if another
    process writes there. `finish` writes the last, shorter shard; what was added after the last whole shard is lost
    if it is never called, and not in `done` next time.
    """

    def __init__(self, folder: str | Path, info: DatasetInfo) -> None:
        self.folder, self.info = check_writable(folder), info
        self._lock = self._locked()
        for left in self.folder.glob(".*.tmp"):  # of a killed run
            left.unlink()
        self.done: set[str] = set()
        self._next = 0
        self._count = 0
        if (self.folder / INFO).exists():
            self._take_up()
        else:
            self._write(lambda: info.write(self.folder))
        self._write(lambda: replace_file(self.folder / SKIPPED, ""))
        self._tokens: list[Tensor] = []
        self._captions: list[str] = []
        self._sources: list[str] = []

    def _locked(self) -> Any:
        file = open(self.folder / LOCK, "w")  # noqa: SIM115  (held as long as the writer)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"another run is writing to '{self.folder}'; choose another folder with --out") from None
        except OSError:
            pass  # a file system without locks
        return file

    def _take_up(self) -> None:
        stored = DatasetInfo.read(self.folder)
        stored.check(self.info, self.folder)
        for name in sorted({*stored.settings, *self.info.settings}):
            given, wanted = stored.settings.get(name), self.info.settings.get(name)
            if given != wanted:
                raise ConfigError(
                    f"'{self.folder}' was begun with {name}={given!r}, now it is {wanted!r}; say the same again to go "
                    "on, or choose another folder with --out"
                )
        # A count is a promise to readers, kept until a new one is made.
        self.info = replace(self.info, pictures=stored.pictures)
        for path in shard_paths(self.folder):
            self.done.update(Shard(path, self.info.image_count).sources())
            self._next = int(path.stem.rpartition("-")[2]) + 1
        self._count = len(self.done)

    def __len__(self) -> int:
        """Pictures so far, those waiting for a whole shard included."""
        return self._count

    def add(self, source: str, tokens: Tensor, caption: str) -> None:
        """Append a picture: tokens int [image_count]. `source` must not be in `done`."""
        if source in self.done:
            raise ConfigError(f"{source!r} is in '{self.folder}' already: names of pictures must differ")
        if tokens.shape != (self.info.image_count,) or not 0 <= int(tokens.min()) <= int(tokens.max()) < (
            self.info.image_vocabulary
        ):
            raise ConfigError(
                f"tokens of {source!r} have shape {tuple(tokens.shape)} and go from {int(tokens.min())} to "
                f"{int(tokens.max())}: expected [{self.info.image_count}], 0 to {self.info.image_vocabulary - 1}"
            )
        self.done.add(source)
        self._tokens.append(tokens.to("cpu", torch.int32))
        self._captions.append(caption)
        self._sources.append(source)
        self._count += 1
        if len(self._tokens) == self.info.shard_size:
            self._flush()

    def skip(self, source: str, reason: str) -> None:
        """Note an item that gives no picture. The list is of this run; the next one looks at the item again."""
        line = json.dumps({"source": source, "reason": reason}, ensure_ascii=False) + "\n"

        def append() -> None:
            with open(self.folder / SKIPPED, "a", encoding="utf-8") as file:
                file.write(line)

        self._write(append)

    def finish(self) -> int:
        """Write what is left and the count of pictures, which is returned."""
        self._flush()
        self.info = replace(self.info, pictures=self._count)
        self._write(lambda: self.info.write(self.folder))
        self.close()
        return self._count

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self) -> None:
        if self._tokens:
            path = self.folder / f"shard-{self._next:05d}.safetensors"
            raw = pack(torch.stack(self._tokens), self._captions, self._sources)
            self._write(lambda: replace_file(path, raw))
            self._next += 1
            self._tokens, self._captions, self._sources = [], [], []

    def _write(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            raise ConfigError(
                f"cannot write to '{self.folder}' ({error.strerror or error}); the shards in it are whole: make room "
                "and run the same command again, which goes on behind them"
            ) from error
