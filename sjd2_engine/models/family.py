"""What the engine needs to know about a model, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..layout import TokenLayout
from ..transformer import Transformer


@dataclass(frozen=True)
class NoiseTraining:
    """How weights were taught to read noisy inputs: decoding should use the same levels."""

    levels: int
    t_min: float


class ImageModel(ABC):
    """A loaded text-to-image model: text to ids, a transformer over them, image tokens to pixels."""

    family: ClassVar[str]

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        layout: TokenLayout,
        defaults: Mapping[str, Any],
        noise: NoiseTraining | None,
    ) -> None:
        self.name, self.transformer, self.layout = name, transformer, layout
        self.defaults, self.noise = defaults, noise

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """Rows of the transformer's embedding for a prompt; "" is the unconditional one. Raises PromptError."""

    @abstractmethod
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        """Pixels uint8 [B, height, width, 3] of image tokens int64 [B, n], forced tokens left out."""
