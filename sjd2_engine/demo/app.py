"""The page: a prompt, the race, a gallery, on the same engine and beside the same API as `sjd2 serve`."""

from __future__ import annotations

import hmac
import html
import io
import os
import random
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from ..config import DecodeConfig
from ..errors import Sjd2Error
from ..files import slug
from ..serve.engine_thread import Finished, Order
from ..serve.service import Done, ImageService
from .page import stage, waiting
from .race import FRAME_S, Frame, LaneView, Race
from .style import CSS, DARK

USER = "sjd2"
ALL = "Download all as a zip file"
KEPT = 24  # pictures in a visitor's gallery
RACES = 2  # at the same time; others wait
MAX_SEED = 2**31 - 1
Kept = tuple[bytes, str]  # a picture as PNG and its caption
EXAMPLES = {
    "scenes": (
        "a red circle left of a blue square", "three green stars", "a large yellow ring on a striped background",
        "two small purple triangles",
    ),
}  # fmt: skip
ANY_MODEL = ("a watercolour of a lighthouse at dawn", "a red fox asleep in the snow", "a bowl of ramen, studio light")
HERO = """<div class="hero"><h1>Many tokens per pass, <span>one race</span></h1>
<p>Three decoders draw the same prompt from the same seed with the same weights, <b>{model}</b> on {device}. AR writes
one token per forward pass; the others guess a window of tokens ahead and keep what the model confirms.</p></div>"""


def mount_demo(app: FastAPI, service: ImageService, api_key: str | None = None) -> FastAPI:
    """Put the page at /, beside the API; with a key, visitors log in as "sjd2" with the key as password."""

    def right(user: str, password: str) -> bool:
        return user == USER and hmac.compare_digest(password.encode(), (api_key or "").encode())

    return gr.mount_gradio_app(
        app, build_page(service), path="/", auth=right if api_key else None, css=CSS, js=DARK, footer_links=[],
        theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"]),
    )  # fmt: skip


def configurations(service: ImageService) -> list[DecodeConfig]:
    """The decoders that race: without noise training SJD2 gives its lane to Jacobi."""
    third = "sjd2" if service.engine.is_tuned else "jacobi"
    return [service.engine.config_for(decoder) for decoder in ("ar", "sjd", third)]


def build_page(service: ImageService) -> gr.Blocks:
    """The page of one server."""
    engine, show = service.engine, _show(service)
    examples = EXAMPLES.get(engine.model.facts.family, ANY_MODEL)
    with gr.Blocks(title="sjd2 demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(HERO.format(model=html.escape(engine.model_name), device=engine.device.type.upper()))
        kept = gr.State([])
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                examples[0], label="Prompt", scale=6, max_length=service.limits.prompt_chars, elem_id="prompt"
            )
            seed = gr.Number(4, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=1, min_width=120)
            with gr.Column(scale=2, min_width=220):
                go = gr.Button("Race", variant="primary", elem_id="go")
                with gr.Row():
                    dice = gr.Button("Another seed", size="sm", min_width=100)
                    stop = gr.Button("Stop", size="sm", min_width=80, elem_id="stop")
        gr.Examples([[text] for text in examples], prompt, label="Prompts to try")
        scene = gr.HTML(waiting("Press Race."), elem_id="stage")
        gallery = gr.Gallery(
            label="Gallery", columns=6, height="auto", object_fit="cover", format="png", visible=False,
            interactive=False, buttons=["download", "fullscreen"], elem_id="gallery",
        )  # fmt: skip
        download = gr.DownloadButton(ALL, visible=False, elem_id="download")
        dice.click(lambda: random.randrange(MAX_SEED), None, seed, api_visibility="private")
        # A second race on one page would draw over the first: the click is ignored until that is over.
        begun = gr.on(
            [go.click, prompt.submit], show, [prompt, seed, kept], [scene, gallery, kept, download],
            concurrency_limit=RACES, trigger_mode="once", show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        stop.click(_stopped, None, scene, cancels=[begun], api_visibility="private")
    return page.queue(max_size=32)


def _stopped() -> str:
    """The stage after Stop, once the frame that was under way is there: it would be drawn over this one."""
    time.sleep(3 * FRAME_S)
    return waiting("Stopped.")


def _show(service: ImageService) -> Callable[..., Generator[Any, None, None]]:
    facts = service.engine.model.facts

    def show(prompt: str, seed: float, kept: list[Kept]) -> Generator[Any, None, None]:
        """Yields the stage ten times a second, and at the end the gallery and its zip too."""
        _check(service, prompt)
        still = gr.skip(), gr.skip(), gr.skip()
        yield (waiting("The decoders warm up …"), *still)
        race = Race(service.thread, prompt, int(seed or 0), configurations(service))
        last, next_frame = None, time.monotonic()
        try:
            for last in race.frames():
                time.sleep(max(0.0, next_frame - time.monotonic()))
                next_frame = time.monotonic() + FRAME_S
                yield (stage(facts.layout, facts.image_size, last), *still)
        except (Sjd2Error, RuntimeError) as error:
            raise gr.Error(str(error)) from error
        finally:
            race.stop()
        if last is not None and last.over:
            kept = [*_finished(service, race, last), *kept][:KEPT]
            pictures = [(Image.open(io.BytesIO(png)), caption) for png, caption in kept]
            with tempfile.TemporaryDirectory(prefix="sjd2-") as folder:
                # The page copies the file before it asks for more, so it need not stay.
                archive = gr.DownloadButton(ALL, str(_archive(Path(folder), kept)), visible=True)
                final = stage(facts.layout, facts.image_size, last)
                yield final, gr.Gallery(pictures, visible=True), kept, archive

    return show


def _check(service: ImageService, prompt: str) -> None:
    """Say what cannot be drawn before anything starts."""
    if service.draining:
        raise gr.Error("the server is shutting down")
    if not prompt.strip():
        raise gr.Error("the prompt is empty: describe the picture in words")
    try:
        service.engine.model.encode_prompt(prompt)
    except Sjd2Error as error:
        raise gr.Error(str(error)) from error


def _finished(service: ImageService, race: Race, frame: Frame) -> list[Kept]:
    """The pictures of a race with their captions; counted, and saved, as those of the API are."""
    pictures = []
    for lane in frame.lanes:
        assert lane.picture is not None
        order = Order(race.prompt, race.seed, lane.config, post=lambda event: None)
        done = service.develop(order, Finished(replace(lane.picture, latency_s=lane.seconds)))
        if isinstance(done, Done):
            pictures.append((done.png, _caption(lane, race)))
    return pictures


def _caption(lane: LaneView, race: Race) -> str:
    return f"{lane.config.decoder} · {race.prompt} · seed {race.seed} · {lane.forward_passes} passes"


def _archive(folder: Path, kept: list[Kept]) -> Path:
    """All pictures of a gallery as one file."""
    path = folder / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, (png, caption) in enumerate(kept):
            archive.writestr(f"{number:02d}_{slug(caption)}.png", png)
    return path
