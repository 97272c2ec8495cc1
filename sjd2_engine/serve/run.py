"""A server in this process: bind, serve, end in good order."""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .service import ImageService

logger = logging.getLogger(__name__)
GRACE_S = 5  # for answers still on the wire when the pictures are done


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded for it. Port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}); choose others with --host "
            "and --port"
        ) from error


class _Server(uvicorn.Server):
    """Told to end, it first refuses new requests and lets running ones finish, then closes. Told twice, it hurries."""

    def __init__(self, config: uvicorn.Config, service: ImageService) -> None:
        super().__init__(config)
        self.service = service
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and not self.should_exit:
            self._deadline = self._deadline or time.monotonic() + self.service.limits.shutdown_s
            late = time.monotonic() > self._deadline
            if late:
                logger.warning("%d request(s) did not finish in time and are given up", self.service.running)
                self.service.thread.stop(0)
            self.should_exit = late or self.service.running == 0
        return await super().on_tick(counter)


def run(app: FastAPI, service: ImageService, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S)
    _Server(config, service).run(sockets=[listening])
