"""What every request passes: the limit of its body, and the counters."""

from __future__ import annotations

import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import ServeError
from .service import ImageService

COUNTED = "/v1/images/generations"


class Gate:
    """Refuses large bodies, unread where they say their size, and counts the requests for pictures."""

    def __init__(self, app: ASGIApp, service: ImageService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        metrics, status, started = self.service.metrics, 499, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.service.running += 1
        try:
            await self._limited(scope, receive, noting)
        finally:
            self.service.running -= 1
            if scope["path"] == COUNTED:
                metrics.requests.labels(str(status)).inc()
                metrics.latency.observe(time.perf_counter() - started)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.service.limits.body_bytes
        message = f"the body has more than {limit} bytes, the most that is read"
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limit:
            refusal: Any = ServeError(413, message, code="body_too_large")
            await JSONResponse(refusal.body, 413)(scope, receive, send)
            return
        total = 0

        async def counting() -> Message:
            nonlocal total
            part = await receive()
            total += len(part.get("body", b""))
            if total > limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counting, send)
