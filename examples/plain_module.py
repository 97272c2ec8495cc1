"""JacobiWindow driving a plain PyTorch module that keeps its own KV cache.

    python examples/plain_module.py

The module knows nothing of windows: it reads embeddings at each row's own place and overwrites what stood there. The
rollback is a matter of two numbers per row: where its cache ends is prompt_len - 1 + window.lengths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_kernels import rng

V, GRID, WINDOW = 64, 8, 16
LAYOUT = TokenLayout.raster(GRID, GRID, image_vocab=V)  # 8 rows of 8 image tokens and a forced end-of-line token
PROMPTS = [[70, 71, 72], [73, 74, 75, 76, 77]]
SEEDS = [1, 2]


class Model(nn.Module):
    """Two layers of attention over a static cache; rows of a batch may be at different lengths."""

    def __init__(
        self, vocabulary: int = 80, width: int = 64, heads: int = 4, layers: int = 2, depth: int = 128
    ) -> None:
        super().__init__()
        self.heads, self.depth = heads, depth
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(depth, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))
        self.head = nn.Linear(width, V)

    def new_cache(self, batch: int) -> Tensor:
        """Keys and values [layers, 2, B, S, D]."""
        width = self.embedding.embedding_dim
        return torch.zeros(len(self.qkv), 2, batch, self.depth, width)

    def forward(self, embeds: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, T, V] of embeds [B, T, D] behind the first `lengths[b]` entries of each row's cache."""
        batch, count, width = embeds.shape
        positions = lengths[:, None] + torch.arange(count)
        visible = torch.arange(self.depth) <= positions[:, None, :, None]  # causal, and nothing stale
        rows = torch.arange(batch)[:, None]
        x = embeds + self.places(positions)
        for layer, (project, mlp) in enumerate(zip(self.qkv, self.mlp, strict=True)):
            q, k, v = project(F.layer_norm(x, (width,))).chunk(3, -1)
            cache[layer, 0, rows, positions], cache[layer, 1, rows, positions] = k, v
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, *cache[layer]))
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
            x = x + mlp(F.layer_norm(x, (width,)))
        return self.head(F.layer_norm(x, (width,)))


def prefill(model: Model, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """A cache that holds each prompt without its last token, its lengths, and the embedding of that last token."""
    cache, lengths = model.new_cache(len(prompts)), torch.tensor([len(prompt) - 1 for prompt in prompts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(prompt[:-1]) for prompt in prompts], batch_first=True)
    model(model.embedding(padded), cache, torch.zeros_like(lengths))  # the padding is overwritten later on
    return cache, lengths, model.embedding(torch.tensor([prompt[-1] for prompt in prompts]))


def autoregressive(model: Model) -> Tensor:
    """One token per forward pass, drawn with the noise of its seed and position: int64 [B, N]."""
    cache, lengths, embeds = prefill(model, PROMPTS)
    seeds, drawn = torch.tensor(SEEDS), []
    for position, forced in enumerate(LAYOUT.forced):
        logits = model(embeds[:, None], cache, lengths + position)[:, 0]
        noise = rng.gumbel(seeds, torch.full((len(SEEDS), 1), position), 0, rng.SAMPLE, V)[:, 0]
        token = (logits + noise).argmax(-1) if forced < 0 else torch.full((len(SEEDS),), forced)
        drawn.append(token)
        embeds = model.embedding(token)
    return torch.stack(drawn, 1)


def windowed(model: Model) -> JacobiWindow:
    """The same by windows of drafts."""
    cache, prompt_lengths, start = prefill(model, PROMPTS)
    config = DecodeConfig(decoder="jacobi", window=WINDOW)
    window = JacobiWindow(config, LAYOUT, model.embedding.weight, start_embeds=start, seeds=SEEDS)
    while not window.done:
        inputs = window.inputs()
        assert inputs.embeds is not None
        window.step(model(inputs.embeds, cache, prompt_lengths + window.lengths))
    return window


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    expected, window = autoregressive(model), windowed(model)
    print(LAYOUT.image_tokens(window.tokens))
    if not torch.equal(window.tokens, expected):
        raise SystemExit("the tokens differ from those of the autoregressive loop")
    print(f"equal to the autoregressive loop, in {window.steps.tolist()} forward passes instead of {len(LAYOUT)}")


if __name__ == "__main__":
    main()
