"""A live server in this process or another, and what tests ask of it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageChops

from sjd2_engine import Engine
from sjd2_engine.serve.app import create_app
from sjd2_engine.serve.run import listen, run
from sjd2_engine.serve.service import ImageService, Limits

PATIENCE_S = 300  # a busy machine may be slow, a hanging test is worse


@contextlib.contextmanager
def live(engine: Engine, limits: Limits, key: str | None = None, save: Path | None = None) -> Iterator[Any]:
    """A server on a free port: yields (service, address)."""
    listening = listen("127.0.0.1", 0)
    service = ImageService(engine, limits, save)
    thread = threading.Thread(target=run, args=(create_app(service, key), service, listening))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        until(lambda: answers(url))
        yield service, url
    finally:
        service.draining = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(*options: str, key: str | None = None, command: str = "serve") -> Iterator[Any]:
    """`sjd2 serve` on a free port: yields (process, address). It is killed if it still runs at the end."""
    arguments = [sys.executable, "-m", "sjd2_engine.cli", command, "--port", "0", "--device", "cpu", *options]
    environment = {**os.environ, **({"SJD2_API_KEY": key} if key else {})}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", running.stdout.readline())
            assert found, "the server said nothing"
            until(lambda: answers(found.group()))
            yield running, found.group()
        finally:
            running.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


def until(true: Callable[[], object]) -> None:
    """Wait for something that comes at its own pace."""
    ending = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ending, "waited for too long"
        time.sleep(0.05)


def picture(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def same(one: Image.Image, other: Image.Image | None) -> bool:
    return other is not None and one.size == other.size and ImageChops.difference(one, other).getbbox() is None
