"""The fused path against the plain one: the same hidden states, whatever the norms, heads, levels and backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_mode import DEVICE

import sjd2_kernels
from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.fused import can_fuse
from sjd2_engine.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=40,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=64,
)


def passes(config: TransformerConfig, fused: bool, levels: int, attention: str = "sdpa") -> list[torch.Tensor]:
    """Hidden states of a prefill and two windows, with rows of different progress in between."""
    model = Transformer(config, vocabulary=30, image_vocabulary=20).requires_grad_(False)
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.to(DEVICE)
    cache = StaticCache(config, 2, 40, levels, torch.device(DEVICE), torch.float32, attention=attention)
    cache.fused = False
    if levels:
        cache.write_timesteps(model, torch.randn(levels, 48, generator=generator).to(DEVICE))
    cache.fused = fused
    found = []
    for width, lengths in ((9, (7, 9)), (5, (10, 9)), (5, (10, 9))):
        embeds = torch.randn(2, width, 48, generator=generator).to(DEVICE)
        noisy = torch.randint(-1, levels, (2, width), generator=generator).int().to(DEVICE) if levels else None
        found.append(cache.forward(model, embeds, noisy))
        cache.lengths.copy_(torch.tensor(lengths))
    return found


@pytest.mark.parametrize(("backend", "attention"), [("reference", "sdpa"), ("triton", "triton"), ("triton", "sdpa")])
@pytest.mark.parametrize(("qk_norm", "levels"), [("none", 0), ("none", 3), ("rms", 0), ("layer", 2)])
def test_fused_passes_equal_plain_ones(backend: str, attention: str, qk_norm: str, levels: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    config = replace(TINY, qk_norm=qk_norm)
    expected = passes(config, fused=False, levels=levels)
    with sjd2_kernels.backend(backend):
        got = passes(config, fused=True, levels=levels, attention=attention)
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


def test_what_the_ops_do_not_cover_stays_on_the_plain_path() -> None:
    assert can_fuse(TINY) and not can_fuse(replace(TINY, post_norm=True))
    assert StaticCache(TINY, 1, 8, 0, torch.device("cpu"), torch.float32).fused is False


def test_the_bundled_model_draws_the_same_picture(tuned: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance, prompts of two lengths, noise levels: a whole decode on the fused path."""
    prompts = ["a red circle left of a blue square", "a ring"]
    expected = tuned.generate(prompts, decoder="sjd2", seed=3).tokens
    plain = StaticCache.__init__

    def fused(self: StaticCache, *args, **kwargs) -> None:
        plain(self, *args, **kwargs)
        self.fused = True

    monkeypatch.setattr(StaticCache, "__init__", fused)
    monkeypatch.setattr(tuned, "_idle", {})
    assert torch.equal(tuned.generate(prompts, decoder="sjd2", seed=3).tokens, expected)
