"""Turns captioned pictures into tokens on disk, once, for any number of training runs (`sjd2 prepare`)."""

from __future__ import annotations

import io
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..errors import BackendError, ConfigError, PromptError
from ..models import ImageModel
from .data import CHUNK, draw_chunks
from .sources import Item, Source
from .store import SHARD_SIZE, SKIPPED, DatasetInfo, ShardWriter

AHEAD = 4  # images per worker that are read before they are needed
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Plan:
    """How pictures are prepared.

    batch       pictures encoded together
    workers     threads that read and resize images
    limit       most pictures in the folder; None = all
    upscale     take images that are smaller than the model's pictures, too
    shard_size  pictures per file
    """

    batch: int = 16
    workers: int = 4
    limit: int | None = None
    upscale: bool = False
    shard_size: int = SHARD_SIZE

    def __post_init__(self) -> None:
        for name in ("batch", "workers", "limit", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {value}; expected at least 1")


@dataclass
class Summary:
    """What a run did: pictures in the folder now, how many of them are new, why others were skipped, seconds."""

    pictures: int = 0
    added: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    example: str = ""
    seconds: float = 0.0


class Unusable(Exception):
    """An image that gives no picture; the message is the reason."""


def read_picture(raw: bytes, size: tuple[int, int], upscale: bool = False) -> np.ndarray:
    """The middle of an image file at the model's (height, width): uint8 [height, width, 3].

    Turned as its EXIF data says, transparent parts on white. Raises Unusable.
    """
    if not raw:
        raise Unusable("the file is empty")
    try:
        with Image.open(io.BytesIO(raw)) as file:
            file.load()
            image = _rgb(_upright(file))
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        raise Unusable("it is damaged, or no image that Pillow reads") from error
    height, width = size
    scale = min(image.width / width, image.height / height)
    if scale < 1 and not upscale:
        raise Unusable(f"it is smaller than {width}x{height} pixels")
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # nonsense in the EXIF data, of which there are many kinds, around an image that is whole
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would cut 16 bits off at 255.
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def check_caption(model: ImageModel, text: str) -> str:
    """The caption without white space around it; raises Unusable for one that the model cannot be given."""
    text = text.strip()
    if not text:
        raise Unusable("its caption is empty")
    try:
        length = len(model.encode_prompt(text))
    except PromptError as error:
        raise Unusable(f"its caption is none for this model: {error}") from error
    room = model.facts.transformer.max_position_embeddings - len(model.layout)
    if length > room:
        raise Unusable(f"its caption has {length} tokens, the model has room for {room}")
    return text


def ahead(pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], depth: int) -> Iterator[Out]:
    """`map` in order on a pool, never more than `depth` items ahead."""
    running: deque[Any] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= depth:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


class _Run:
    """Pictures that wait to be encoded together, the writer behind them, and what was skipped."""

    def __init__(self, model: ImageModel, writer: ShardWriter, plan: Plan) -> None:
        self.model, self.writer, self.plan = model, writer, plan
        self.summary = Summary()
        self._waiting: list[tuple[str, np.ndarray, str]] = []

    @property
    def full(self) -> bool:
        """Whether the folder will have as many pictures as it may."""
        return self.plan.limit is not None and len(self.writer) + len(self._waiting) >= self.plan.limit

    def load(self, item: Item) -> tuple[str, np.ndarray | None, str]:
        """Name, pixels and caption of an item, or None and the reason; called by the workers."""
        if item.problem is not None:
            return item.name, None, item.problem
        try:
            raw = item.read()
        except OSError as error:
            return item.name, None, f"it cannot be read ({error.strerror or error})"
        try:
            return item.name, read_picture(raw, self.model.facts.image_size, self.plan.upscale), item.caption
        except Unusable as error:
            return item.name, None, str(error)

    def take(self, name: str, pixels: np.ndarray | None, text: str) -> bool:
        """Keep a loaded item, or note why not; whether it was kept."""
        if pixels is None:
            self.skip(name, text)
            return False
        try:
            self._waiting.append((name, pixels, check_caption(self.model, text)))
        except Unusable as error:
            self.skip(name, str(error))
            return False
        if len(self._waiting) >= self.plan.batch:
            self.encode()
        return True

    def skip(self, name: str, reason: str) -> None:
        reason = " ".join(reason.split())
        self.writer.skip(name, reason)
        self.summary.skipped[reason.partition(":")[0]] += 1
        self.summary.example = self.summary.example or f"{name}: {reason}"

    def encode(self) -> None:
        """Encode and write what waits."""
        if not self._waiting:
            return
        names, pixels, captions = zip(*self._waiting)
        try:
            tokens = self.model.encode_pixels(torch.from_numpy(np.stack(pixels))).cpu()
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{len(names)} pictures at once do not fit into the device's memory; give a smaller --batch and run "
                "the same command again, which goes on"
            ) from error
        for name, row, caption in zip(names, tokens, captions):
            self.writer.add(name, row, caption)
        self.summary.added += len(names)
        self._waiting.clear()


