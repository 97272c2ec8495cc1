"""Slots as the engine fills them, for tests that look inside."""

from __future__ import annotations

from collections.abc import Sequence

from sjd2_engine import DecodeConfig
from sjd2_engine.models import ImageModel
from sjd2_engine.slots import Slots, prompt_inputs


def started(
    model: ImageModel, config: DecodeConfig, prompts: Sequence[str], seeds: Sequence[int], attention: str = "auto"
) -> Slots:
    """One slot per prompt, each with a picture begun."""
    inputs = [prompt_inputs(model, config, text) for text in prompts]
    slots = Slots(model, config, len(inputs), max(given.length for given in inputs), attention)
    for slot, (given, seed) in enumerate(zip(inputs, seeds, strict=True)):
        slots.start(slot, given, seed)
    return slots
