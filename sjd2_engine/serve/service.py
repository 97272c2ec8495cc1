"""Between HTTP and the engine's thread: what a request may ask for, and its pictures on their way back."""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..config import MAX_SEED, DecodeConfig
from ..engine import Engine
from ..errors import PromptError, Sjd2Error
from ..files import check_writable, picture_facts, png_bytes, replace_file, slug
from ..results import Picture
from .engine_thread import EngineThread, Event, Failed, Order, Partial, QueueFull
from .failures import ServeError, serve_error
from .metrics import Metrics
from .schemas import DECODE_FIELDS, ImageRequest

logger = logging.getLogger(__name__)
LONGEST_RETRY_S = 60.0
LEAST_TEMPERATURE = 0.001  # logits over less may overflow


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    slots           pictures of one configuration drawn at the same time
    sessions        configurations open at the same time
    queue           pictures without a slot
    images          pictures of one request
    prompt_chars    characters of a prompt
    prompt_tokens   tokens of a prompt that room is kept for; None = twice the model family's usual length
    window          model inputs per forward pass and picture
    body_bytes      of a request
    request_s       from a request to the end of its answer
    shutdown_s      for running requests when the server is told to end
    """

    slots: int = 8
    sessions: int = 4
    queue: int = 256
    images: int = 10
    prompt_chars: int = 4000
    prompt_tokens: int | None = None
    window: int = 256
    body_bytes: int = 256 * 1024
    request_s: float = 600.0
    shutdown_s: float = 30.0


def default_slots(device: torch.device) -> int:
    """A GPU draws eight pictures in little more time than one; a CPU does not."""
    return 8 if device.type == "cuda" else 2


@dataclass(frozen=True)
class Preview:
    """A preview as PNG, the index-th of its picture."""

    index: int
    png: bytes


@dataclass(frozen=True)
class Done:
    """A finished picture, as PNG and with its figures."""

    png: bytes
    picture: Picture


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ImageService:
    """An engine, its thread and its limits. save: folder for every finished picture, written before it is sent."""

    def __init__(self, engine: Engine, limits: Limits | None = None, save: Path | None = None) -> None:
        self.engine, self.limits, self.save = engine, limits or Limits(), save
        if save is not None:
            check_writable(save)
        limit = self.limits
        self.thread = EngineThread(engine, limit.slots, limit.sessions, limit.queue, limit.prompt_tokens)
        self.metrics = Metrics(lambda: self.thread.waiting, lambda: self.thread.active)
        # One thread, so that a picture never overtakes its previews.
        self.developing = ThreadPoolExecutor(1, "sjd2-pictures")
        self.draining, self.running, self.created = False, 0, int(time.time())
        self._latency_s = 1.0

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        height, width = self.engine.model.facts.image_size
        return f"{width}x{height}"

    @property
    def status(self) -> str:
        return "stopping" if self.draining else "ready" if self.thread.alive else "failed"

    def close(self) -> None:
        """End the engine's thread; pictures that are finished are still written."""
        self.draining = True
        self.thread.stop()
        self.developing.shutdown()

    def open(self, request: ImageRequest) -> Job:
        """Check a request and queue its pictures. Raises ServeError; to be called in the event loop."""
        if self.draining:
            raise ServeError(503, "the server is shutting down", kind="server_error", code="stopping", retry_after=10)
        config = self._config(request)
        first = random.randrange(2**31) if request.seed is None else request.seed
        seeds = [(first + index) % (MAX_SEED + 1) for index in range(request.n)]
        job = Job(self, request, config, seeds)
        try:
            self.thread.submit(job.orders)
        except QueueFull as error:
            raise ServeError(
                429,
                f"the server is busy: {error}; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=min(LONGEST_RETRY_S, self._latency_s * (1 + self.thread.waiting / self.limits.slots)),
            ) from None
        return job

    def _config(self, request: ImageRequest) -> DecodeConfig:
        limits, name = self.limits, self.engine.model_name
        if request.model not in (None, name):
            raise ServeError(
                404, f"model {request.model!r} is not served here, only {name!r}", param="model", code="model_not_found"
            )
        if request.response_format == "url":
            raise ServeError(
                400,
                "response_format='url' is not supported, as no files are served; use 'b64_json'",
                param="response_format",
                code="unsupported_value",
            )
        if request.size not in ("auto", self.size):
            raise ServeError(
                400,
                f"size={request.size!r}: {name!r} draws pictures of {self.size} pixels; leave size out, or say 'auto'",
                param="size",
                code="unsupported_value",
            )
        if request.n > limits.images:
            raise ServeError(
                400, f"n={request.n}: one request may ask for at most {limits.images} pictures", param="n",
                code="too_many_images",
            )  # fmt: skip
        if request.partial_images and not request.stream:
            raise ServeError(400, "partial_images needs stream=true", param="partial_images", code="invalid_request")
        for field in ("prompt", "negative_prompt"):
            text = getattr(request, field) or ""
            if len(text) > limits.prompt_chars:
                raise ServeError(
                    400, f"{field} has {len(text)} characters, at most {limits.prompt_chars} are allowed", param=field,
                    code="prompt_too_long",
                )  # fmt: skip
        if request.temperature and request.temperature < LEAST_TEMPERATURE:
            raise ServeError(
                400, f"temperature={request.temperature}: expected 0, or {LEAST_TEMPERATURE} to 100",
                param="temperature", code="unsupported_value",
            )  # fmt: skip
        options = {field: getattr(request, field) for field in DECODE_FIELDS}
        try:
            config = self.engine.config_for(**options)
            if not request.prompt.strip():
                raise PromptError("the prompt is empty: describe the picture in words")
            for text in (request.prompt, config.negative_prompt):
                self.engine.model.encode_prompt(text)
        except Sjd2Error as error:
            raise serve_error(error) from error
        if config.width > limits.window:
            raise ServeError(
                400, f"window={config.window}: at most {limits.window} is allowed here", param="window",
                code="unsupported_value",
            )  # fmt: skip
        return replace(config, seed=0)

    def develop(self, order: Order, event: Event) -> Preview | Done | Failed:
        """Make a PNG of what the engine's thread posted, and put a finished picture on disk."""
        try:
            if isinstance(event, Partial):
                return Preview(event.index, _png(event.image))
            if isinstance(event, Failed):
                return event
            picture = event.picture
            self.metrics.count(order.config.decoder, picture)
            self._latency_s += 0.2 * (picture.latency_s - self._latency_s)
            if picture.image is None:
                return Failed(picture.failure or RuntimeError("no picture came out"))
            facts = picture_facts(order.prompt, order.seed, self.engine.model_name, order.config)
            png = png_bytes(picture.image, facts)
            if self.save is not None:
                stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
                name = f"{stamp}_{uuid.uuid4().hex[:8]}_{slug(order.prompt)}_seed{order.seed}.png"
                replace_file(self.save / name, png)
            return Done(png, picture)
        except Exception as error:
            return Failed(error)


