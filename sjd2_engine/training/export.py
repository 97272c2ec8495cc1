"""Writes a model folder of the scenes family, as the engine and transformers' Llama class read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.llama import save_llama
from ..models.scenes_vq import SceneVQ
from ..scenes.world import WORDS
from ..transformer import Transformer

STORED = torch.float16  # 11 bits of mantissa: the loss does not notice, and two models fit into the package


def save_scenes(model: Transformer, vq: SceneVQ, out: Path, noise: dict[str, Any] | None = None) -> None:
    """config.json, model.safetensors (Llama format), vq.safetensors, and sjd2.json for noise-trained weights."""
    save_llama(model, out, {"sjd2_family": "scenes", "words": list(WORDS)}, STORED)
    tensors = {name: tensor.to(STORED).contiguous() for name, tensor in vq.state_dict().items()}
    save_file(tensors, out / "vq.safetensors")
    if noise is not None:
        (out / "sjd2.json").write_text(json.dumps(noise, indent=1) + "\n", encoding="utf-8")
