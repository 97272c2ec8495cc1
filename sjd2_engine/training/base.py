"""Trains the base AR model: `python -m sjd2_engine.training.base --data runs/data --out runs/base --minutes 45`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import load_model
from ..models.scenes import FIRST_WORD
from ..models.scenes_vq import CODES
from ..scenes.world import WORDS
from ..transformer import Transformer, TransformerConfig
from .dataset import POSITIONS, Batch, TokenData, load_vq
from .export import save_scenes
from .loop import Trainer

SCENES = TransformerConfig(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=640,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=512,
)


def scenes_model(seed: int) -> Transformer:
    """The bundled model's decoder with fresh weights."""
    model = Transformer(SCENES, FIRST_WORD + len(WORDS), CODES)
    model.initialise(seed)
    return model


def start_from(folder: Path) -> Transformer:
    """The decoder of a model folder, ready to be trained further."""
    model = load_model(str(folder), torch.device("cpu"), torch.float32)
    return model.transformer.train().requires_grad_(True)


def half_precision() -> torch.autocast:
    """Matrix products in bfloat16, weights and losses in float32."""
    return torch.autocast("cpu", torch.bfloat16)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside the sequence, q, k, v [B, T, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def image_loss(logits: Tensor, image: Tensor) -> Tensor:
    """Cross-entropy of the free positions; logits [B, 272, V], image int64 [B, 272]. Forced tokens are never drawn."""
    target = image.masked_fill(image >= CODES, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def clean_logits(model: Transformer, batch: Batch) -> Tensor:
    """Teacher-forced logits [B, 272, V] of every image position."""
    ids = torch.cat([batch.prompt, batch.image[:, :-1]], 1)
    hidden = model(model.embedding[ids], torch.arange(ids.shape[1]), causal)
    return model.head(hidden[:, -POSITIONS:])


@torch.no_grad()
def validation_loss(model: Transformer, data: TokenData) -> float:
    """Mean cross-entropy over the pictures kept apart, nats per free token."""
    batches = data.validation()
    total = sum(float(image_loss(clean_logits(model, batch), batch.image)) * len(batch.image) for batch in batches)
    return total / sum(len(batch.image) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--vq", type=Path, default=Path("runs/vq/vq.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="the model is written to OUT/model")
    parser.add_argument("--init", type=Path, help="model folder to go on from, instead of fresh weights")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    data = TokenData(args.data)
    model = scenes_model(args.seed) if args.init is None else start_from(args.init)
    forward = cast(Transformer, torch.compile(model, dynamic=True))

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = data.sample(args.batch, generator)
        with half_precision():
            logits = clean_logits(forward, batch)
        loss = image_loss(logits, batch.image)
        return loss, {"loss": float(loss.detach())}

    trainer = Trainer(model, args.out, args.minutes, args.rate, weight_decay=0.05, seed=args.seed)
    trainer.run(loss_of, lambda: {"validation_loss": validation_loss(model, data)})
    save_scenes(model, load_vq(args.vq), args.out / "model")


if __name__ == "__main__":
    main()
