"""What comes out of a decode: pictures, figures, and events on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from .errors import NumericalError
from .graphs import CaptureReport


@dataclass(frozen=True)
class Picture:
    """A finished picture, or the error that ended it.

    tokens: int64 [n] on the CPU. accepted_per_step: how many steps accepted n tokens. latency_s: from the moment its
    slot began with it until it was here, other pictures' work in between included.
    """

    image: Image.Image | None
    tokens: Tensor
    forward_passes: int
    accepted_per_step: dict[int, int]
    latency_s: float
    failure: NumericalError | None = None


@dataclass(frozen=True)
class DecodeStats:
    """Figures of one `generate` call.

    forward_passes: per image. tokens: per image, forced ones included. step_compression: tokens / mean forward
    passes. accepted_per_step: how many steps of all images accepted n tokens. latency_s: wall-clock of the call,
    text to pixels. peak_memory_bytes: device memory allocated at most, on the CPU the process's peak. window: the
    width, with window="auto" the one used most; windows: passes of the batch by width. batch: images decoded at
    the same time. graphs: CUDA graphs captured in this call, with seconds and bytes.
    """

    decoder: str
    window: int
    forward_passes: list[int]
    tokens: int
    accepted_per_step: dict[int, int]
    latency_s: float
    peak_memory_bytes: int
    windows: dict[int, int] = field(default_factory=dict)
    batch: int = 1
    graphs: CaptureReport = field(default_factory=lambda: CaptureReport(0, 0.0, 0))

    @property
    def step_compression(self) -> float:
        return self.tokens * len(self.forward_passes) / max(1, sum(self.forward_passes))


@dataclass(frozen=True)
class Result:
    """Images in the order of the prompts (None where decoding failed), int64 [B, n] tokens, figures, failures."""

    images: list[Image.Image | None]
    tokens: Tensor
    stats: DecodeStats
    failures: list[NumericalError] = field(default_factory=list)


@dataclass(frozen=True)
class StepEvent:
    """One forward pass of the slots: `rows` are indices of the prompts in them, `accepted` tokens each won in this
    step, `tokens` the newly accepted local ids of each row, `lengths` tokens so far, `previews` a picture per row, or
    None where there is none yet; `finished` holds the pictures that became ready since the event before, by index of
    the prompt."""

    step: int
    rows: list[int]
    accepted: list[int]
    tokens: list[list[int]]
    lengths: list[int]
    previews: list[Image.Image | None] | None = None
    finished: dict[int, Picture] = field(default_factory=dict)
