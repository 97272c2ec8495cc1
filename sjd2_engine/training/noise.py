"""Teaches base weights to read noisy inputs: `python -m sjd2_engine.training.noise --base runs/base --out runs/noise`.

Next-clean-token prediction (SJD2, arXiv 2510.08994): the input embeddings of stretches of image tokens are noised,
level by level along raster order, and every position still predicts the clean next token.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule import CLEAN, embedding_statistics, noise_times, timestep_encodings
from ..transformer import Transformer
from .base import half_precision, image_loss, scenes_model, validation_loss
from .dataset import POSITIONS, Batch, TokenData
from .loop import Trainer

SEGMENT = (2, 12)  # positions of one level, both ends included: about what a window accepts per step
CLEAN_RUN = (0, 60)  # clean positions between two staircases
CLEAN_SHARE = 0.25  # of the pictures, left without any noise


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
    mean, std = embedding_statistics(model.embedding.detach(), model.head.out_features)
    clean = model.embedding[batch.image[:, :-1]]
    inner = levels[:, :-1].masked_fill(batch.image[:, :-1] >= model.head.out_features, CLEAN)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--base", type=Path, default=Path("runs/base"))
    parser.add_argument("--out", type=Path, default=Path("runs/noise"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 3], help="level counts to train, the first most")
    parser.add_argument("--t-min", type=float, default=0.75)
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    data = TokenData(args.data)
    model = scenes_model(args.seed)
    model.load_state_dict(torch.load(args.base / "state.pt", weights_only=True)["model"])
    forward = torch.compile(noisy_logits, dynamic=True)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = data.sample(args.batch, generator)
        other = len(args.levels) > 1 and float(torch.rand((), generator=generator)) < 0.3
        count = (
            args.levels[1 + int(torch.randint(len(args.levels) - 1, (), generator=generator))]
            if other
            else args.levels[0]
        )
        levels = saw_tooth(args.batch, count, generator)
        noisy = noisy_batch(model, batch, levels, noise_times(count, args.t_min), generator)
        with half_precision():
            logits = forward(model, noisy.embeds, noisy.positions, noisy.mask)
        loss = image_loss(logits, batch.image)
        parts = loss_by_level(logits.detach(), batch.image, levels, count) if count == args.levels[0] else {}
        return loss, {"loss": float(loss.detach()), **parts}

    trainer = Trainer(model, args.out, args.minutes, args.rate, weight_decay=0.05, seed=args.seed)
    times = noise_times(args.levels[0], args.t_min)
    trainer.run(
        loss_of,
        lambda: {
            "validation_loss": validation_loss(model, data),
            "by_level": noisy_validation(model, data, times),
        },
    )
    (args.out / "sjd2.json").write_text(
        json.dumps({"levels": args.levels[0], "t_min": args.t_min, "times": [round(float(t), 6) for t in times]})
    )


if __name__ == "__main__":
    main()
