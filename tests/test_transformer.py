"""The decoder core and its cache: equal to transformers' Llama, to themselves after rollback, and to training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from drawing import started

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.models import find_model
from sjd2_engine.models.llama import llama_sources
from sjd2_engine.models.weights import Rows
from sjd2_engine.schedule import CLEAN, embedding_statistics, noise_times, timestep_encodings
from sjd2_engine.training.base import causal
from sjd2_engine.training.batches import Batch
from sjd2_engine.training.noise import saw_tooth
from sjd2_engine.training.objective import Objective
from sjd2_engine.training.options import NoiseRecipe
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


def whole(model: Transformer, embeds: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Hidden states of full sequences, from position `first` on, by plain causal attention with repeated key heads."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) / q.shape[-1] ** 0.5
        ahead = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(group, 2))

    return model(embeds, first + torch.arange(embeds.shape[1]), attend)


@pytest.mark.parametrize("name", ["scenes", "scenes-sjd2"])
def test_logits_equal_transformers_llama_on_the_bundled_weights(name: str) -> None:
    llama = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(
        find_model(name), dtype=torch.float32, attn_implementation="eager"
    )
    transformer = Engine.from_pretrained(name, device="cpu").model.transformer
    ids = torch.randint(transformer.embedding.shape[0], (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = llama(ids).logits[..., : transformer.image_vocabulary]
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


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_biases_and_query_norms_equal_transformers_qwen(kind: str) -> None:
    """Qwen 2 has biases on queries, keys and values; Qwen 3 normalises each head's queries and keys."""
    transformers = pytest.importorskip("transformers")
    sizes = {name: getattr(TINY, name) for name in vars(TINY) if hasattr(transformers.LlamaConfig(), name)}
    rope = {"rope_type": "default", "rope_theta": TINY.rope_theta}
    hf_config = getattr(transformers, kind + "Config")(**sizes, vocab_size=30, rope_parameters=rope)
    torch.manual_seed(3)
    oracle = getattr(transformers, kind + "ForCausalLM")(hf_config).eval().requires_grad_(False)
    for parameter in oracle.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    config = replace(TINY, **({"qkv_bias": True} if kind == "Qwen2" else {"qk_norm": "rms"}))
    stored, model = oracle.state_dict(), Transformer(config, 30, 30).requires_grad_(False)
    for name, parts in llama_sources(config).items():
        rows = torch.cat([stored.pop(part.name) for part in parts if isinstance(part, Rows)])
        model.get_parameter(name).copy_(rows)
    for i, block in enumerate(model.blocks):
        if kind == "Qwen3":
            norms = [stored.pop(f"model.layers.{i}.self_attn.{part}_norm.weight") for part in "qk"]
            block.get_parameter("qk_weight").copy_(torch.stack([norms[0]] * 4 + [norms[1]] * 2))
    assert not stored
    ids = torch.randint(30, (2, 25), generator=torch.Generator().manual_seed(4))
    expected = oracle(ids).logits
    ours = model.head(whole(model, model.embedding[ids]))
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_two_layer_head() -> None:
    model = Transformer(replace(TINY, head_hidden=32), vocabulary=30, image_vocabulary=20)
    weights = dict(model.head.named_parameters())
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    inner = hidden @ weights["0.weight"].T + weights["0.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = inner @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(model.head(hidden), expected, atol=1e-5, rtol=1e-5)


def test_prompts_that_end_at_a_fixed_position() -> None:
    """With a table that is not invariant to shifts, rows count positions from their own offsets."""
    model = tiny()
    for block in model.blocks:
        block.get_parameter("qkv.weight").mul_(20.0)  # so that attention, and with it the rotation, counts
    generator = torch.Generator().manual_seed(1)
    angle = 3 * torch.rand(64, 6, generator=generator)
    model.set_rope(torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1))
    embeds = torch.randn(3, 20, 48, generator=generator)
    cache = StaticCache(TINY, 3, 32, 0, CPU, torch.float32, offsets=[0, 7, 30])
    cache.forward(model, embeds[:, :11])
    cache.lengths.fill_(9)  # two are rolled back
    hidden = cache.forward(model, embeds[:, 9:])
    for row, offset in enumerate((0, 7, 30)):
        expected = whole(model, embeds[row : row + 1], offset)[0, 9:]
        torch.testing.assert_close(hidden[row], expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(hidden[row], whole(model, embeds[row : row + 1], offset + 1)[0, 9:], atol=1e-2)


def test_an_outline_takes_no_memory_and_knows_its_shapes() -> None:
    outline, model = Transformer.outline(TINY, 30, 20), tiny()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in outline.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in outline.parameters())
    outline.allocate(CPU, torch.bfloat16)
    assert {p.dtype for p in outline.parameters()} == {torch.bfloat16} and outline.cos.dtype == torch.float32
    assert torch.equal(outline.cos, model.cos) and torch.equal(outline.sin, model.sin)


