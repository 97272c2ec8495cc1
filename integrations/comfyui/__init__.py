"""ComfyUI nodes: load a model with sjd2_engine, draw pictures with any of its decoders."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sjd2_engine import Engine
from sjd2_engine.config import DECODERS, MAX_SEED
from sjd2_engine.engine import DTYPES

DEFAULT = "default"  # stands for "what the model brings along" in lists of choices
PREVIEW_SIDE = 512  # pixels


class SJD2Loader:
    """A model, loaded once and kept by ComfyUI for as long as its inputs stay the same."""

    CATEGORY = "sjd2"
    DESCRIPTION = "Loads an autoregressive text-to-image model."
    RETURN_TYPES = ("SJD2_ENGINE",)
    RETURN_NAMES = ("engine",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "A bundled model (scenes, scenes-sjd2), a folder with a checkpoint, or a hub id."
        return {
            "required": {
                "model": ("STRING", {"default": "scenes-sjd2", "tooltip": tip}),
                "device": (["auto", "cuda", "cpu"],),
                "dtype": (["auto", *DTYPES],),
            }
        }

    def load(self, model: str, device: str, dtype: str) -> tuple[Engine]:
        return (Engine.from_pretrained(model.strip(), device=device, dtype=dtype),)


class SJD2Sampler:
    """Prompt to pictures; picture i of a batch has seed + i."""

    CATEGORY = "sjd2"
    DESCRIPTION = "Draws pictures with ar, jacobi, sjd, coupled or sjd2 decoding."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = "0: what the model brings along."
        seed = {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}
        return {
            "required": {
                "engine": ("SJD2_ENGINE",),
                "prompt": ("STRING", {"default": "a red circle left of a blue square", "multiline": True}),
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "seed": ("INT", seed),
                "decoder": ([DEFAULT, *DECODERS],),
                "window": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": f"Slots per forward pass. {own}"}),
                "guidance": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 30.0, "step": 0.1, "tooltip": f"1: no guidance. {own}"},
                ),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def sample(
        self,
        engine: Engine,
        prompt: str,
        negative_prompt: str,
        seed: int,
        decoder: str,
        window: int,
        guidance: float,
        batch_size: int,
    ) -> tuple[Tensor]:
        """IMAGE float32 [B, H, W, 3] in 0 … 1. Raises what `Engine.stream` raises, and a picture's NumericalError."""
        options: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            # The seeds wrap around as those of `sjd2 generate`.
            "seed": [(seed + i) % (MAX_SEED + 1) for i in range(batch_size)],
            "window": window or None,
            "guidance_scale": guidance or None,
        }
        name = None if decoder == DEFAULT else decoder
        found: dict[int, Tensor] = {}
        with closing(_events(engine, [prompt] * batch_size, name, options)) as events:
            for index, picture in events:
                if picture.failure is not None:
                    raise picture.failure
                found[index] = torch.from_numpy(np.asarray(picture.image.convert("RGB"), dtype=np.float32) / 255.0)
        return (torch.stack([found[index] for index in range(batch_size)]),)


def _events(engine: Engine, prompts: list[str], decoder: str | None, options: dict[str, Any]) -> Generator[Any]:
    """Index and picture as they are finished; in between ComfyUI is told how far it is, and may interrupt."""
    total, accepted = len(prompts) * len(engine.model.layout), 0
    utils, management = _comfy("utils"), _comfy("model_management")
    bar = utils.ProgressBar(total) if utils else None
    stream: Any = engine.stream(prompts, decoder, preview_every="auto" if bar else 0, **options)
    with closing(stream):
        for event in stream:
            if management:
                management.throw_exception_if_processing_interrupted()
            accepted += sum(event.accepted)
            if bar:
                shown = next((picture for picture in event.previews or [] if picture), None)
                bar.update_absolute(accepted, total, ("JPEG", shown, PREVIEW_SIDE) if shown else None)
            yield from event.finished.items()


def _comfy(module: str) -> Any:
    """A module of ComfyUI; None outside of it, where the nodes run all the same."""
    try:
        return importlib.import_module(f"comfy.{module}")
    except ImportError:
        return None


NODE_CLASS_MAPPINGS = {"SJD2Loader": SJD2Loader, "SJD2Sampler": SJD2Sampler}
NODE_DISPLAY_NAME_MAPPINGS = {"SJD2Loader": "SJD2 Load Model", "SJD2Sampler": "SJD2 Sampler"}