class Job:
    """A request's pictures on their way."""

    def __init__(self, service: ImageService, request: ImageRequest, config: DecodeConfig, seeds: list[int]) -> None:
        self.service, self.request, self.config, self.seeds = service, request, config, seeds
        self.deadline = time.monotonic() + service.limits.request_s
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue()
        self.orders: list[Order] = []
        for index, seed in enumerate(seeds):
            post = functools.partial(self._post, index)
            self.orders.append(Order(request.prompt, seed, config, post, request.partial_images))

    def _post(self, index: int, event: Event) -> None:
        """Called by the engine's thread, which does not wait for PNGs and disks."""
        self.service.developing.submit(self._develop, index, event)

    def _develop(self, index: int, event: Event) -> None:
        developed = self.service.develop(self.orders[index], event)
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, developed))
        except RuntimeError:
            logger.info("the server ended before picture %d could be sent", self.orders[index].number)

    def leave(self) -> None:
        """The client is gone."""
        self._arrived.put_nowait((-1, ClientGone()))

    async def events(self) -> AsyncGenerator[tuple[int, Preview | Done | Failed], None]:
        """(index of the picture, event) until every picture has ended. Raises ClientGone, or ServeError after too long.

        Whichever way it ends, nothing is drawn for this job any more.
        """
        left = set(range(len(self.orders)))
        try:
            while left:
                patience = max(0.0, self.deadline - time.monotonic())
                index, event = await asyncio.wait_for(self._arrived.get(), patience)
                if isinstance(event, ClientGone):
                    raise event
                yield index, event
                if not isinstance(event, Preview):
                    left.discard(index)
        except asyncio.TimeoutError:
            limit = self.service.limits.request_s
            raise ServeError(
                504, f"not finished after {limit:g} s, and given up", kind="server_error", code="timeout"
            ) from None
        finally:
            if left:
                self.service.metrics.cancelled.inc(len(left))
                self.service.thread.cancel(self.orders[index] for index in left)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
