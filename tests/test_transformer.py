"""The decoder core and its cache: equal to transformers' Llama, to themselves after rollback, and to training."""

from __future__ import annotations

import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.engine import Decode
from sjd2_engine.models import find_model
from sjd2_engine.schedule import embedding_statistics, noise_times, timestep_encodings
from sjd2_engine.training.base import causal
from sjd2_engine.training.dataset import Batch
from sjd2_engine.training.noise import noisy_batch, noisy_logits, saw_tooth
from sjd2_engine.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=64,
    rms_norm_eps=1e-6,
    rope_theta=500.0,
    max_position_embeddings=64,
)
CPU = torch.device("cpu")


def tiny(seed: int = 0) -> Transformer:
    model = Transformer(TINY, vocabulary=30, image_vocabulary=20)
    model.initialise(seed)
    return model.requires_grad_(False)


def whole(model: Transformer, embeds: torch.Tensor) -> torch.Tensor:
    """Hidden states of full sequences by plain causal attention with repeated key heads."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) / q.shape[-1] ** 0.5
        ahead = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(group, 2))

    return model(embeds, torch.arange(embeds.shape[1]), attend)


@pytest.mark.parametrize("name", ["scenes", "scenes-sjd2"])
def test_logits_equal_transformers_llama_on_the_bundled_weights(name: str) -> None:
    llama = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(
        find_model(name), dtype=torch.float32, attn_implementation="eager"
    )
    transformer = Engine.from_pretrained(name, device="cpu").model.transformer
    ids = torch.randint(transformer.embedding.shape[0], (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = llama(ids).logits[..., : transformer.head.out_features]
        ours = transformer.head(transformer(transformer.embedding[ids], torch.arange(300), causal))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_windows_with_rollback_equal_the_whole_sequence() -> None:
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(3, 40, 48, generator=generator)
    expected = whole(model, embeds)
    cache = StaticCache(TINY, rows=3, capacity=48, levels=0, device=CPU, dtype=torch.float32)
    lengths = torch.zeros(3, dtype=torch.int32)
    while int(lengths.min()) < 32:
        junk = torch.randn(3, 6, 48, generator=generator)
        good = torch.randint(1, 7, (3,), generator=generator)
        window = torch.stack([
            torch.cat([embeds[row, length : length + keep], junk[row, keep:]])
            for row, (length, keep) in enumerate(zip(lengths.tolist(), good.tolist(), strict=True))
        ])  # fmt: skip
        hidden = cache.forward(model, window)
        for row, (length, keep) in enumerate(zip(lengths.tolist(), good.tolist(), strict=True)):
            torch.testing.assert_close(hidden[row, :keep], expected[row, length : length + keep], atol=1e-5, rtol=1e-4)
        lengths = (lengths + good.int()).clamp(max=34)
        cache.lengths.copy_(lengths)


def test_cache_after_decoding_equals_a_fresh_prefill(base: Engine) -> None:
    prompts = ["a red circle left of a blue square", "two green stars on a plain grey background"]
    config = base.config_for("coupled", window=7, seed=3)
    decode = Decode(base.model, config, prompts, [3, 4])
    with torch.inference_mode():
        for _ in range(25):
            decode.step()
    table = decode.transformer.embedding
    assert decode.window.lengths[0] != decode.window.lengths[1]
    for row, text in enumerate([*prompts, "", ""]):
        length = int(decode.cache.lengths[row])
        prompt = base.model.encode_prompt(text)
        accepted = decode.window.tokens[row % 2, : length - len(prompt) + 1].tolist()
        assert length == len(prompt) - 1 + int(decode.window.lengths[row % 2])
        fresh = StaticCache(decode.transformer.config, 1, 400, 0, CPU, torch.float32)
        with torch.inference_mode():
            fresh.forward(decode.transformer, table[torch.tensor([prompt + accepted])[:, :length]])
        torch.testing.assert_close(decode.cache.keys[:, row, :length], fresh.keys[:, 0, :length], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            decode.cache.values[:, row, :length], fresh.values[:, 0, :length], atol=2e-4, rtol=1e-3
        )


def test_timestep_keys_in_the_cache_equal_timestep_tokens_in_the_sequence(tuned: Engine) -> None:
    """A noisy window over the cache gives the logits of the training pass, which has the tokens in line."""
    model = tuned.model.transformer
    generator = torch.Generator().manual_seed(2)
    image = model_image(generator)
    times = noise_times(4, 0.75)
    levels = saw_tooth(4, 4, generator)[1:]
    batch = Batch(torch.tensor(tuned.model.encode_prompt("a ring")).expand(3, -1), image)
    with torch.inference_mode():
        noisy = noisy_batch(model, batch, levels, times, generator)
        expected = noisy_logits(model, noisy.embeds, noisy.positions, noisy.mask)
        cache = StaticCache(model.config, 3, 400, 4, CPU, torch.float32)
        mean, std = embedding_statistics(model.embedding, model.head.out_features)
        cache.write_timesteps(model, timestep_encodings(times, mean, std))
        inner = levels[:, :-1].masked_fill(image[:, :-1] >= model.head.out_features, -1)
        given = torch.cat([torch.full((3, batch.prompt.shape[1]), -1), inner], 1).int()
        hidden = cache.forward(model, noisy.embeds[:, 4:], given)
        ours = model.head(hidden[:, -272:])
    assert (inner >= 0).any() and (ours - expected).abs().max() < 1e-4


def test_the_clean_path_is_the_same_with_and_without_timestep_keys(tuned: Engine) -> None:
    model = tuned.model.transformer
    embeds = model.embedding[model_image(torch.Generator().manual_seed(5))[:, :50]]
    with torch.inference_mode():
        plain = StaticCache(model.config, 3, 60, 0, CPU, torch.float32)
        timed = StaticCache(model.config, 3, 60, 4, CPU, torch.float32)
        mean, std = embedding_statistics(model.embedding, model.head.out_features)
        timed.write_timesteps(model, timestep_encodings(noise_times(4, 0.75), mean, std))
        clean = torch.full((3, 50), -1, dtype=torch.int32)
        expected = plain.forward(model, embeds)
        torch.testing.assert_close(timed.forward(model, embeds, clean), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(timed.forward(model, embeds, clean + 2), expected, atol=1e-3)


def model_image(generator: torch.Generator) -> torch.Tensor:
    """Random image tokens int64 [3, 272] with their end-of-line tokens."""
    codes = torch.randint(256, (3, 16, 16), generator=generator)
    return torch.nn.functional.pad(codes, (0, 1), value=256).flatten(1)
