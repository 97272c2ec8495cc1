"""The HTTP face: OpenAI's images API, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .. import __version__
from .failures import ServeError, request_error, serve_error
from .gate import Gate
from .schemas import (
    ErrorBody,
    Health,
    ImageData,
    ImageRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    TokenDetails,
    Usage,
)
from .service import ClientGone, Done, Failed, ImageService, Job, Preview

CLIENT_CLOSED = 499  # as nginx logs it; nobody reads this answer
ERRORS: dict[int | str, Any] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
BEARER = HTTPBearer(auto_error=False, description="The value of SJD2_API_KEY where the server runs.")
EVENT_STREAM: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(service: ImageService, api_key: str | None = None) -> FastAPI:
    """The application around a service; api_key: what clients send as Bearer token, None = no key is asked for."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="sjd2-engine", version=__version__, lifespan=lifespan, responses=ERRORS)
    app.add_middleware(Gate, service=service)
    app.state.service = service
    _add_handlers(app)
    _add_public(app, service)
    _add_api(app, service, api_key)
    return app


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ServeError)
    async def refused(_: Request, error: ServeError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = request_error(error.errors())
        return JSONResponse(found.body, found.status)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        found = ServeError(error.status_code, str(error.detail))
        return JSONResponse(found.body, found.status, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        found = serve_error(error)
        return JSONResponse(found.body, found.status, found.headers)


def _add_public(app: FastAPI, service: ImageService) -> None:
    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the server takes requests (200) or not (503), and how busy it is."""
        if service.status != "ready":
            response.status_code = 503
        thread = service.thread
        return Health(
            status=service.status,  # pyright: ignore[reportArgumentType]
            model=service.engine.model_name,
            waiting=thread.waiting,
            active=thread.active,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_api(app: FastAPI, service: ImageService, api_key: str | None) -> None:
    async def authorise(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        # compare_digest takes as long for a nearly right key as for a wrong one.
        if api_key and not (given and hmac.compare_digest(given.credentials.encode(), api_key.encode())):
            raise ServeError(
                401, "a wrong API key, or none: send 'Authorization: Bearer KEY'", kind="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip

    card = ModelCard(id=service.engine.model_name, created=service.created)

    @app.get("/v1/models", dependencies=[Depends(authorise)])
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", dependencies=[Depends(authorise)])
    async def model(name: str) -> ModelCard:
        """The model, if it is the one."""
        if name != card.id:
            raise ServeError(404, f"model {name!r} is not served here, only {card.id!r}", code="model_not_found")
        return card

    @app.post(
        "/v1/images/generations",
        dependencies=[Depends(authorise)],
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=EVENT_STREAM,
    )
    async def generations(body: ImageRequest, request: Request) -> Any:
        """Draw pictures; with stream=true as server-sent events, previews first."""
        job = service.open(body)
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(_stream(job, request), media_type="text/event-stream", headers=headers)
        try:
            return await _answer(job, request)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED)


@contextlib.asynccontextmanager
async def _watched(job: Job, request: Request) -> AsyncIterator[None]:
    """Tell the job when its client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def _answer(job: Job, request: Request) -> ImagesResponse:
    """All pictures in one answer; an error if every one failed."""
    ended: dict[int, Done | Failed] = {}
    async with _watched(job, request), contextlib.aclosing(job.events()) as events:
        async for index, event in events:
            if not isinstance(event, Preview):
                ended[index] = event
    failures = [event.error for event in ended.values() if isinstance(event, Failed)]
    if len(failures) == len(ended):
        raise serve_error(failures[0])
    return ImagesResponse(
        created=int(time.time()),
        model=job.service.engine.model_name,
        decoder=job.config.decoder,
        size=job.service.size,
        data=[_data(job.seeds[index], event) for index, event in sorted(ended.items())],
        usage=_usage(job, len(ended) - len(failures)),
    )


def _data(seed: int, event: Done | Failed) -> ImageData:
    if isinstance(event, Failed):
        return ImageData(seed=seed, error=serve_error(event.error).detail)
    return ImageData(
        b64_json=base64.b64encode(event.png).decode(),
        seed=seed,
        forward_passes=event.picture.forward_passes,
        latency_s=event.picture.latency_s,
    )


def _usage(job: Job, pictures: int) -> Usage:
    """Tokens of the prompt, read once, and of the finished pictures."""
    model = job.service.engine.model
    read, drawn = len(model.encode_prompt(job.request.prompt)), pictures * model.layout.image_count
    return Usage(
        input_tokens=read,
        input_tokens_details=TokenDetails(text_tokens=read),
        output_tokens=drawn,
        total_tokens=read + drawn,
    )


async def _stream(job: Job, request: Request) -> AsyncIterator[str]:
    """Server-sent events. Clients end with the first error, so errors come last."""
    failures: list[Exception] = []
    common = {"output_format": "png", "quality": "auto", "background": "opaque", "size": job.service.size}
    try:
        async with _watched(job, request), contextlib.aclosing(job.events()) as events:
            async for index, event in events:
                if isinstance(event, Failed):
                    failures.append(event.error)
                    continue
                facts: dict[str, Any] = {**common, "created_at": int(time.time()), "image_index": index}
                if isinstance(event, Preview):
                    kind, picture = "image_generation.partial_image", base64.b64encode(event.png).decode()
                    facts |= {"b64_json": picture, "partial_image_index": event.index}
                else:
                    kind = "image_generation.completed"
                    facts |= _data(job.seeds[index], event).model_dump(exclude_none=True)
                    facts["usage"] = _usage(job, 1).model_dump()
                yield _event(kind, {"type": kind, **facts})
    except ClientGone:
        return
    except ServeError as error:
        failures.append(error)
    for failure in failures:
        yield _event("error", {"type": "error", **serve_error(failure).body})


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
