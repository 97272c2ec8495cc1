"""The bundled model: word prompts, 16 x 16 image tokens with an end-of-line token per row, 128 x 128 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from ..transformer import Transformer, TransformerConfig
from .family import ImageModel, LoadOptions, ModelFacts, NoiseTraining, read_noise, tuned_defaults
from .llama import llama_sources, transformer_config
from .scenes_vq import CODES, GRID, SceneVQ
from .weights import Checkpoint, load_transformer, read_json, read_tensors
from .words import WordTokenizer

# Rows of the embedding: image codes, then these, then the words.
END_OF_LINE = CODES
BEGIN = CODES + 1
BEGIN_IMAGE = CODES + 2
FIRST_WORD = CODES + 3
MAX_WORDS = 24
SIZE = (128, 128)
FASTEST_LEVELS = 2

DEFAULTS: Mapping[str, Any] = {
    "decoder": "jacobi",
    "guidance_scale": 1.5,
    "temperature": 0.9,
    "repeat_distance": 2 * (GRID + 1),  # grounds repeat every other row of tokens
    # The fastest windows on two CPU cores, not those with the fewest passes (docs/performance.md).
    "jacobi": {"window": 16},
    "sjd": {"window": 16},
    "coupled": {"window": 16},
    "sjd2": {"window": 32, "warmup": "noise"},
}


class ScenesModel(ImageModel):
    """`scenes` and `scenes-sjd2`; prompts are made of the words listed in config.json."""

    def __init__(
        self, name: str, transformer: Transformer, vq: SceneVQ, words: list[str], noise: NoiseTraining | None
    ) -> None:
        parameters = sum(tensor.numel() for tensor in vq.state_dict().values())
        super().__init__(name, transformer, _facts(transformer.config, len(words), parameters, noise))
        self.vq = vq
        self.tokenizer = WordTokenizer(words, FIRST_WORD, MAX_WORDS)
        self.load_encoder = lambda: vq.encode

    @property
    def codebook(self) -> Tensor:
        return self.vq.codebook

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


def _facts(sizes: TransformerConfig, words: int, pixel_parameters: int, noise: NoiseTraining | None) -> ModelFacts:
    layout = TokenLayout.raster(GRID, GRID, image_vocab=CODES)
    defaults = dict(tuned_defaults(DEFAULTS, noise))
    if noise is not None:
        # Small pictures want few levels; the times t_min and 1 belong to every count of them.
        defaults["sjd2"] = {**defaults["sjd2"], "denoise_levels": min(noise.levels, FASTEST_LEVELS)}
    return ModelFacts(
        "scenes", sizes, FIRST_WORD + words, CODES, SIZE, layout, defaults, MAX_WORDS + 2, pixel_parameters, noise
    )


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """Sizes of a folder of the scenes family; CheckpointError names what does not fit."""
    path = folder / "config.json"
    config = read_json(path)
    words = config.get("words")
    if not isinstance(words, list) or config.get("vocab_size") != FIRST_WORD + len(words):
        raise CheckpointError(f"{path}: vocab_size and the list of words do not fit together")
    if options.size(SIZE) != SIZE:
        raise ConfigError(f"image_size={options.image_size}: scenes draws pictures of {SIZE[0]}x{SIZE[1]} pixels only")
    parameters = Checkpoint(folder / "vq.safetensors").size()
    return _facts(transformer_config(config, path), len(words), parameters, read_noise(folder))


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> ScenesModel:
    """Load a folder of the scenes family; CheckpointError names what is missing or damaged."""
    facts = describe(folder, options)
    vq = _load_vq(folder / "vq.safetensors", device)
    sizes, vocabulary = facts.transformer, facts.vocabulary
    sources = llama_sources(sizes, image_rows=torch.arange(CODES))
    checkpoint = Checkpoint(folder / "model.safetensors")
    core = options.core_device(device)
    transformer = load_transformer(checkpoint, sizes, vocabulary, CODES, sources, core, dtype)
    return ScenesModel(name, transformer, vq, read_json(folder / "config.json")["words"], facts.noise)
