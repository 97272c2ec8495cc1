"""`sjd2 serve`: pictures over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BackendError, ConfigError
from . import options as o
from .common import load_engine

KEY = "SJD2_API_KEY"
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
SlotCount = Annotated[
    int | None,
    typer.Option(help="Pictures of one configuration drawn at the same time (default: 8 on CUDA, 2 without)."),
]
Save = Annotated[Path | None, typer.Option(help="Folder for every finished picture, written before it is sent.")]


def serve(
    model: o.Model = "scenes-sjd2",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    slots: SlotCount = None,
    sessions: Annotated[int, typer.Option(help="Configurations of decoders open at the same time.")] = 4,
    queue: Annotated[int, typer.Option(help="Pictures that may wait for a slot; more are refused by 429.")] = 256,
    images: Annotated[int, typer.Option(help="Pictures of one request at most.")] = 10,
    prompt_chars: Annotated[int, typer.Option(help="Characters of a prompt at most.")] = 4000,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt that room is kept for (default: twice the usual length).")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = 600.0,
    shutdown: Annotated[float, typer.Option(help="Seconds for running requests after SIGTERM.")] = 30.0,
    save: Save = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Serve OpenAI's images API. With the environment variable SJD2_API_KEY set, clients must send that key."""
    o.at_least_one(sessions=sessions, queue=queue, images=images, prompt_chars=prompt_chars)
    o.at_least_one(**o.given(slots=slots, prompt_tokens=prompt_tokens))
    if timeout <= 0 or shutdown <= 0:
        raise ConfigError(f"--timeout is {timeout} and --shutdown is {shutdown}; expected seconds above 0")
    require("serve", "fastapi", "uvicorn", "prometheus_client")
    from ..serve.app import create_app
    from ..serve.run import listen, run
    from ..serve.service import ImageService, Limits, default_slots

    listening = listen(host, port)
    engine = load_engine(model, device, dtype, image_size, allow_pickle)
    limits = Limits(
        slots or default_slots(engine.device), sessions, queue, images, prompt_chars, prompt_tokens, request_s=timeout,
        shutdown_s=shutdown,
    )  # fmt: skip
    service = ImageService(engine, limits, save)
    key = os.environ.get(KEY)
    announce("serve", service.engine.model_name, listening.getsockname(), key, "/v1")
    run(create_app(service, key), service, listening)


def require(extra: str, *modules: str) -> None:
    """Raise BackendError where an extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BackendError(f"{', '.join(missing)} not installed; try: pip install 'sjd2-engine[{extra}]'")


def announce(command: str, model: str, address: tuple, key: str | None, path: str) -> None:
    """Say where the server is."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    asked = "" if key else f"; no key is asked for (set {KEY})"
    typer.echo(f"sjd2 {command}: {model} on http://{host}:{address[1]}{path}{asked}")
