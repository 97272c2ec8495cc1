"""What the engine needs to know about a model, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from ..transformer import Transformer, TransformerConfig
from .weights import read_json


@dataclass(frozen=True)
class NoiseTraining:
    """How weights were taught to read noisy inputs: decoding should use the same levels."""

    levels: int
    t_min: float


def read_noise(folder: Path) -> NoiseTraining | None:
    """What fine-tuning for sjd2 left in a checkpoint folder; None for weights that never saw noise."""
    path = folder / "sjd2.json"
    if not path.exists():
        return None
    trained = read_json(path)
    try:
        return NoiseTraining(int(trained["levels"]), float(trained["t_min"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} needs the numbers 'levels' and 't_min' ({error!r})") from None


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say about loading.

    image_size     (height, width) in pixels, or one number for squares; None = the family's or checkpoint's
    allow_pickle   read tensors from pickled files where there are no safetensors
    core           False = leave the weights of the decoder out, for who only turns pictures and prompts into tokens
    """

    image_size: tuple[int, int] | int | None = None
    allow_pickle: bool = False
    core: bool = True

    def core_device(self, device: torch.device) -> torch.device:
        """Where the decoder's weights go; the meta device holds none."""
        return device if self.core else torch.device("meta")

    def size(self, default: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels; raises ConfigError for what is no size."""
        value = default if self.image_size is None else self.image_size
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
            raise ConfigError(f"image_size={value!r}: expected pixels, one number or (height, width)")
        return pair[0], pair[1]


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint folder says of a model before any weight is read.

    family             the name users see
    transformer        sizes of the core
    vocabulary         rows of its input table
    image_vocabulary   V, how many of them are image ids
    image_size         (height, width) in pixels
    layout             forced and free positions of a picture of that size
    defaults           options of DecodeConfig, and mappings of them by decoder name
    prompt_length      inputs of a prompt of usual length, for estimates of memory
    pixel_parameters   numbers in the picture tokenizer and other parts beside the core, held in float32
    noise              how the weights were tuned for sjd2; None = they were not
    """

    family: str
    transformer: TransformerConfig
    vocabulary: int
    image_vocabulary: int
    image_size: tuple[int, int]
    layout: TokenLayout
    defaults: Mapping[str, Any]
    prompt_length: int
    pixel_parameters: int
    noise: NoiseTraining | None = None


def tuned_defaults(defaults: Mapping[str, Any], noise: NoiseTraining | None) -> Mapping[str, Any]:
    """A family's default options, with the noise levels that the weights were trained on."""
    if noise is None:
        return defaults
    special = {**defaults.get("sjd2", {}), "denoise_levels": noise.levels, "t_min": noise.t_min}
    return {**defaults, "decoder": "sjd2", "sjd2": special}


class ImageModel(ABC):
    """A loaded text-to-image model: text to input embeddings, a transformer over them, image tokens to pixels.

    A family implements `encode_prompt` and `decode_pixels`, and overrides the others where it differs: the
    unconditional inputs come from the negative prompt, and positions count from the prompt's first token.
    """

    def __init__(self, name: str, transformer: Transformer, facts: ModelFacts) -> None:
        self.name, self.transformer, self.facts = name, transformer, facts
        self.family, self.layout = facts.family, facts.layout
        self.defaults, self.noise = facts.defaults, facts.noise

    prompt_kind = "text"  # or "class": what a prompt says
    vq: Any  # the decoding half of the picture tokenizer
    # Loads the encoding half: float32 [B, 3, height, width], -1 to 1 -> int64 [B, h, w]. Set by the family's `load`.
    load_encoder: Callable[[], Callable[[Tensor], Tensor]]

    @cached_property
    def _encoder(self) -> Callable[[Tensor], Tensor]:
        return self.load_encoder()

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image tokens int64 [B, n] of pixels uint8 [B, height, width, 3], on the picture tokenizer's device.

        What `decode_pixels` takes. The first call loads the encoder, which decoding never needs; CheckpointError if
        the checkpoint has none, ConfigError for pictures of another size.
        """
        height, width = self.facts.image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (height, width, 3):
            raise ConfigError(
                f"pixels are {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}: expected uint8 "
                f"[B, {height}, {width}, 3]"
            )
        values = pixels.to(self.codebook.device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        return self._encoder(values).flatten(1)

    @property
    def codebook(self) -> Tensor:
        """The picture tokenizer's entries [V, c]: what tells it from others."""
        return self.vq.quantize.embedding.weight

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt; rows of the input table unless `prompt_embeds` is overridden. Raises PromptError."""

    @abstractmethod
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        """Pixels uint8 [B, height, width, 3] of image tokens int64 [B, n], forced tokens left out."""

    def prompt_embeds(self, text: str) -> Tensor:
        """Everything that comes before the picture's first token: [P, D] in the input table's dtype, P >= 1."""
        return self.rows(self.encode_prompt(text))

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        """The same for the row that guidance leads away from: [P', D], P' >= 1. `text` is the positive prompt."""
        return self.prompt_embeds(negative_prompt)

    def position_offset(self, length: int) -> int:
        """Rotary position of a prompt's first entry, for a prompt of `length` entries."""
        return 0

    def rows(self, ids: list[int]) -> Tensor:
        """Rows [n, D] of the input table."""
        table = self.transformer.embedding
        return table[torch.tensor(ids, dtype=torch.int64, device=table.device)]
