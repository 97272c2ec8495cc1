"""`sjd2 serve` over HTTP: the official client's view, limits, errors, crowds, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'sjd2-engine[serve]'")
pytest.importorskip("openai", reason="the official client is not installed")

import httpx
import openai
from PIL import Image, ImageChops, ImageStat
from serving import PATIENCE_S, live, picture, same, until

from sjd2_engine import Engine
from sjd2_engine.files import png_facts
from sjd2_engine.serve.service import Limits

PROMPTS = ["a red circle", "a blue ring", "three green stars", "a large red ring"]
KEY = "a-key"
LIMITS = Limits(slots=4, queue=64, images=4)


@pytest.fixture(scope="module")
def server(tuned: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with live(tuned, LIMITS, KEY, tmp_path_factory.mktemp("saved")) as running:
        yield running


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S)


def post(server: Any, body: object, key: str = KEY) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(f"{server[1]}/v1/images/generations", content=content, headers=headers, timeout=PATIENCE_S)


def idle(server: Any) -> bool:
    health = httpx.get(f"{server[1]}/health", timeout=PATIENCE_S).json()
    return health["waiting"] == health["active"] == 0


def test_the_official_client_gets_the_engines_pictures(server: Any, client: openai.OpenAI, tuned: Engine) -> None:
    wanted = tuned.generate([PROMPTS[0]] * 2, decoder="jacobi", seed=5)
    options: dict[str, Any] = {"seed": 5, "decoder": "jacobi"}
    answer = client.images.generate(
        model="scenes-sjd2", prompt=PROMPTS[0], n=2, response_format="b64_json", size="auto", extra_body=options
    )
    assert answer.data is not None and answer.usage is not None
    drawn = [picture(item.b64_json or "") for item in answer.data]
    assert all(map(same, drawn, wanted.images)) and len(drawn) == 2
    assert not same(*drawn)
    assert answer.usage.output_tokens == 2 * tuned.model.layout.image_count and answer.size == "128x128"
    # What was sent had been written before, and says how it was made.
    facts = [png_facts(path) for path in Path(server[0].save).iterdir()]
    assert {fact["seed"] for fact in facts if fact["decoder"] == "jacobi"} >= {"5", "6"}
    assert [model.id for model in client.models.list()] == ["scenes-sjd2"]
    assert client.models.retrieve("scenes-sjd2").id == "scenes-sjd2"


def test_the_code_in_the_documents_runs(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    page = (Path(__file__).resolve().parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(code, names)
    assert {path.name for path in tmp_path.glob("*.png")} == {"0.png", "1.png"}
    assert names["event"].type == "image_generation.completed"


def test_a_stream_shows_the_picture_on_its_way(client: openai.OpenAI, tuned: Engine) -> None:
    wanted = tuned.generate(PROMPTS[1], decoder="sjd2", seed=7).images[0]
    events = list(
        client.images.generate(
            prompt=PROMPTS[1], stream=True, partial_images=2, extra_body={"seed": 7, "decoder": "sjd2"}
        )
    )
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    pictures = [picture(event.b64_json) for event in events]
    assert same(pictures[-1], wanted) and not same(pictures[0], pictures[1]) and not same(pictures[1], pictures[2])
    # A third is there already in the first preview: its upper rows are nearer to the picture's than its lower ones.
    ends = [(0, 0, 128, 24), (0, 104, 128, 128)]
    top, bottom = (ImageChops.difference(pictures[0].crop(end), pictures[2].crop(end)) for end in ends)
    assert sum(ImageStat.Stat(top).sum) < 0.1 * sum(ImageStat.Stat(bottom).sum)


def test_a_crowd_gets_what_each_asked_for(server: Any, tuned: Engine) -> None:
    """24 clients at once, three configurations in turns on four slots: nothing lost, nothing mixed up."""
    kinds: list[dict[str, Any]] = [{"decoder": "jacobi"}, {"decoder": "jacobi", "window": 24}, {"decoder": "sjd2"}]
    asked = [{"prompt": PROMPTS[i % 4], "seed": 100 + i, **kinds[i % 3]} for i in range(24)]
    wanted: dict[int, Image.Image | None] = {}
    for kind in kinds:
        mine = [ask for ask in asked if {**kind, "prompt": ask["prompt"], "seed": ask["seed"]} == ask]
        seeds = [ask["seed"] for ask in mine]
        wanted |= zip(seeds, tuned.generate([ask["prompt"] for ask in mine], seed=seeds, **kind).images)

    async def ask_all() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server[1], headers=headers, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(client.post("/v1/images/generations", json=ask) for ask in asked))

    for ask, answer in zip(asked, asyncio.run(ask_all())):
        assert answer.status_code == 200, answer.text
        (item,) = answer.json()["data"]
        assert item["seed"] == ask["seed"] and same(picture(item["b64_json"]), wanted[ask["seed"]])
    assert idle(server)


def test_a_client_that_leaves_frees_its_slots(server: Any) -> None:
    body = json.dumps({"prompt": PROMPTS[0], "n": 4, "decoder": "ar", "temperature": 0.8}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: server[0].thread.active)
    until(lambda: idle(server))
    text = httpx.get(f"{server[1]}/metrics", timeout=PATIENCE_S).text
    assert "sjd2_images_cancelled_total 4.0" in text and 'sjd2_requests_total{status="499"} 1.0' in text
    assert post(server, {"prompt": PROMPTS[0]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"decoder": "sdj"}, 400, "expected one of ar, jacobi"),
        ({"n": 0}, 400, "n: Input should be greater"),
        ({"n": 10**6}, 400, "at most 4"),
        ({"n": True}, 400, "n: Input should be a valid integer"),
        ({"prompt": "  "}, 400, "empty"),
        ({"prompt": "a unicorn"}, 400, "unicorn"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": "circle " * 1000}, 400, "7000 characters"),
        ({"prompt": "circle " * 400}, 400, "400 words"),
        ({"prompt": "x" * 2**20}, 413, "262144 bytes"),
        ({"negative_prompt": "a unicorn"}, 400, "unicorn"),
        ({"size": "1024x1024"}, 400, "128x128"),
        ({"model": "dall-e-3"}, 404, "scenes-sjd2"),
        ({"response_format": "url"}, 400, "b64_json"),
        ({"seed": -1}, 400, "seed"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"temperature": 1e-300}, 400, "0.001"),
        ({"guidance_scale": 1e30}, 400, "guidance_scale"),
        ({"window": 5000}, 400, "window=5000"),
        ({"window": 300}, 400, "at most 256"),
        ({"partial_images": 2}, 400, "stream=true"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images"),
        ({"colour": "red"}, 400, "colour: unknown field"),
        ({"n": 4, "user": "somebody"}, 200, ""),
        (b"{broken", 400, "not JSON"),
        (b"[]", 400, "body"),
        (b"[" * 100_000, 400, ""),
        (b"", 400, "body"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, (dict, bytes)) else None,
)
def test_bad_requests_get_readable_errors(server: Any, body: Any, status: int, says: str) -> None:
    if status == 200:
        body |= {"decoder": "jacobi", "window": 32, "temperature": 0.0}
    answer = post(server, {"prompt": PROMPTS[0], **body} if isinstance(body, dict) else body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and says in error["message"]
        assert len(error["message"]) < 1000


def test_only_who_has_the_key_may_draw(server: Any) -> None:
    for key in ("another", "a-ke", "a-key-too", "ä"):
        header = httpx.Headers({b"Authorization": f"Bearer {key}".encode()})
        for path in ("models", "models/scenes-sjd2"):
            assert httpx.get(f"{server[1]}/v1/{path}", headers=header).status_code == 401
    answer = post(server, {"prompt": PROMPTS[0]}, "another")
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server[1]}/v1/models").headers["www-authenticate"] == "Bearer"


def test_metrics_say_what_was_done(server: Any) -> None:
    before = httpx.get(f"{server[1]}/metrics").text
    assert post(server, {"prompt": PROMPTS[2], "decoder": "coupled", "window": 48}).status_code == 200
    text = httpx.get(f"{server[1]}/metrics").text
    assert 'sjd2_images_total{decoder="coupled"} 1.0' in text and "coupled" not in before
    steps = float(text.split('sjd2_accepted_tokens_per_step_count{decoder="coupled"} ')[1].split("\n")[0])
    passes = float(text.split('sjd2_forward_passes_total{decoder="coupled"} ')[1].split("\n")[0])
    assert steps == passes > 0
    assert "sjd2_queue_length 0.0" in text and "sjd2_active_slots 0.0" in text


def test_more_than_the_queue_holds_is_refused(tuned: Engine) -> None:
    with live(tuned, Limits(slots=1, queue=3)) as server:
        answer = post(server, {"prompt": PROMPTS[0], "n": 4})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        server[0].draining = True
        refused = server[0].status
        assert refused == "stopping"


def test_a_request_that_takes_too_long_is_given_up(tuned: Engine) -> None:
    with live(tuned, Limits(slots=1, request_s=0.05)) as server:
        answer = post(server, {"prompt": PROMPTS[0], "n": 3, "decoder": "ar"})
        assert answer.status_code == 504 and "0.05 s" in answer.json()["error"]["message"]
        until(lambda: idle(server))
        stream = post(server, {"prompt": PROMPTS[0], "decoder": "ar", "stream": True})
        assert stream.status_code == 200 and stream.text.startswith("event: error") and "0.05 s" in stream.text


def test_what_the_weights_or_the_disk_do_is_said(tmp_path: Path) -> None:
    engine = Engine.from_pretrained("scenes", device="cpu")
    with live(engine, Limits(slots=2), save=tmp_path / "saved") as server:
        body = {"prompt": PROMPTS[0], "decoder": "jacobi"}
        table = engine.model.transformer.embedding
        kept = table.clone()
        table.fill_(float("nan"))
        answer = post(server, body)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "numerical_error"
        assert "NaN" in answer.json()["error"]["message"]
        assert '"code": "numerical_error"' in post(server, {**body, "stream": True}).text
        table.copy_(kept)
        (tmp_path / "saved").rmdir()
        answer = post(server, body)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        (tmp_path / "saved").mkdir()
        assert post(server, body).status_code == 200 and len(list((tmp_path / "saved").iterdir())) == 1
