"""Writes trained weights as a model folder: `python -m sjd2_engine.training.export --run runs/base --vq … --out …`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.llama import save_llama
from ..scenes.world import WORDS
from .base import scenes_model
from .dataset import load_vq

STORED = torch.float16  # 11 bits of mantissa: the loss does not notice, and two models fit into the package


def export(run: Path, vq: Path, out: Path, noise: dict[str, Any] | None) -> None:
    """config.json, model.safetensors (Llama format), vq.safetensors, and sjd2.json for noise-trained weights."""
    model = scenes_model(seed=0)
    model.load_state_dict(torch.load(run / "state.pt", weights_only=True)["model"])
    save_llama(model, out, {"sjd2_family": "scenes", "words": list(WORDS)}, STORED)
    picture_tokenizer = load_vq(vq).state_dict()
    save_file(
        {name: tensor.to(STORED).contiguous() for name, tensor in picture_tokenizer.items()},
        out / "vq.safetensors",
    )
    if noise is not None:
        (out / "sjd2.json").write_text(json.dumps(noise, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--vq", type=Path, default=Path("runs/vq/vq.safetensors"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    noise = args.run / "sjd2.json"
    export(args.run, args.vq, args.out, json.loads(noise.read_text()) if noise.exists() else None)


if __name__ == "__main__":
    main()
