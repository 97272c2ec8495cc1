"""`sjd2 serve` as a process: signals, crowds, memory, and a fuzz of its description."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'sjd2-engine[serve]'")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import PATIENCE_S, live, picture, process, same, until
from typer.testing import CliRunner

from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.serve.service import Limits

PROMPTS = ["a red circle", "a blue ring", "three green stars", "a large red ring"]
PATH = "/v1/images/generations"
CROWD = 200
# Making a case up may be slow and wasteful.
UNHURRIED = [HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.too_slow]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def described(url: str) -> dict[str, Any]:
    """Operations by path."""
    operations: list[Any] = list(schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations())
    return {operation.path: operation for operation in (result.ok() for result in operations)}


def fuzz(cases: st.SearchStrategy[Any], examples: int) -> set[int]:
    """Send made-up requests; every answer must be one that the description promises. Returns the statuses seen."""
    seen: set[int] = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=UNHURRIED)
    @given(case=cases)
    def ask(case: Any) -> None:
        answer = case.call(timeout=PATIENCE_S)
        case.validate_response(answer, checks=CHECKS)
        seen.add(answer.status_code)

    ask()
    return seen


def test_no_request_makes_the_server_fail(tuned: Engine) -> None:
    """Requests made up from the description, right and wrong ones."""
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    with live(tuned, Limits(slots=2)) as (_, url):
        operations = described(url)
        assert set(operations) == {"/health", "/metrics", "/v1/models", "/v1/models/{name}", PATH}
        for operation in operations.values():
            fuzz(operation.as_strategy(), 5)
        strange = st.one_of(*(operations[PATH].as_strategy(mode) for mode in modes))
        assert 400 in fuzz(strange, 40)


def test_no_options_make_the_server_fail(tuned: Engine) -> None:
    """The same with a prompt that the model reads, and options that mean something: now some are drawn."""
    right = {
        "prompt": st.sampled_from(PROMPTS), "model": st.none(), "n": st.just(1), "size": st.just("auto"),
        "decoder": st.sampled_from(["jacobi", "sjd", "coupled", "sjd2"]),
        "verification": st.sampled_from(["match", "ratio", "paper", None]),
        "coupling": st.sampled_from(["gumbel", "maximal", "none", None]),
        "window": st.sampled_from([8, 32, 64, None]), "denoise_levels": st.integers(1, 8),
        "negative_prompt": st.none(), "response_format": st.just("b64_json"), "stream": st.just(False),
    }  # fmt: skip

    def put_right(case: Any, body: dict[str, Any]) -> Any:
        case.body = {**case.body, **body, "partial_images": 0}
        return case

    with live(tuned, Limits(slots=2)) as (_, url):
        cases = st.builds(put_right, described(url)[PATH].as_strategy(), st.fixed_dictionaries(right))
        assert 200 in fuzz(cases, 15)


def test_sigterm_lets_running_requests_finish() -> None:
    with process("--model", "scenes", "--slots", "1", key="secret") as (running, url):
        headers = {"Authorization": "Bearer secret"}
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": PROMPTS[0], "decoder": "ar", "n": 2}
            answers.append(httpx.post(url + PATH, json=body, headers=headers, timeout=PATIENCE_S))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: httpx.get(f"{url}/health").json()["active"])
        running.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        late = httpx.post(url + PATH, json={"prompt": PROMPTS[1]}, headers=headers)
        assert late.status_code == 503 and late.json()["error"]["code"] == "stopping" and late.headers["retry-after"]
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 2
        assert running.wait(PATIENCE_S) == 0


def test_sigkill_loses_no_finished_picture(tmp_path: Path) -> None:
    options = ("--model", "scenes", "--slots", "2", "--save", str(tmp_path))
    with process(*options) as (running, url):

        async def ask_until_killed() -> list[str]:
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
                got: list[str] = []

                async def ask(seed: int) -> None:
                    body = {"prompt": PROMPTS[seed % 4], "decoder": "jacobi", "seed": seed}
                    try:
                        answer = await client.post(PATH, json=body)
                    except httpx.TransportError:
                        return
                    got.append(answer.json()["data"][0]["b64_json"])
                    if len(got) == 3:
                        running.send_signal(signal.SIGKILL)

                await asyncio.gather(*(ask(seed) for seed in range(8)))
                return got

        got = asyncio.run(ask_until_killed())
        assert running.wait(PATIENCE_S) == -signal.SIGKILL
    saved = {path.read_bytes() for path in tmp_path.glob("[!.]*.png")}
    assert len(got) >= 3 and {base64.b64decode(png) for png in got} <= saved
    for path in tmp_path.glob("[!.]*.png"):
        with Image.open(path) as image:
            image.load()


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = CliRunner().invoke(app, ["serve", "--port", str(port), "--model", "nowhere"], prog_name="sjd2")
    assert told.exit_code == 2 and f"cannot listen on 127.0.0.1:{port}" in told.output


@pytest.mark.parametrize(("command", "missing"), [("serve", "prometheus_client"), ("demo", "gradio")])
def test_an_extra_that_is_not_installed_is_named(command: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else found(name))
    told = CliRunner().invoke(app, [command], prog_name="sjd2")
    assert told.exit_code == 2 and f"{missing} not installed" in told.output
    assert f"pip install 'sjd2-engine[{command}]'" in told.output


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.slow  # two hundred pictures, drawn twice
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_hundred_at_once(tuned: Engine) -> None:
    """Nothing lost, nothing mixed up, and no more memory than after the first crowd."""
    asked = [{"prompt": PROMPTS[i % 4], "seed": i, "decoder": "jacobi"} for i in range(CROWD)]
    seeds = list(range(CROWD))
    wanted = tuned.generate([str(ask["prompt"]) for ask in asked], decoder="jacobi", seed=seeds, max_batch=8).images

    async def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
            return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

    with process("--slots", "8") as (running, url):
        asyncio.run(ask_all(url, asked[:40]))
        before = resident_bytes(running.pid)
        answers = asyncio.run(ask_all(url, asked))
        after = resident_bytes(running.pid)
    assert [answer.status_code for answer in answers] == [200] * CROWD
    for answer, image in zip(answers, wanted):
        assert same(picture(answer.json()["data"][0]["b64_json"]), image)
    print(f"resident memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
    # The answers on their way at the same time are some 25 KB each.
    assert after - before < 48 * 2**20
