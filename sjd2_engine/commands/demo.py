"""`sjd2 demo`: a page in the browser."""

from __future__ import annotations

import os

from . import options as o
from .common import load_engine
from .serve import KEY, Host, Port, Save, announce, require


def demo(
    model: o.Model = "scenes-sjd2",
    host: Host = "127.0.0.1",
    port: Port = 7860,
    save: Save = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Show a page on which AR, SJD and SJD2 race, beside the API of `sjd2 serve`."""
    require("demo", "fastapi", "uvicorn", "prometheus_client", "gradio")
    from ..demo.app import mount_demo
    from ..serve.app import create_app
    from ..serve.run import listen, run
    from ..serve.service import ImageService, Limits, default_slots

    listening = listen(host, port)
    engine = load_engine(model, device, dtype, image_size, allow_pickle)
    service = ImageService(engine, Limits(slots=default_slots(engine.device)), save)
    key = os.environ.get(KEY)
    app = mount_demo(create_app(service, key), service, key)
    announce("demo", engine.model_name, listening.getsockname(), key, "/")
    run(app, service, listening)
