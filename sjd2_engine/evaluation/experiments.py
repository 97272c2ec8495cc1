"""SJD2 with parts taken away, to see what they are worth. No option of the engine leads here.

    denoise_only      every block of positions is denoised level by level and taken as it is: no test, no Jacobi steps
    denoise_and_test  SJD2 in `match` mode; with its own statistics it is the engine's decoder

In both, `normalised=False` adds the noise to raw embeddings instead of normalised ones. Tokens are drawn with the noise
of their positions, as `match` does, so that only the drafts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sjd2_kernels.ops  # noqa: F401  (registers torch.ops.sjd2)
from sjd2_kernels import reference, rng

from ..config import DecodeConfig
from ..drafts import Drafts
from ..engine import Engine
from ..schedule import CLEAN, embedding_statistics, noise_times, refine_ratios
from ..slots import Slots, prompt_inputs


@dataclass(frozen=True)
class Decoded:
    """Image tokens i64 [B, n] and forward passes per picture."""

    tokens: Tensor
    forward_passes: list[int]


class _Setup:
    """Prompts in a cache, the model's answers to windows behind them, and the space of the noise."""

    def __init__(
        self, engine: Engine, config: DecodeConfig, prompts: Sequence[str], seeds: Sequence[int], normalised: bool
    ) -> None:
        self.model, self.config, self.batch = engine.model, config, len(prompts)
        inputs = [prompt_inputs(engine.model, config, text) for text in prompts]
        # Room for a second window: a block that is taken unseen is read again beside the next one.
        room = max(part.length for part in inputs) + config.width
        slots = Slots(engine.model, config, self.batch, room, engine.attention)
        for slot, (part, seed) in enumerate(zip(inputs, seeds, strict=True)):
            slots.start(slot, part, seed)
        self.cache = slots.cache
        self.embedding = engine.model.transformer.embedding
        self.starts = [torch.stack([part.embeds[i][-1] for part in inputs]) for i in range(len(inputs[0].embeds))]
        self.seeds = torch.tensor(list(seeds), device=self.embedding.device)
        self.forced = torch.tensor(engine.model.layout.forced, device=self.seeds.device)
        mean, std = embedding_statistics(self.embedding, engine.model.transformer.image_vocabulary)
        self.mean, self.std = (mean, std) if normalised else (torch.zeros_like(mean), torch.ones_like(std))
        self.ratios = refine_ratios(noise_times(config.denoise_levels, config.t_min).to(self.seeds.device))

    def full(self, value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """A tensor [B, …] of this value."""
        return torch.full((self.batch, *shape), value, dtype=dtype, device=self.seeds.device)

    def logits(self, tokens: Tensor, levels: Tensor, noisy: Tensor) -> Tensor:
        """Logits [B, T, V], or [2, B, T, V] with guidance, of a window: i64, i32 [B, T], f32 [B, T-1, D]."""
        rows = [
            torch.ops.sjd2.embed_window(tokens, levels, self.embedding, start, noisy, self.mean, self.std)
            for start in self.starts
        ]
        hidden = self.cache.forward(self.model.transformer, torch.cat(rows), torch.cat([levels] * len(rows)))
        logits = self.model.transformer.head(hidden)
        return logits.view(len(rows), self.batch, *logits.shape[1:]) if len(rows) > 1 else logits

    def sample(self, logits: Tensor, lengths: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `sample_window` gives: tokens of the positions lengths[b] + slot, drawn with their own noise."""
        config, (begin, end) = self.config, self.model.layout.legal or (0, logits.shape[-1])
        return torch.ops.sjd2.sample_window(
            logits, self.seeds, lengths, steps, None, config.guidance_scale, config.temperature, config.top_k,
            config.top_p, begin, end, True, False,
        )  # fmt: skip


@torch.inference_mode()
def denoise_only(
    engine: Engine, config: DecodeConfig, prompts: Sequence[str], seeds: Sequence[int], normalised: bool = True
) -> Decoded:
    """Blocks of window - 1 positions, `denoise_levels` passes each, then taken as they are."""
    setup = _Setup(engine, config, prompts, seeds, normalised)
    block, total = config.width - 1, len(engine.model.layout)
    table = (setup.embedding.float() - setup.mean) / setup.std
    entries = setup.full(-1, total + 1, dtype=torch.int64)  # the prompt's last entry, then the picture's tokens
    cached, passes = 0, 0  # entries whose clean keys and values are in the cache
    for first in range(0, total, block):
        behind = entries[:, cached : first + 1]
        structure = setup.forced[first : first + block].expand(setup.batch, -1)
        positions = torch.arange(first, first + structure.shape[1], device=setup.seeds.device)
        noisy = rng.normals(setup.seeds, positions.expand(setup.batch, -1), 0, table.shape[1])
        tokens, unread = structure, behind.shape[1]
        for level in reversed(range(config.denoise_levels)):
            levels = torch.where(structure >= 0, CLEAN, level).int()
            given = torch.cat((behind, structure), 1)
            noise = torch.nn.functional.pad(levels, (unread, 0), value=CLEAN)
            logits = setup.logits(given, noise, torch.nn.functional.pad(noisy, (0, 0, unread - 1, 0)))
            drawn = setup.sample(logits, setup.full(cached), setup.full(passes))[0][:, unread - 1 : -1]
            tokens = torch.where(structure >= 0, structure, drawn)
            noisy = setup.ratios[level] * noisy + (1 - setup.ratios[level]) * table[tokens]
            passes += 1
        entries[:, first + 1 : first + 1 + block] = tokens
        setup.cache.lengths += unread
        cached = first + 1
    return Decoded(engine.model.layout.image_tokens(entries[:, 1:]), [passes] * setup.batch)


@torch.inference_mode()
def denoise_and_test(
    engine: Engine, config: DecodeConfig, prompts: Sequence[str], seeds: Sequence[int], normalised: bool = True
) -> Decoded:
    """SJD2 with verification="match" and warmup="noise", in a space of noise of one's choice."""
    setup = _Setup(engine, config, prompts, seeds, normalised)
    width, total, fresh = config.width, len(engine.model.layout), config.denoise_levels - 1
    forced = torch.cat((setup.forced, setup.forced.new_zeros(width)))  # what is beyond the picture counts as forced
    drafts = Drafts.allocate(setup.batch, width, 0, setup.embedding.shape[1], setup.seeds.device)
    initial = forced.clamp(min=0).repeat(setup.batch, 1)
    assert drafts.noisy is not None
    drafts.tokens.copy_(initial[:, : width - 1])
    drafts.levels.copy_(torch.where(forced[: width - 1] < 0, fresh, CLEAN).expand(setup.batch, -1))
    slots = torch.arange(width - 1, device=setup.seeds.device)
    drafts.noisy.copy_(rng.normals(setup.seeds, slots.expand(setup.batch, -1), 0, setup.embedding.shape[1]))
    tokens = setup.full(-1, total + width, dtype=torch.int64)
    lengths, steps, done, failed, failed_step = (setup.full(value) for value in (0, 0, 0, -1, -1))
    ops = torch.ops.sjd2
    while not bool(done.all()):
        last = tokens.gather(1, (lengths[:, None] - 1).clamp(min=0).long()).masked_fill(lengths[:, None] == 0, -1)
        given = torch.cat((last, drafts.tokens.masked_fill(drafts.levels >= 0, -1)), 1)
        levels = torch.cat((drafts.clean[:, :1], drafts.levels), 1)
        drawn, p, bad = setup.sample(setup.logits(given, levels, drafts.noisy), lengths, steps)
        decided, accepted, settled, fault = ops.verify(
            drawn, p, bad, drafts.tokens, drafts.q, drafts.status, drafts.levels, forced, lengths, steps, done,
            setup.seeds, total, reference.MATCH,
        )  # fmt: skip
        ops.commit(
            decided, accepted, fault, tokens, lengths, steps, done, failed, failed_step, drafts.histogram,
            setup.cache.lengths, total,
        )  # fmt: skip
        ops.refine(
            decided, p, accepted, settled, lengths, forced, initial, drafts.tokens, drafts.status, drafts.levels,
            drafts.q, drafts.noisy, setup.embedding, setup.mean, setup.std, setup.ratios, None, None, setup.seeds,
            fresh,
        )  # fmt: skip
    return Decoded(engine.model.layout.image_tokens(tokens[:, :total]), steps.tolist())