def prepare(model: ImageModel, source: Source, out: Path, plan: Plan, settings: dict[str, Any]) -> Summary:
    """Encode the pictures of a source into a folder (training/store.py), which is taken up where it was left.

    Items that give no picture are listed in skipped.jsonl. Raises ConfigError where none does, for a full disk and
    for a folder begun otherwise.
    """
    start = time.monotonic()
    info = DatasetInfo.of(model, plan.shard_size, {**settings, "upscale": plan.upscale})
    pool = ThreadPoolExecutor(plan.workers)
    with ShardWriter(out, info) as writer:
        run = _Run(model, writer, plan)
        try:
            with tqdm(total=_total(source, plan), initial=len(writer), desc="prepare", unit="image") as bar:
                _encode_all(run, pool, source, bar)
        finally:
            pool.shutdown(cancel_futures=True)
        if not len(writer):
            example = f" ({run.summary.example})" if run.summary.example else ""
            raise ConfigError(
                f"the source gives no picture: {sum(run.summary.skipped.values())} items were skipped{example}; the "
                f"reasons are in {out / SKIPPED}"
            )
        run.summary.pictures = writer.finish()
    run.summary.seconds = time.monotonic() - start
    return run.summary


def _total(source: Source, plan: Plan) -> int | None:
    counts = [count for count in (source.count, plan.limit) if count is not None]
    return min(counts, default=None)


def _encode_all(run: _Run, pool: ThreadPoolExecutor, source: Source, bar: Any) -> None:
    if run.full:
        return
    seen: set[str] = set()
    # A copy: of two items of one name the second is skipped and listed, not taken for done.
    items = source.items(frozenset(run.writer.done))
    for name, pixels, text in ahead(pool, run.load, items, AHEAD * run.plan.workers):
        if name in seen:
            pixels, text = None, "another item has the same name"
        seen.add(name)
        bar.update(run.take(name, pixels, text))
        bar.set_postfix(skipped=sum(run.summary.skipped.values()), refresh=False)
        if run.full:
            break
    run.encode()


def draw(model: ImageModel, out: Path, count: int, plan: Plan, seed: int) -> Summary:
    """Draw and encode captioned scenes instead, which only the scenes family understands; ConfigError for others."""
    if model.family != "scenes":
        raise ConfigError(
            f"--synthetic draws the bundled model's scenes, which mean nothing to the family {model.family}; give a "
            "SOURCE of captioned pictures instead"
        )
    start = time.monotonic()
    info = DatasetInfo.of(model, plan.shard_size, {"source": "synthetic", "seed": seed})
    with ShardWriter(out, info) as writer:
        run = _Run(model, writer, plan)
        done = frozenset(writer.done)
        first = 0
        while first * CHUNK < count and all(scene_name(i) in done for i in _chunk(first, count)):
            first += 1
        for number, (pictures, captions) in enumerate(draw_chunks(count, seed, "drawing and encoding", first), first):
            for index, pixels, caption in zip(_chunk(number, count), pictures, captions):
                if scene_name(index) not in done:
                    run.take(scene_name(index), pixels, caption)
        run.encode()
        run.summary.pictures = writer.finish()
    run.summary.seconds = time.monotonic() - start
    return run.summary


def scene_name(index: int) -> str:
    """What a drawn scene is called in a folder."""
    return f"scene-{index:07d}"


def _chunk(number: int, count: int) -> range:
    return range(number * CHUNK, min((number + 1) * CHUNK, count))
