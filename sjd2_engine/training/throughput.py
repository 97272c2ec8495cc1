"""How fast a run is: tokens per second and device, and the share of the device's arithmetic that it uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..models import ImageModel, ModelFacts
from ..transformer import Transformer
from .objective import Losses
from .options import Options

# Dense bfloat16 products per second in 1e12, by a part of the name that CUDA gives; the first that fits.
PEAKS = (
    ("GB200", 2500.0), ("B200", 2250.0), ("B100", 1750.0), ("H200", 989.0), ("GH200", 989.0), ("H100 PCIe", 756.0),
    ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0), ("A6000", 155.0), ("5090", 210.0), ("4090", 165.0),
    ("3090", 71.0),
)  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Products and sums per second that a device can do at most, in bfloat16; None where it is not known."""
    return next((1e12 * peak for part, peak in PEAKS if part in name), None)


def step_flops(facts: ModelFacts, levels: int) -> float:
    """Products and sums of training on one picture: three times its forward pass, recomputation not counted."""
    core = Transformer.outline(facts.transformer, facts.vocabulary, facts.image_vocabulary)
    sizes, length = facts.transformer, facts.prompt_length + len(facts.layout) - 1 + levels
    matrices = sum(weight.numel() for weight in core.blocks.parameters() if weight.dim() == 2)
    head = sum(weight.numel() for weight in core.head.parameters())
    pairs = length * (length + 1) / 2
    attention = 2 * sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim * pairs
    return 3 * 2 * (matrices * length + head * facts.layout.image_count + attention)


class Meter:
    """Collects losses on the device and reads them when a line of the log is due."""

    def __init__(self, model: ImageModel, options: Options, accelerator: Any) -> None:
        self.accelerator, self.times = accelerator, options.noise.times()
        device = accelerator.device
        self._kinds = torch.zeros(2, len(self.times) + 1, device=device)
        self._passes, self._begin, self.seconds = 0, time.monotonic(), 0.0
        self._pictures = options.micro_batch
        self._positions = len(model.layout)
        self._flops = step_flops(model.facts, len(self.times))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name)

    def add(self, losses: Losses) -> None:
        """Count a forward pass."""
        self._kinds += torch.stack([losses.sums, losses.counts])
        self._passes += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in which nothing is trained."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin

    def read(self, step: int, rate: float, levels: int) -> dict[str, float]:
        """Means since the last reading: loss, loss by the level of the input, speed; all processes call it."""
        sums, counts = self.accelerator.reduce(self._kinds, "sum").tolist()
        self._kinds = torch.zeros_like(self._kinds)
        seconds = time.monotonic() - self._begin
        self._begin += seconds
        self.seconds += seconds
        pictures = self._passes * self._pictures / max(seconds, 1e-9)
        self._passes = 0
        found = {"step": step, "rate": rate, "loss": sum(sums) / max(1.0, sum(counts))}
        names = ["clean", *(f"t={float(t):.3f}" for t in self.times[:levels])]
        found |= {f"loss/{name}": total / count for name, total, count in zip(names, sums, counts) if count}
        found |= {"seconds": self.seconds, "tokens_per_second_per_device": pictures * self._positions}
        if self._peak:
            found["mfu"] = pictures * self._flops / self._peak
        return found
