"""JacobiWindow driving a model of transformers, as it is, with its own DynamicCache.

    python examples/transformers_model.py

The model is a small random Llama; any causal language model whose `forward` takes `inputs_embeds`, `position_ids`,
`attention_mask` and `past_key_values` is driven in the same way. transformers keeps one length for a whole batch,
while the rows of a window advance by themselves: so every row's entries end where the cache ends, and what is in front
of shorter rows is masked, as with prompts padded on the left.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_kernels import rng

V, GRID, WINDOW, FIRST_IMAGE_ID, END_OF_LINE = 64, 8, 16, 100, 99
LAYOUT = TokenLayout.raster(GRID, GRID, image_vocab=V)
# Local id -> the model's id: image tokens first, then structure tokens.
IDS = torch.tensor([*range(FIRST_IMAGE_ID, FIRST_IMAGE_ID + V), END_OF_LINE])
PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15]]
SEEDS = [1, 2]


def make_model() -> LlamaForCausalLM:
    """A random Llama, with a head sharp enough for its logits to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(8.0)
    return model


def keep_last(cache: DynamicCache, ends: Tensor, depth: int) -> None:
    """Make each row's entries up to `ends[b]` end at a common depth; what is cut off on the right was rejected."""
    index = (ends[:, None] - depth + torch.arange(depth)).clamp(min=0)[:, None, :, None]
    layers = cast(list[DynamicLayer], cache.layers)
    for layer in layers:
        assert layer.keys is not None and layer.values is not None
        place = index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, place), layer.values.gather(2, place)


def forward(model: LlamaForCausalLM, embeds: Tensor, cache: DynamicCache, kept: Tensor) -> Tensor:
    """Logits over image ids [B, T, V] of embeds [B, T, D] behind the last `kept[b]` entries of each row."""
    count, depth = embeds.shape[1], cache.get_seq_length()
    mask = torch.arange(depth + count) >= depth - kept[:, None]
    positions = kept[:, None] + torch.arange(count)
    out = model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, past_key_values=cache)
    return out.logits[..., IDS[:V]]


def prefill(model: LlamaForCausalLM) -> tuple[DynamicCache, Tensor]:
    """A cache of each prompt without its last token, shorter ones padded on the left; and how long they are."""
    cache, kept = DynamicCache(config=model.config), torch.tensor([len(prompt) - 1 for prompt in PROMPTS])
    longest = int(kept.max())
    ids = torch.tensor([[0] * (longest - len(prompt) + 1) + prompt[:-1] for prompt in PROMPTS])
    mask = torch.arange(longest) >= longest - kept[:, None]
    positions = (torch.arange(longest) - (longest - kept[:, None])).clamp(min=0)
    model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache)
    return cache, kept


def windowed(model: LlamaForCausalLM) -> JacobiWindow:
    cache, prompt_lengths = prefill(model)
    table = cast(Tensor, model.get_input_embeddings().weight)
    start = table[[prompt[-1] for prompt in PROMPTS]]
    config = DecodeConfig(decoder="jacobi", window=WINDOW)
    window = JacobiWindow(config, LAYOUT, table[IDS], start_embeds=start, seeds=SEEDS)
    while not window.done:
        inputs = window.inputs()
        assert inputs.embeds is not None
        depth = cache.get_seq_length()
        step = window.step(forward(model, inputs.embeds, cache, prompt_lengths + window.lengths))
        kept = prompt_lengths + window.lengths
        keep_last(cache, depth + step.accepted, int(kept.max()))  # the rollback
    return window


def autoregressive(model: LlamaForCausalLM, prompt: list[int], seed: int) -> list[int]:
    """One row, one token per forward pass, drawn with the noise of its seed and position: local ids."""
    cache, given, drawn = DynamicCache(config=model.config), torch.tensor([prompt]), []
    for position, forced in enumerate(LAYOUT.forced):
        logits = model(input_ids=given, past_key_values=cache).logits[0, -1, IDS[:V]]
        noise = rng.gumbel(torch.tensor([seed]), torch.tensor([[position]]), 0, rng.SAMPLE, V)[0, 0]
        drawn.append(int((logits + noise).argmax()) if forced < 0 else forced)
        given = IDS[drawn[-1]].view(1, 1)
    return drawn


@torch.no_grad()
def main() -> None:
    model = make_model()
    window = windowed(model)
    expected = torch.tensor([autoregressive(model, *row) for row in zip(PROMPTS, SEEDS, strict=True)])
    print(LAYOUT.image_tokens(window.tokens))
    if not torch.equal(window.tokens, expected):
        raise SystemExit("the tokens differ from those of the autoregressive loop")
    print(f"equal to the autoregressive loop, in {window.steps.tolist()} forward passes instead of {len(LAYOUT)}")


if __name__ == "__main__":
    main()