def test_cache_after_decoding_equals_a_fresh_prefill(base: Engine) -> None:
    prompts = ["a red circle left of a blue square", "two green stars on a plain grey background"]
    config = base.config_for("coupled", window=7, seed=3)
    decode = started(base.model, config, prompts, [3, 4])
    with torch.inference_mode():
        for _ in range(25):
            decode.step()
    table = base.model.transformer.embedding
    assert decode.window.lengths[0] != decode.window.lengths[1]
    for row, text in enumerate([*prompts, "", ""]):
        length = int(decode.cache.lengths[row])
        prompt = base.model.encode_prompt(text)
        accepted = decode.window.tokens[row % 2, : length - len(prompt) + 1].tolist()
        assert length == len(prompt) - 1 + int(decode.window.lengths[row % 2])
        fresh = StaticCache(base.model.transformer.config, 1, 400, 0, CPU, torch.float32)
        with torch.inference_mode():
            fresh.forward(base.model.transformer, table[torch.tensor([prompt + accepted])[:, :length]])
        torch.testing.assert_close(decode.cache.keys[:, row, :length], fresh.keys[:, 0, :length], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            decode.cache.values[:, row, :length], fresh.values[:, 0, :length], atol=2e-4, rtol=1e-3
        )


def test_timestep_keys_in_the_cache_equal_timestep_tokens_in_the_sequence(tuned: Engine) -> None:
    """A noisy window over the cache gives the logits of the training pass, which has the tokens in line."""
    model = tuned.model.transformer
    generator = torch.Generator().manual_seed(2)
    image = model_image(generator)
    recipe = NoiseRecipe(levels=(4,), t_min=0.75)
    times = recipe.times()
    levels = torch.stack([saw_tooth(len(tuned.model.layout) - 1, 4, recipe, generator) for _ in range(3)])
    levels = levels.masked_fill(image[:, :-1] >= model.image_vocabulary, CLEAN)
    seeds = torch.tensor([5, 6, 7])
    with torch.inference_mode():
        expected = Objective(tuned.model, times).eval()(Batch(image, levels, seeds, ["a ring"] * 3, [False] * 3))
        cache = StaticCache(model.config, 3, 400, 4, CPU, torch.float32)
        mean, std = embedding_statistics(model.embedding, model.image_vocabulary)
        cache.write_timesteps(model, timestep_encodings(times, mean, std))
        places = torch.arange(levels.shape[1]).expand(3, -1)
        clean = model.embedding[image[:, :-1]]
        noisy = torch.ops.sjd2.perturb(clean, levels.int(), places, seeds, mean, std, times, 0, True)
        prompt = tuned.model.prompt_embeds("a ring").expand(3, -1, -1)
        given = torch.cat([torch.full(prompt.shape[:2], CLEAN), levels], 1).int()
        hidden = cache.forward(model, torch.cat([prompt, noisy], 1), given)
        logits = model.head(hidden[:, prompt.shape[1] - 1 :])
    free = torch.tensor([local < 0 for local in tuned.model.layout.forced])
    losses = F.cross_entropy(logits[:, free].transpose(1, 2), image[:, free], reduction="none")
    of_level = F.pad(levels, (1, 0), value=CLEAN)[:, free] + 1
    sums = torch.zeros(5).index_add_(0, of_level.flatten(), losses.flatten())
    assert (of_level > 0).any()
    torch.testing.assert_close(sums, expected.sums, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(losses.mean(), expected.mean, atol=1e-5, rtol=1e-5)


def test_the_clean_path_is_the_same_with_and_without_timestep_keys(tuned: Engine) -> None:
    model = tuned.model.transformer
    embeds = model.embedding[model_image(torch.Generator().manual_seed(5))[:, :50]]
    with torch.inference_mode():
        plain = StaticCache(model.config, 3, 60, 0, CPU, torch.float32)
        timed = StaticCache(model.config, 3, 60, 4, CPU, torch.float32)
        mean, std = embedding_statistics(model.embedding, model.image_vocabulary)
        timed.write_timesteps(model, timestep_encodings(noise_times(4, 0.75), mean, std))
        clean = torch.full((3, 50), -1, dtype=torch.int32)
        expected = plain.forward(model, embeds)
        torch.testing.assert_close(timed.forward(model, embeds, clean), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(timed.forward(model, embeds, clean + 2), expected, atol=1e-3)


def model_image(generator: torch.Generator) -> torch.Tensor:
    """Random image tokens int64 [3, 272] with their end-of-line tokens."""
    codes = torch.randint(256, (3, 16, 16), generator=generator)
    return torch.nn.functional.pad(codes, (0, 1), value=256).flatten(1)
