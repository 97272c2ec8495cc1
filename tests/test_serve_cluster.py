"""`sjd2 serve` on Ray: the same app behind Ray Serve's proxy."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="pip install 'sjd2-engine[serve]'")
pytest.importorskip("ray.serve", reason="pip install 'sjd2-engine[cluster]'")

from pydantic import ValidationError
from serving import PATIENCE_S, picture, same, until

from sjd2_engine import Engine
from sjd2_engine.serve.cluster import KEY, Deployment, build

PROMPTS = ["a red circle", "a blue ring", "three green stars", "a large red ring"]
HEADERS = {"Authorization": "Bearer secret"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Two replicas on a cluster of this host."""
    import ray
    from ray import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))  # for the replicas
        patch.setenv(KEY, "secret")
        ray.init(
            "local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20,
            log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(Deployment(replicas=2, cpus=0.5)), name="sjd2", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, headers=HEADERS, timeout=PATIENCE_S)


@pytest.mark.slow  # a Ray cluster and two engines have to start
def test_replicas_answer_as_one_server_does(url: str, tuned: Engine) -> None:
    assert httpx.get(f"{url}/health", timeout=PATIENCE_S).json()["status"] == "ready"
    assert httpx.get(f"{url}/v1/models").status_code == 401
    wrong = post(url, prompt=PROMPTS[0], n=0)
    assert wrong.status_code == 400 and "greater" in wrong.json()["error"]["message"]

    wanted = tuned.generate([PROMPTS[i % 4] for i in range(12)], decoder="jacobi", seed=list(range(12))).images
    with ThreadPoolExecutor(12) as clients:
        asked = [clients.submit(post, url, prompt=PROMPTS[i % 4], seed=i, decoder="jacobi") for i in range(12)]
    for answer, image in zip((future.result() for future in asked), wanted):
        assert answer.status_code == 200 and same(picture(answer.json()["data"][0]["b64_json"]), image)
    stream = post(url, prompt=PROMPTS[0], seed=0, decoder="jacobi", stream=True, partial_images=2)
    kinds = [line.removeprefix("event: ") for line in stream.text.splitlines() if line.startswith("event: ")]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]

    # Ray passes on that a client has left.
    body = {"prompt": PROMPTS[0], "n": 4, "decoder": "ar", "stream": True, "partial_images": 3}
    path = f"{url}/v1/images/generations"
    with httpx.stream("POST", path, json=body, headers=HEADERS, timeout=PATIENCE_S) as leaving:
        assert next(leaving.iter_lines()) == "event: image_generation.partial_image"
    until(lambda: float(httpx.get(f"{url}/metrics").text.split("\nsjd2_images_cancelled_total ")[1].split()[0]))


def test_a_deployment_takes_no_unknown_options() -> None:
    with pytest.raises(ValidationError, match="replica"):
        Deployment.model_validate({"replica": 2})
    with pytest.raises(ValidationError, match="replicas"):
        Deployment.model_validate({"replicas": 0})
    # By this Ray knows what to make of `serve run … replicas=2`; a postponed annotation would leave a dict.
    assert inspect.signature(build).parameters["options"].annotation is Deployment
