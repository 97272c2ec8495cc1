"""`sjd2 demo`: the race in the engine's thread, and the page in a browser."""

from __future__ import annotations

import itertools
import signal
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="pip install 'sjd2-engine[demo]'")

import browser
import gradio
import httpx
from fastapi.testclient import TestClient
from PIL import Image
from serving import PATIENCE_S, process, until

from sjd2_engine import Engine
from sjd2_engine.demo.app import _show, configurations, mount_demo
from sjd2_engine.demo.page import grid, stage, waiting
from sjd2_engine.demo.race import Frame, Race
from sjd2_engine.files import png_facts
from sjd2_engine.layout import TokenLayout
from sjd2_engine.serve.app import create_app
from sjd2_engine.serve.service import ImageService, Limits

PROMPT = "a red circle"


@pytest.fixture
def service(tuned: Engine, tmp_path: Path) -> Iterator[ImageService]:
    service = ImageService(tuned, Limits(slots=1), tmp_path)
    service.thread.start()
    yield service
    service.close()


@pytest.fixture(scope="module")
def frames(tuned: Engine) -> list[Frame]:
    service = ImageService(tuned, Limits(slots=1))
    service.thread.start()
    found = list(Race(service.thread, PROMPT, 3, configurations(service)).frames())
    service.close()
    return found


def test_every_lane_draws_what_the_engine_draws(frames: list[Frame], tuned: Engine) -> None:
    last = frames[-1]
    assert last.over and not any(frame.over for frame in frames[:-1])
    for lane in last.lanes:
        wanted = tuned.generate(PROMPT, decoder=lane.config.decoder, seed=3)
        assert lane.picture is not None and torch.equal(lane.picture.tokens, wanted.tokens[0])
        assert lane.forward_passes == wanted.stats.forward_passes[0] and lane.length == lane.total == 272
        assert lane.levels == () and lane.seconds > 0


