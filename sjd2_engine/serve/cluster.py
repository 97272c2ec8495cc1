"""The same app on many hosts: an application builder for Ray Serve.

    serve run sjd2_engine.serve.cluster:build model=scenes-sjd2 replicas=4 gpus=1

Every replica is a server of its own with an engine of its own; Ray's proxies spread the requests over them.
"""

# Ray looks at the annotation of `build` to make a Deployment of what it is given: no postponed annotations here.
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ..engine import Engine
from ..errors import BackendError
from .app import create_app
from .service import ImageService, Limits, default_slots

KEY = "SJD2_API_KEY"


class Deployment(BaseModel):
    """What `serve run … name=value` may say; the rest is as `sjd2 serve` has it."""

    model_config = ConfigDict(extra="forbid")

    model: str = "scenes-sjd2"
    replicas: int = Field(default=1, ge=1, description="Engines in the cluster.")
    gpus: float = Field(default=0, ge=0, description="Of each replica; 0 = it draws on the CPU.")
    cpus: float = Field(default=1, gt=0, description="Of each replica.")
    dtype: str = "auto"
    image_size: int | None = None
    slots: int | None = Field(default=None, ge=1)
    queue: int = Field(default=256, ge=1, description="Pictures that may wait at each replica.")
    images: int = Field(default=10, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    save: Path | None = Field(default=None, description="Folder that every host sees.")


def build(options: Deployment) -> Any:
    """An application for `serve run`, `serve deploy` and `ray.serve.run`. Raises BackendError without Ray Serve.

    Clients must send the key that SJD2_API_KEY holds where this is called.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise BackendError("Ray Serve is not installed; try: pip install 'sjd2-engine[cluster]'") from error

    key = os.environ.get(KEY)

    def make_app() -> FastAPI:
        return _replica_app(options, key)

    deployment = serve.deployment(
        name="sjd2",
        num_replicas=options.replicas,
        # A replica refuses by itself what its queue does not hold, with an answer that clients understand.
        max_ongoing_requests=2 * (options.queue + Limits.slots),
        graceful_shutdown_timeout_s=Limits.shutdown_s,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return deployment(serve.ingress(make_app)()).bind()


def _replica_app(options: Deployment, key: str | None) -> FastAPI:
    """What each replica serves; called where it runs."""
    device = "cuda" if options.gpus else "cpu"
    engine = Engine.from_pretrained(options.model, device, options.dtype, image_size=options.image_size)
    limits = Limits(
        slots=options.slots or default_slots(engine.device), queue=options.queue, images=options.images,
        request_s=options.timeout,
    )  # fmt: skip
    return create_app(ImageService(engine, limits, options.save), key)
