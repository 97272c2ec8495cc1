"""Teaches weights to read noisy inputs, as SJD2 decoding needs (`sjd2 finetune`).

Next-clean-token prediction (SJD2, arXiv 2510.08994): the input embeddings of stretches of image tokens are noised,
level by level along raster order, and every position still predicts the clean next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.scenes import ScenesModel
from ..schedule import CLEAN, embedding_statistics, noise_times, timestep_encodings
from ..transformer import Transformer
from .base import half_precision, image_loss, validation_loss
from .dataset import POSITIONS, Batch, TokenData, write
from .export import save_scenes
from .loop import Trainer

SEGMENT = (2, 12)  # positions of one level, both ends included: about what a window accepts per step
CLEAN_RUN = (0, 60)  # clean positions between two staircases
CLEAN_SHARE = 0.33  # of the pictures, left without any noise
OTHER_COUNTS = 0.3  # of the batches, with another count of levels than the first


def saw_tooth(batch: int, levels: int, generator: torch.Generator) -> Tensor:
    """Levels int64 [B, 272]: clean runs, each followed by segments of level 0, 1, … K-1, then clean again."""

    def draw(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    rows = torch.full((batch, POSITIONS), CLEAN)
    for row in rows[round(CLEAN_SHARE * batch) :]:
        position = 0
        while position < POSITIONS:
            position += draw(CLEAN_RUN)
            for level in range(levels):
                length = draw(SEGMENT)
                row[position : position + length] = level
                position += length
    return rows


@dataclass
class NoisyBatch:
    """Input embeddings [B, K+T, D] with the K timestep tokens in front, positions [K+T], additive mask."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor


def attention_mask(levels: Tensor, prompt: int, steps: int) -> Tensor:
    """Additive mask [B, 1, K+T, K+T]: causal, each noisy token also sees its level's timestep token.

    levels int64 [B, 271] of the image inputs; a timestep token sees only itself, clean tokens see none.
    """
    batch, image = levels.shape
    length = prompt + image
    own = F.pad(levels, (prompt, 0), value=CLEAN)[:, :, None] == torch.arange(steps)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)
    top = F.pad(torch.eye(steps, dtype=torch.bool), (0, length)).expand(batch, -1, -1)
    seen = torch.cat([top, torch.cat([own, causal], 2)], 1)
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]


def noisy_batch(
    model: Transformer, batch: Batch, levels: Tensor, times: Tensor, generator: torch.Generator
) -> NoisyBatch:
    """Noise the image inputs in the normalised embedding space: e = (1 - t) norm(E[x]) + t noise, and back."""
    mean, std = embedding_statistics(model.embedding.detach(), model.image_vocabulary)
    clean = model.embedding[batch.image[:, :-1]]
    inner = levels[:, :-1].masked_fill(batch.image[:, :-1] >= model.image_vocabulary, CLEAN)
    t = times[inner.clamp(min=0)].masked_fill(inner == CLEAN, 0.0)[:, :, None]
    noise = torch.randn(clean.shape, generator=generator)
    # De-normalising (1 - t)(x - mean)/std + t noise gives x + t (std noise + mean - x): exactly x where t = 0.
    noisy = clean + t * (std * noise + mean - clean)
    prompt = model.embedding[batch.prompt]
    steps = timestep_encodings(times, mean, std).expand(len(clean), -1, -1)
    embeds = torch.cat([steps, prompt, noisy], 1)
    positions = torch.cat([torch.zeros(len(times), dtype=torch.int64), torch.arange(embeds.shape[1] - len(times))])
    return NoisyBatch(embeds, positions, attention_mask(inner, prompt.shape[1], len(times)))


def noisy_logits(model: Transformer, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, 272, V] of a noisy batch."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(v.dtype)).transpose(1, 2)

    return model.head(model(embeds, positions, attend)[:, -POSITIONS:])


def loss_by_level(logits: Tensor, image: Tensor, levels: Tensor, steps: int) -> dict[str, float]:
    """Mean cross-entropy by the level of the input token, "clean" for inputs without noise."""
    target = image.masked_fill(image >= logits.shape[-1], -100)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(image)
    given = F.pad(levels[:, :-1], (1, 0), value=CLEAN)
    found = {}
    for level in range(CLEAN, steps):
        chosen = (given == level) & (target >= 0)
        if chosen.any():
            found["clean" if level == CLEAN else f"level{level}"] = float(loss[chosen].mean())
    return found


@torch.no_grad()
def noisy_validation(model: Transformer, data: TokenData, times: Tensor) -> dict[str, float]:
    """Loss by level over the pictures kept apart, with fixed levels and noise."""
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[float]] = {}
    for batch in data.validation():
        levels = saw_tooth(len(batch.image), len(times), generator)
        noisy = noisy_batch(model, batch, levels, times, generator)
        logits = noisy_logits(model, noisy.embeds, noisy.positions, noisy.mask)
        for name, value in loss_by_level(logits, batch.image, levels, len(times)).items():
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(sums.items())}


def finetune(
    model: ScenesModel, data: Path, out: Path, minutes: float, levels: Sequence[int], t_min: float, **options: Any
) -> None:
    """Noise training of a model of the scenes family; writes the tuned model to `out`, its state to `out/run`.

    levels: counts of noise levels to train, the first one most and the default of decoding. Options: batch, rate,
    pictures (drawn and encoded where `data` is empty), seed, compiled (torch.compile: half the time per step).
    A killed run goes on where it stopped.
    """
    settings = {"batch": 32, "rate": 1e-3, "pictures": 120_000, "seed": 4, "compiled": True} | options
    if not (data / "tokens.safetensors").exists():
        write(model.vq, data, settings["pictures"], seed=2)
    tokens = TokenData(data)
    transformer = model.transformer.train().requires_grad_(True)
    forward = torch.compile(noisy_logits, dynamic=True) if settings["compiled"] else noisy_logits

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = tokens.sample(settings["batch"], generator)
        count = levels[0]
        if len(levels) > 1 and float(torch.rand((), generator=generator)) < OTHER_COUNTS:
            count = levels[int(torch.randint(1, len(levels), (), generator=generator))]
        rows = saw_tooth(settings["batch"], count, generator)
        noisy = noisy_batch(transformer, batch, rows, noise_times(count, t_min), generator)
        with half_precision():
            logits = forward(transformer, noisy.embeds, noisy.positions, noisy.mask)
        loss = image_loss(logits, batch.image)
        parts = loss_by_level(logits.detach(), batch.image, rows, count) if count == levels[0] else {}
        return loss, {"loss": float(loss.detach()), **parts}

    times = noise_times(levels[0], t_min)

    def report() -> dict[str, Any]:
        by_level = noisy_validation(transformer, tokens, times)
        return {"validation_loss": validation_loss(transformer, tokens), "validation_loss_by_level": by_level}

    trainer = Trainer(transformer, out / "run", minutes, settings["rate"], weight_decay=0.05, seed=settings["seed"])
    trainer.run(loss_of, report)
    schedule = {"levels": levels[0], "t_min": t_min, "times": [round(float(t), 6) for t in times]}
    save_scenes(transformer, model.vq, out, schedule)
