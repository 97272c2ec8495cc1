"""The bundled model: word prompts, 16 x 16 image tokens with an end-of-line token per row, 128 x 128 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layout import TokenLayout
from ..transformer import Transformer
from .family import ImageModel, NoiseTraining
from .llama import load_llama, read_json, read_tensors, transformer_config
from .scenes_vq import CODES, GRID, SceneVQ
from .words import WordTokenizer

# Rows of the embedding: image codes, then these, then the words.
END_OF_LINE = CODES
BEGIN = CODES + 1
BEGIN_IMAGE = CODES + 2
FIRST_WORD = CODES + 3
MAX_WORDS = 24
FASTEST_LEVELS = 2

DEFAULTS: Mapping[str, Any] = {
    "decoder": "jacobi",
    "guidance_scale": 1.5,
    "temperature": 1.0,
    "repeat_distance": 2 * (GRID + 1),  # grounds repeat every other row of tokens
    # The fastest windows on two CPU cores, not those with the fewest passes (docs/performance.md).
    "jacobi": {"window": 16},
    "sjd": {"window": 16},
    "coupled": {"window": 16},
    "sjd2": {"window": 32, "warmup": "noise"},
}


class ScenesModel(ImageModel):
    """`scenes` and `scenes-sjd2`; prompts are made of the words listed in config.json."""

    family = "scenes"

    def __init__(
        self, name: str, transformer: Transformer, vq: SceneVQ, words: list[str], noise: NoiseTraining | None
    ) -> None:
        layout = TokenLayout.raster(GRID, GRID, image_vocab=CODES)
        defaults = dict(DEFAULTS)
        if noise is not None:
            # Small pictures want few levels; the times t_min and 1 belong to every count of them.
            levels = min(noise.levels, FASTEST_LEVELS)
            defaults["sjd2"] = {**DEFAULTS["sjd2"], "denoise_levels": levels, "t_min": noise.t_min}
            defaults["decoder"] = "sjd2"
        super().__init__(name, transformer, layout, defaults, noise)
        self.vq = vq
        self.tokenizer = WordTokenizer(words, FIRST_WORD, MAX_WORDS)

    def encode_prompt(self, text: str) -> list[int]:
        return [BEGIN, *self.tokenizer.encode(text), BEGIN_IMAGE]

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        pixels = self.vq.decode(tokens.to(self.vq.codebook.device))
        return pixels.add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def _load_vq(path: Path, device: torch.device) -> SceneVQ:
    vq = SceneVQ()
    stored = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    try:
        vq.load_state_dict(stored)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the picture tokenizer: {error}") from None
    # Pixels are decoded in float32 on every device: it is a sliver of the time and 16 bits show as banding.
    return vq.to(device).eval().requires_grad_(False)


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> ScenesModel:
    """Load a folder of the scenes family; CheckpointError names what is missing or damaged."""
    config = read_json(folder / "config.json")
    words = config.get("words")
    if not isinstance(words, list) or config.get("vocab_size") != FIRST_WORD + len(words):
        raise CheckpointError(f"{folder / 'config.json'}: vocab_size and the list of words do not fit together")
    sizes = transformer_config(config, folder / "config.json")
    noise = None
    if (folder / "sjd2.json").exists():
        trained = read_json(folder / "sjd2.json")
        noise = NoiseTraining(int(trained["levels"]), float(trained["t_min"]))
    vq = _load_vq(folder / "vq.safetensors", device)
    transformer = load_llama(folder / "model.safetensors", sizes, config["vocab_size"], CODES, device, dtype)
    return ScenesModel(name, transformer, vq, words, noise)
