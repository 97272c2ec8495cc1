"""The ComfyUI nodes, loaded and run as ComfyUI does: by path, from their declared inputs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sjd2_engine
from sjd2_engine import Engine
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, PromptError

FOLDER = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
PROMPT = "a red circle"
pytestmark = pytest.mark.skipif(
    not (Path(sjd2_engine.__file__).parent / "weights" / "scenes-sjd2").is_dir(),
    reason="the bundled weights are not in this tree",
)


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    # ComfyUI names the module by its path, which is no identifier.
    spec = importlib.util.spec_from_file_location(f"{FOLDER}_x_", FOLDER / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    return module.NODE_CLASS_MAPPINGS


def run(node: Any, **given: Any) -> Any:
    """What ComfyUI's executor does: defaults of the declared inputs, an instance, the named function, one output."""
    inputs = {}
    for name, (kind, *rest) in node.INPUT_TYPES()["required"].items():
        settings = rest[0] if rest else {}
        if name in given:
            inputs[name] = given[name]
        else:
            inputs[name] = settings["default"] if isinstance(kind, str) else kind[0]
        if isinstance(kind, list):
            assert inputs[name] in kind
        for bound, wrong in (("min", lambda a, b: a < b), ("max", lambda a, b: a > b)):
            assert bound not in settings or not wrong(inputs[name], settings[bound])
    assert set(given) <= set(inputs)
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return outputs[0]


def test_the_declared_interface(nodes: dict[str, Any]) -> None:
    loader, sampler = nodes["SJD2Loader"], nodes["SJD2Sampler"]
    for node in (loader, sampler):
        assert node.CATEGORY == "sjd2" and callable(getattr(node, node.FUNCTION))
        for kind, *settings in node.INPUT_TYPES()["required"].values():
            assert isinstance(kind, (str, list)) and all(isinstance(entry, dict) for entry in settings)
    assert sampler.RETURN_TYPES == ("IMAGE",)
    assert sampler.INPUT_TYPES()["required"]["engine"][0] == loader.RETURN_TYPES[0]
    assert set(DECODERS) < set(sampler.INPUT_TYPES()["required"]["decoder"][0])


def test_load_and_sample(nodes: dict[str, Any]) -> None:
    engine = run(nodes["SJD2Loader"], device="cpu")
    images = run(nodes["SJD2Sampler"], engine=engine, prompt=PROMPT, seed=5, decoder="jacobi", batch_size=2)
    assert images.dtype == torch.float32 and images.shape == (2, 128, 128, 3)
    own = engine.generate([PROMPT] * 2, "jacobi", seed=5).images
    for image, picture in zip(images, own):
        assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(np.array(picture)))


def test_options_reach_the_decoder(nodes: dict[str, Any], tuned: Engine) -> None:
    given = {"engine": tuned, "prompt": PROMPT, "decoder": "jacobi"}
    plain = run(nodes["SJD2Sampler"], **given)
    assert torch.equal(plain, run(nodes["SJD2Sampler"], **given, window=8)), "jacobi draws the same at every width"
    options = {"guidance": 4.0, "negative_prompt": "a blue ring"}
    other = run(nodes["SJD2Sampler"], **given, **options)
    own = tuned.generate(PROMPT, "jacobi", guidance_scale=4.0, negative_prompt="a blue ring").images[0]
    assert torch.equal((other[0] * 255).round().to(torch.uint8), torch.from_numpy(np.array(own)))
    assert not torch.equal(other, plain)


def test_errors_are_those_of_the_engine(nodes: dict[str, Any], tuned: Engine) -> None:
    with pytest.raises(PromptError, match="elephant"):
        run(nodes["SJD2Sampler"], engine=tuned, prompt="a red elephant")
    with pytest.raises(CheckpointError, match="no-such"):
        run(nodes["SJD2Loader"], model="no-such")


class Interrupted(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """ComfyUI's two modules as far as the nodes use them; ComfyUI itself cannot be installed by pip."""
    seen = SimpleNamespace(updates=[], checks=0, stop_at=None)

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            assert total == self.total
            seen.updates.append((value, total, preview))

    def check() -> None:
        seen.checks += 1
        if seen.checks == seen.stop_at:
            raise Interrupted

    utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    vars(utils)["ProgressBar"] = ProgressBar
    vars(management)["throw_exception_if_processing_interrupted"] = check
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    return seen


def test_progress_and_previews(nodes: dict[str, Any], tuned: Engine, comfy: SimpleNamespace) -> None:
    images: Tensor = run(nodes["SJD2Sampler"], engine=tuned, prompt=PROMPT, decoder="jacobi", batch_size=2)
    values = [value for value, _, _ in comfy.updates]
    total = 2 * len(tuned.model.layout)
    assert values == sorted(values) and values[-1] == total == comfy.updates[-1][1]
    assert len(values) > 10 and len(images) == 2
    for kind, picture, side in [preview for _, _, preview in comfy.updates if preview]:
        assert kind == "JPEG" and picture.size == (128, 128) and side > 0


def test_an_interruption_stops_the_decode(nodes: dict[str, Any], tuned: Engine, comfy: SimpleNamespace) -> None:
    comfy.stop_at = 5
    with pytest.raises(Interrupted):
        run(nodes["SJD2Sampler"], engine=tuned, prompt=PROMPT, decoder="jacobi")
    assert len(comfy.updates) == 4
    comfy.stop_at = None
    assert len(run(nodes["SJD2Sampler"], engine=tuned, prompt=PROMPT, decoder="jacobi")) == 1, "the engine goes on"
