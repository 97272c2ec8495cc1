"""Toy models whose law is known exactly: every logit is looked up by the whole prefix.

The model keeps a cache of what it was fed, as a real one does: the *symbol* of a cached input is fixed when
the input is fed, stays while `lengths` keeps its entry, and is never looked at again as a token. So a wrong
rollback, or the key/value of a noisy input that survives, changes the law and is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout


class PrefixModel:
    """Logits by (prompt, position, all symbols before it); noisy inputs have symbols of their own."""

    def __init__(
        self,
        layout: TokenLayout,
        vocab: int,
        prompts: int = 2,
        seed: int = 0,
        dim: int = 6,
        sharpness: float = 1.5,
    ) -> None:
        make = torch.Generator().manual_seed(seed)
        self.layout, self.vocab, self.total = layout, vocab, len(layout)
        self.rows = max(vocab, max(layout.forced) + 1)
        self.embedding = torch.randn(self.rows, dim, generator=make)
        self.starts = torch.randn(prompts, dim, generator=make)
        self.direction = torch.randn(dim, generator=make)
        self.symbols = 2 * self.rows  # the second half: noisy inputs
        prefixes = self.symbols ** (self.total - 1)
        self.table = sharpness * torch.randn(prompts, self.total, prefixes, vocab, generator=make)
        self.weights = self.symbols ** torch.arange(self.total)

    def unconditional(self, seed: int = 9, scale: float = 0.5) -> PrefixModel:
        """Another law over the same inputs, for guidance."""
        twin = copy.copy(self)
        make = torch.Generator().manual_seed(seed)
        twin.table = scale * torch.randn(self.table.shape, generator=make)
        return twin

    def begin(self, prompt: Tensor, width: int) -> None:
        """An empty cache for rows with these prompt numbers."""
        self.prompt = prompt
        self.cache = torch.full((len(prompt), self.total + width), -1)
        self.fed = torch.full((len(prompt), self.total + width, self.embedding.shape[1]), torch.nan)

    def symbols_of(self, embeds: Tensor, levels: Tensor) -> Tensor:
        """Clean inputs: the row they equal. Noisy inputs: something wild made of embedding and level."""
        distance = torch.cdist(
            embeds, self.embedding.expand(len(embeds), -1, -1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        nearest = distance.min(-1)
        assert bool((nearest.values[levels < 0] == 0).all()), "an input called clean is not a row of the table"
        wild = ((embeds @ self.direction) * 5.0 + 3 * levels).floor().long() % self.rows
        return torch.where(levels < 0, nearest.indices, self.rows + wild)

    def __call__(self, embeds: Tensor, positions: Tensor, levels: Tensor) -> Tensor:
        """Logits [B, W, V]; the input at position i predicts position i + 1."""
        first = positions[:, :1] < 0
        assert torch.equal(embeds[:, 0][first[:, 0]], self.starts[self.prompt][first[:, 0]])
        index = (positions + 1).clamp(min=0)  # entry 0 of the cache is the prompt's last token
        symbols = torch.zeros_like(positions)
        symbols[:, 1:] = self.symbols_of(embeds[:, 1:], levels[:, 1:])
        head = torch.where(first, self.embedding[:1], embeds[:, 0])
        symbols[:, :1] = self.symbols_of(head[:, None], levels[:, :1])
        self.cache = self.cache.scatter(1, index.clamp(max=self.cache.shape[1] - 1), symbols)
        spread = index.clamp(max=self.cache.shape[1] - 1)[..., None].expand_as(embeds)
        self.fed = self.fed.scatter(1, spread, embeds)
        codes = (self.cache[:, 1 : self.total] * self.weights[:-1]).cumsum(1)
        codes = torch.cat((torch.zeros_like(codes[:, :1]), codes), 1)  # codes[:, i]: the prefix of position i
        target = (positions + 1).clamp(max=self.total - 1)
        return self.table[self.prompt[:, None], target, codes.gather(1, target)]

    def joint(self, prompt: int, config: DecodeConfig, uncond: PrefixModel | None = None) -> Tensor:
        """Exact law of the image tokens of plain autoregressive decoding, f64 [V, V, …]."""
        law = torch.ones(1, dtype=torch.float64)
        codes = torch.zeros(1, dtype=torch.int64)
        for position, known in enumerate(self.layout.forced):
            if known >= 0:
                codes = codes + known * self.weights[position]
                continue
            logits = self.table[prompt, position, codes].double()
            if uncond is not None:
                other = uncond.table[prompt, position, codes].double()
                logits = other + config.guidance_scale * (logits - other)
            p = truncated_softmax(logits, config)
            law = (law[:, None] * p).flatten()
            codes = (codes[:, None] + torch.arange(self.vocab) * self.weights[position]).flatten()
        assert np.isclose(float(law.sum()), 1.0)
        return law


def truncated_softmax(logits: Tensor, config: DecodeConfig) -> Tensor:
    """Temperature, top-k and top-p in a form of its own: by comparing every token with every other."""
    if config.temperature == 0.0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    p = (logits / config.temperature).softmax(-1)
    if config.top_k:
        larger = (p[..., None, :] > p[..., :, None]).sum(-1)
        p = torch.where(larger < config.top_k, p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    if config.top_p < 1.0:
        before = torch.where(p[..., None, :] > p[..., :, None], p[..., None, :], 0.0).sum(-1)
        p = torch.where(before < config.top_p, p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def decode(
    model: PrefixModel,
    config: DecodeConfig,
    prompt: Tensor,
    seeds: Sequence[int] | Tensor,
    uncond: PrefixModel | None = None,
    check_cache: bool = True,
    window_class: type[JacobiWindow] = JacobiWindow,
) -> JacobiWindow:
    """Drive a window with the toy until it is done, checking the promises of the window at every step."""
    window = window_class(config, model.layout, model.embedding, model.starts[prompt], seeds=seeds)
    model.begin(prompt, window.width)
    if uncond is not None:
        uncond.begin(prompt, window.width)
    for _ in range(model.total * (config.denoise_levels + 2)):
        if window.done:
            break
        inputs = window.inputs()
        assert inputs.embeds is not None
        logits = model(inputs.embeds, inputs.positions, inputs.levels)
        if uncond is not None:
            logits = torch.stack((logits, uncond(inputs.embeds, inputs.positions, inputs.levels)))
        before = window.lengths.clone()
        accepted = window.step(logits).accepted
        assert torch.equal(window.lengths, before + accepted)
        assert bool(((accepted >= 1) & (accepted <= window.width) | (before == model.total)).all())
        if check_cache:
            assert_cache_clean(model, window)
    assert window.done, "the decode did not end"
    return window


def assert_cache_clean(model: PrefixModel, window: JacobiWindow) -> None:
    """Every cache entry that is kept was fed the clean embedding of the token accepted there."""
    entry = torch.arange(1, model.total)
    kept = entry < window.lengths[:, None]  # prompt_len − 1 + lengths entries: tokens 0 … lengths − 2
    wanted = model.embedding[window.tokens[:, :-1].clamp(min=0)]
    assert torch.equal(model.fed[:, 1 : model.total][kept], wanted[kept])


def law_distance(
    model: PrefixModel,
    config: DecodeConfig,
    samples: int = 204_800,
    uncond: PrefixModel | None = None,
    window_class: type[JacobiWindow] = JacobiWindow,
    first_seed: int = 0,
    batch: int = 12_800,
) -> float:
    """Total variation between decoded pictures and the exact law, in units of what a perfect sampler shows.

    Two prompts share every batch; the result is the mean over both. 1 is perfect, up to chance.
    """
    prompt = torch.arange(batch) % 2
    laws = [model.joint(number, config, uncond) for number in range(2)]
    counts = [torch.zeros(len(law)) for law in laws]
    for start in range(first_seed, first_seed + samples, batch):
        seeds = torch.arange(start, start + batch)
        window = decode(model, config, prompt, seeds, uncond, start == first_seed, window_class)
        image = model.layout.image_tokens(window.tokens)
        index = (image * model.vocab ** torch.arange(image.shape[1]).flip(0)).sum(1)
        for number, count in enumerate(counts):
            count += torch.bincount(index[prompt == number], minlength=len(count))
    measured = sum(float((c.double() / c.sum() - law).abs().sum() / 2) for c, law in zip(counts, laws))
    return measured / sum(perfect_variation(law, samples // 2) for law in laws)


def perfect_variation(law: Tensor, samples: int, seed: int = 0, repeats: int = 40) -> float:
    """The mean total variation that a perfect sampler with as many samples shows."""
    generator = np.random.default_rng(seed)
    probabilities = law.numpy() / law.numpy().sum()
    draws = generator.multinomial(samples, probabilities, size=repeats) / samples
    return float(np.abs(draws - probabilities).sum(1).mean() / 2)