def test_frames_show_the_race_on_its_way(frames: list[Frame]) -> None:
    assert len(frames) > 10 and frames[0].slow_motion >= 1
    for before, after in itertools.pairwise(frames):
        for one, other in zip(before.lanes, after.lanes):
            assert one.length <= other.length and one.seconds <= other.seconds
            assert one.forward_passes <= other.forward_passes
    ar, sjd, sjd2 = frames[len(frames) // 5].lanes
    assert ar.levels == () and set(sjd.levels) == {-1} and len(sjd.levels) == sjd.config.width - 1
    noisy = {level for frame in frames for level in frame.lanes[2].levels}
    assert sjd2.config.denoise_levels - 1 in noisy <= set(range(-1, sjd2.config.denoise_levels))
    assert len(sjd2.levels) == sjd2.config.width - 1


def test_the_stage_tells_what_the_frame_holds(frames: list[Frame], tuned: Engine) -> None:
    facts = tuned.model.facts
    assert grid(facts.layout, facts.image_size) == (16, 16)
    assert grid(TokenLayout([-1] * 96), (256, 384)) == (8, 12)
    middle = replace(frames[len(frames) // 5], slow_motion=4.0)
    page = stage(facts.layout, facts.image_size, middle)
    bars = page.count('<i style="height:')
    assert bars == sum(len(lane.levels) for lane in middle.lanes) > 40
    assert page.count("<img") == 3 and "4× slower than it runs" in page and 'class="missing"' in page
    for lane in middle.lanes:
        assert f"<dd>{lane.forward_passes}</dd>" in page and f"<dd>{lane.seconds:.2f}</dd>" in page
    final = stage(facts.layout, facts.image_size, frames[-1])
    assert final.count("faster</span>") == 2 and "<svg" not in final
    assert "SJD2 drew AR’s picture, token for token" in final
    assert "&lt;script&gt;" in waiting("<script>")


def test_pictures_are_kept_and_say_how_they_were_made(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sjd2_engine.demo.app.FRAME_S", 0.0)  # nobody watches
    *_, (final, gallery, kept, archive) = _show(service)(PROMPT, 3, [])
    assert "race" in final and len(gallery.value) == len(kept) == 3 and archive.visible
    facts = [png_facts(path) for path in sorted(Path(service.save or "").iterdir())]
    assert {fact["decoder"] for fact in facts} == {"ar", "sjd", "sjd2"} and {fact["seed"] for fact in facts} == {"3"}
    assert 'sjd2_images_total{decoder="sjd2"} 1.0' in service.metrics.text().decode()


def test_what_cannot_be_drawn_is_said(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    for prompt, says in (("  ", "empty"), ("a unicorn", "unicorn")):
        with pytest.raises(gradio.Error, match=says):
            next(_show(service)(prompt, 0, []))
    table = service.engine.model.transformer.embedding
    kept = table.clone()
    try:
        table.fill_(float("nan"))
        *_, (final, _, kept_pictures, _) = _show(service)(PROMPT, 0, [])
    finally:
        table.copy_(kept)
    assert final.count('class="badge">failed') == 3 and kept_pictures == []
    service.draining = True
    with pytest.raises(gradio.Error, match="shutting down"):
        next(_show(service)(PROMPT, 0, []))


def test_a_visitor_who_leaves_ends_the_race(service: ImageService) -> None:
    showing = _show(service)(PROMPT, 0, [])
    next(showing)
    next(showing)
    showing.close()
    until(lambda: not service.thread._tasks)


def test_weights_without_noise_training_race_jacobi(base: Engine) -> None:
    service = ImageService(base, Limits(slots=1))
    assert [config.decoder for config in configurations(service)] == ["ar", "sjd", "jacobi"]


def test_with_a_key_the_page_asks_for_it(tuned: Engine) -> None:
    service = ImageService(tuned, Limits(slots=1))
    with TestClient(mount_demo(create_app(service, "secret"), service, "secret")) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "sjd2", "password": "wrong"}).status_code == 400
        assert client.get("/v1/models").status_code == 401
        assert client.post("/login", data={"username": "sjd2", "password": "secret"}).status_code == 200
        assert client.get("/config").status_code == 200 and client.get("/health").json()["status"] == "ready"


@pytest.mark.slow  # a server, a browser and a race of ten seconds
@pytest.mark.skipif(browser.find() is None, reason="no Chromium here (chromium, google-chrome)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """A race from the click to the download; what a visitor sees is looked at by way of a screenshot."""
    with process(command="demo") as (running, url), browser.browse(url) as page:
        page.until("!!document.querySelector('#go')")
        page.run("document.querySelector('#go').click()")
        page.until("document.querySelectorAll('.lane').length == 3")
        page.until("document.querySelectorAll('.lane:not(.done) .strip i').length > 8")
        during = page.picture(tmp_path / "during.png")
        page.until("document.querySelectorAll('.lane.done').length == 3")
        passes = page.run("[...document.querySelectorAll('.lane dd:first-child')].map(e => e.innerText)")
        assert passes[0] == "272" and all(float(count) < 272 for count in passes[3::3])
        page.until("document.querySelectorAll('#gallery img').length >= 3")
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        page.run("document.querySelector('#download').click()")
        until((tmp_path / "pictures.zip").exists)
        with zipfile.ZipFile(tmp_path / "pictures.zip") as archive:
            assert len(archive.namelist()) == 3
            archive.extractall(tmp_path)
            assert {png_facts(tmp_path / name)["decoder"] for name in archive.namelist()} == {"ar", "sjd", "sjd2"}
        after = page.picture(tmp_path / "after.png")
        with Image.open(during) as one, Image.open(after) as other:
            assert one.width == other.width and len(one.convert("RGB").getcolors(2**24) or []) > 500
        page.run("document.querySelector('#go').click()")
        page.until("document.querySelectorAll('.lane:not(.done)').length == 3")
        page.run("document.querySelector('#stop').click()")
        page.until("document.querySelector('.curtain')?.innerText == 'Stopped.'")
        time.sleep(1)  # a race that went on would show more frames
        assert page.run("document.querySelectorAll('.lane').length") == 0
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "scenes-sjd2"
        # The page works where there is no network but the server.
        loaded = page.run("performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
        assert set(loaded) <= {url, "null"}
        # A page that is still open does not keep the server from ending.
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 0
