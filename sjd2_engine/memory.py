"""How much memory a decode takes, by formula, before anything is loaded, and how many pictures fit at a time."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch

from .cache import cache_bytes
from .config import DecodeConfig
from .decoders import make_plan
from .models import ModelFacts
from .transformer import Transformer
from .window import keeps_noise_table

FLOAT, INTEGER = 4, 8  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of a batch's decode: what stays from beginning to end, and the largest arrays of one pass."""

    weights: int
    cache: int
    window_state: int
    one_pass: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def parameters(facts: ModelFacts) -> int:
    """Numbers in the transformer, its input table and head included."""
    outline = Transformer.outline(facts.transformer, facts.vocabulary, facts.image_vocabulary)
    return sum(parameter.numel() for parameter in outline.parameters())


def weight_bytes(facts: ModelFacts, dtype: torch.dtype) -> int:
    """The transformer in `dtype`, and in float32 its rotary tables, the picture tokenizer and other parts."""
    rotary = 2 * facts.transformer.max_position_embeddings * facts.transformer.head_dim
    return parameters(facts) * dtype.itemsize + (rotary + facts.pixel_parameters) * FLOAT


def window_bytes(facts: ModelFacts, config: DecodeConfig, batch: int, device: str) -> int:
    """State of a JacobiWindow: tokens and counters, and what the decoder's plan asks for."""
    plan, width, vocabulary = make_plan(config), config.width, facts.image_vocabulary
    positions, dim = len(facts.layout) + width, facts.transformer.hidden_size
    size = 2 * batch * positions * INTEGER + batch * width * (3 * INTEGER + 3 * FLOAT)
    if plan.tracks_q:
        size += batch * (width - 1) * vocabulary * FLOAT
    if plan.noisy:
        size += batch * (width - 1) * dim * FLOAT
    if plan.nearest:
        size += vocabulary * dim * FLOAT
    drawn = (("sample_window", plan.per_position and vocabulary), ("refine", plan.noisy and dim))
    tables = [(op, batch * positions * count) for op, count in drawn]
    return size + FLOAT * sum(count for op, count in tables if keeps_noise_table(op, device, count))


def decode_memory(
    facts: ModelFacts, config: DecodeConfig, dtype: torch.dtype, batch: int = 1, device: str = "cuda"
) -> Memory:
    """Memory of decoding `batch` pictures at once, for prompts of the family's usual length."""
    rows = batch if config.guidance_scale == 1.0 else 2 * batch
    capacity = facts.prompt_length - 1 + len(facts.layout) + config.width
    levels = config.denoise_levels if config.uses_noise else 0
    # Logits as the model gives them, guided in float32, and as probabilities.
    logits = config.width * facts.image_vocabulary * (rows * dtype.itemsize + 2 * batch * FLOAT)
    return Memory(
        weight_bytes(facts, dtype),
        cache_bytes(facts.transformer, rows, capacity, levels, dtype),
        window_bytes(facts, config, batch, device),
        logits,
    )


def available_bytes(device: torch.device) -> int | None:
    """Memory that could still be taken on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def affordable_batch(
    facts: ModelFacts, config: DecodeConfig, dtype: torch.dtype, wanted: int, device: torch.device
) -> int:
    """How many of `wanted` pictures the estimate allows at a time, halving; at least one, which may still fail."""
    free = available_bytes(device)
    count = wanted
    while free is not None and count > 1:
        need = decode_memory(facts, config, dtype, count, device.type)
        if need.total - need.weights <= free:
            break
        count //= 2
    return count


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that an allocation failed: CUDA has a class for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
