"""A few steps of noise training on every family's tiny checkpoint, then sjd2 on the weights that it left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
import tiny_chameleon
import tiny_emu3
import tiny_janus
import tiny_llamagen

from sjd2_engine import Engine
from sjd2_engine.models import ImageModel, load_model
from sjd2_engine.models.family import LoadOptions, NoiseTraining
from sjd2_engine.schedule import CLEAN, embedding_statistics, noise_times, timestep_encodings
from sjd2_engine.training.noise import attention_mask

CPU = torch.device("cpu")
LEVELS, T_MIN, STEPS, PICTURES = 3, 0.5, 12, 4
TEXTS = {"chameleon": "a red fox", "emu3": "a red fox", "janus": "a red fox", "llamagen": "3"}


def write(kind: str, folder: Path) -> Path:
    if kind == "chameleon":
        return tiny_chameleon.write_hf(folder, tiny_chameleon.hf_model(), decoder_inside=True)
    if kind == "emu3":
        return tiny_emu3.write_hf(folder, tiny_emu3.hf_model(hf_names=True), old_names=False)
    if kind == "janus":
        return tiny_janus.write_hf(folder, tiny_janus.hf_model(pro=True, kv_heads=2))
    return tiny_llamagen.write(folder, "c2i")


def train(model: ImageModel, text: str) -> list[float]:
    """Next-clean-token prediction on random pictures (arXiv 2510.08994): the loss of every step."""
    core = model.transformer.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    layout, times = model.layout, noise_times(LEVELS, T_MIN)
    free = torch.randint(core.image_vocabulary, (PICTURES, layout.image_count), generator=generator)
    tokens = layout.all_tokens(free)
    forced = torch.tensor(layout.forced[:-1]) >= 0
    # One staircase per picture, each beginning elsewhere.
    place = torch.arange(tokens.shape[1] - 1) - torch.arange(PICTURES)[:, None]
    levels = (place // 2).masked_fill((place < 0) | (place >= 2 * LEVELS) | forced, CLEAN)
    optimiser = torch.optim.AdamW(core.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        mean, std = embedding_statistics(core.embedding.detach(), core.image_vocabulary)
        clean = core.embedding[tokens[:, :-1]]
        t = times[levels.clamp(min=0)].masked_fill(levels == CLEAN, 0.0).unsqueeze(-1)
        noisy = clean + t * (std * torch.randn(clean.shape, generator=generator) + mean - clean)
        prompt = model.prompt_embeds(text).detach()
        first = model.position_offset(len(prompt))
        steps = timestep_encodings(times, mean, std)
        embeds = torch.cat([*(part.expand(PICTURES, -1, -1) for part in (steps, prompt)), noisy], 1)
        tail = torch.arange(embeds.shape[1] - LEVELS) + first
        positions = torch.cat([torch.zeros(LEVELS, dtype=torch.int64), tail])
        mask = attention_mask(levels, len(prompt), LEVELS)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

        logits = core.head(core(embeds, positions, attend)[:, -tokens.shape[1] :])
        target = tokens.masked_fill(torch.tensor(layout.forced) >= 0, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    core.eval().requires_grad_(False)
    return losses


@pytest.mark.parametrize("kind", TEXTS)
def test_sjd2_after_noise_training(kind: str, tmp_path: Path) -> None:
    size = (24, 48) if kind == "emu3" else None
    model = load_model(str(write(kind, tmp_path / kind)), CPU, torch.float32, LoadOptions(size))
    losses = train(model, TEXTS[kind])
    assert losses[-1] < losses[0]
    model.noise = NoiseTraining(LEVELS, T_MIN)
    engine = Engine(model)
    options = {"denoise_levels": LEVELS, "t_min": T_MIN, "window": 6, "seed": 5}
    result = engine.generate(TEXTS[kind], decoder="sjd2", **options)
    assert torch.equal(result.tokens, engine.generate(TEXTS[kind], decoder="ar", seed=5).tokens)
    assert max(result.stats.forward_passes) < len(model.layout)
    other = engine.generate(TEXTS[kind], decoder="sjd2", verification="ratio", **options)
    assert other.images[0] is not None
