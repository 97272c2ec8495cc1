"""JacobiWindow: the state machine of every decoder. It owns the drafts; the caller owns the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sjd2_kernels.ops  # noqa: F401  (registers torch.ops.sjd2)
from sjd2_kernels import dispatch, rng

from .config import AUTO, DecodeConfig
from .decoders import make_plan
from .drafts import Drafts
from .errors import ConfigError
from .given import check_rows, checked_kv_lengths, checked_seeds, checked_start, image_vocab_of, seed_tensor
from .graphs import Lagged
from .layout import TokenLayout
from .schedule import CLEAN, embedding_statistics, noise_times, refine_ratios

# On the CPU position-keyed noise is drawn once for the whole picture while it stays this small, except for the C core:
# it draws as fast as it reads a table, and so a picture never depends on whether its batch was small enough for one.
NOISE_TABLE_LIMIT = 8 * 2**20


@dataclass(frozen=True)
class WindowInputs:
    """One forward pass: slot 0 is the last accepted token (or the prompt's last one), then the drafts.

    embeds     [B, W, D] in the embedding's dtype; None when the window has no embedding
    tokens     i64 [B, W] local ids; −1 where noisy, and for the prompt's last token
    positions  i64 [B, W] picture positions of the slots; −1 = the prompt's last token; N and more = padding
    levels     i32 [B, W] noise levels; −1 = clean
    """

    embeds: Tensor | None
    tokens: Tensor
    positions: Tensor
    levels: Tensor


@dataclass(frozen=True)
class WindowStep:
    """What a step did: accepted i32 [B], the tokens that entered each picture (0 for rows that are done)."""

    accepted: Tensor


class JacobiWindow:
    """Decodes B pictures of one layout; rows are independent of each other and each ends by itself.

    embedding [V+F, D] holds the input rows by local id, start_embeds [B, D] the embeddings of the prompts'
    last tokens (both None where the caller looks tokens up itself). seeds: one int per row, else those of
    the config. kv_lengths: an optional i32 [R·B] tensor of cache lengths, which every step moves along.

    The caller's cache holds prompt[:-1] of each row at first, and prompt_len − 1 + lengths[b] entries after
    every step. Every tensor stays on the device and is written in place, so that a step can be captured.

    Rows are slots: `restart` begins another picture in some of them, `stop` gives one up, and `resize` goes on with
    another width, all between two steps; whatever the widths and the neighbours, a row's law stays the same.

    lengths, steps, failed, failed_step i32 [B]: accepted tokens, forward passes used, first position with
    NaN or infinite logits and the step of it (−1 = fine).
    """

    def __init__(
        self,
        config: DecodeConfig,
        layout: TokenLayout,
        embedding: Tensor | None = None,
        start_embeds: Tensor | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
        kv_lengths: Tensor | None = None,
    ) -> None:
        if config.window == AUTO:
            raise ConfigError("window='auto' is for the engine, which measures passes: give a number here")
        self.config, self.layout, self.plan = config, layout, make_plan(config)
        self.max_width = config.width
        self.total = len(layout)
        self.device = torch.device(device or ("cpu" if embedding is None else embedding.device))
        self.seeds = seed_tensor(config, seeds, start_embeds, self.device)
        self.batch = self.seeds.shape[0]
        self.image_vocab = image_vocab_of(layout, embedding)
        self._embedding = None if embedding is None else embedding.detach().to(self.device)
        start = checked_start(start_embeds, self._embedding, self.batch)
        self._start = None if start is None else start.clone()  # `restart` writes into it
        self._kv_lengths = checked_kv_lengths(kv_lengths, self.batch, self.device)
        self._bound = False
        self._lagged: Lagged | None = None
        with torch.no_grad():
            self._make_counters()
            self._make_noise()
            if self.image_vocab is not None:
                self._bind(self.image_vocab)
            self._widths: dict[int, Drafts] = {}
            self._drafts = self._room(self.max_width)
            self._begin(list(range(self.batch)))

    @property
    def width(self) -> int:
        """Model inputs per row and forward pass at present."""
        return self._drafts.width

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def inputs(self) -> WindowInputs:
        """The inputs of the next forward pass."""
        last = self._tokens.gather(1, (self.lengths[:, None] - 1).clamp(min=0).long())
        last = last.masked_fill(self.lengths[:, None] == 0, -1)
        drafts = self._drafts
        positions = (self.lengths[:, None] - 1) + self._slots[: drafts.width]
        if not self.plan.noisy:
            tokens, levels = torch.cat((last, drafts.tokens), 1), drafts.clean
        else:
            tokens = torch.cat((last, drafts.tokens.masked_fill(drafts.levels >= 0, -1)), 1)
            levels = torch.cat((drafts.clean[:, :1], drafts.levels), 1)
        embeds = None
        if self._embedding is not None:
            embeds = torch.ops.sjd2.embed_window(
                tokens, levels, self._embedding, self._start, drafts.noisy, self._mean, self._std
            )
        return WindowInputs(embeds, tokens, positions, levels)

    @torch.no_grad()
    def step(self, logits: Tensor) -> WindowStep:
        """Take the model's output in: [B, W, V] over image ids, or [2, B, W, V] = (cond, uncond)."""
        self._check_logits(logits)
        config, plan, drafts, ops = self.config, self.plan, self._drafts, torch.ops.sjd2
        begin, end = self.layout.legal or (0, logits.shape[-1])
        tokens, p, bad = ops.sample_window(
            logits, self.seeds, self.lengths, self.steps, self._gumbel, config.guidance_scale,
            config.temperature, config.top_k, config.top_p, begin, end, plan.per_position, plan.tracks_q,
        )  # fmt: skip
        decided, accepted, settled, fault = ops.verify(
            tokens, p, bad, drafts.tokens, drafts.q, drafts.status, drafts.levels, self._forced, self.lengths,
            self.steps, self._done, self.seeds, self.total, plan.rule,
        )  # fmt: skip
        ops.commit(
            decided, accepted, fault, self._tokens, self.lengths, self.steps, self._done, self.failed,
            self.failed_step, drafts.histogram, self._kv_lengths, self.total,
        )  # fmt: skip
        if drafts.width > 1:
            self._repeat()
            ops.refine(
                decided, p, accepted, settled, self.lengths, self._forced, self._initial, drafts.tokens,
                drafts.status, drafts.levels, drafts.q, drafts.noisy, self._embedding, self._mean, self._std,
                self._ratios, self._noise, self._directions, self.seeds, self._fresh_level,
            )  # fmt: skip
        return WindowStep(accepted)

    def _repeat(self) -> None:
        """Let token drafts to come repeat what was accepted `repeat_distance` positions before them."""
        distance = self.config.repeat_distance
        if not 0 < distance < self.total:
            return
        # Only tokens of other positions: what a draft is drawn from never depends on noise of its own position.
        source, drafts = self._tokens[:, :-distance], self._initial[:, distance:]
        usable = (source >= 0) & (self._forced[distance:] < 0) & (self._forced[:-distance] < 0)
        torch.where(usable, source, drafts, out=drafts)

    @property
    def tokens(self) -> Tensor:
        """Tokens so far: i64 [B, N] local ids, −1 where nothing is accepted yet."""
        return self._tokens[:, : self.total]

    def latest(self) -> Tensor:
        """The last `width` tokens of each row, i64 [B, W]; those that the last step accepted stand at its end."""
        positions = self.lengths[:, None] - self.width + self._slots[: self.width]
        return self._tokens.gather(1, positions.clamp(min=0).long())

    @property
    def histogram(self) -> Tensor:
        """Steps by accepted tokens: i64 [B, max_width + 1]."""
        parts = (drafts.histogram for drafts in self._widths.values())
        padded = [torch.nn.functional.pad(part, (0, self.max_width + 1 - part.shape[1])) for part in parts]
        return torch.stack(padded).sum(0)

    @property
    def done(self) -> bool:
        """Whether every row has ended; on CUDA one step late, so that nothing waits for the device."""
        if self.device.type != "cuda":
            return bool(self._done.all())
        self._lagged = self._lagged or Lagged()
        self._lagged.push(self._done.all())
        # The answer of the call before: by now its copy has been overtaken by a whole forward pass.
        return len(self._lagged) > 1 and bool(self._lagged.pop().item())

    @property
    def rows_done(self) -> Tensor:
        """Which rows have ended: i32 [B] on the device, 0 or 1."""
        return self._done

    # ------------------------------------------------------------------ between two steps

    @torch.no_grad()
    def restart(
        self, rows: Sequence[int], seeds: Sequence[int] | None = None, start_embeds: Tensor | None = None
    ) -> None:
        """Begin new pictures in `rows`, one seed and one start [n, D] for each (None: those it had).

        The caller's cache entries of these rows are its own affair, `kv_lengths` included. Raises ConfigError.
        """
        check_rows(rows, self.batch)
        index = torch.tensor(rows, dtype=torch.int64)
        if seeds is not None:
            self.seeds[index.to(self.device)] = checked_seeds(seeds, len(rows)).to(self.device)
        start = None if start_embeds is None else checked_start(start_embeds, self._embedding, len(rows))
        if start is not None and self._start is not None:
            self._start[index.to(self.device)] = start
        self._begin(list(rows))

    @torch.no_grad()
    def stop(self, rows: Sequence[int]) -> None:
        """Give the pictures in `rows` up: they count as done and change no more."""
        check_rows(rows, self.batch)
        self._done[torch.tensor(rows, device=self.device)] = 1

    @torch.no_grad()
    def resize(self, width: int) -> None:
        """Go on with another width, at most the one it was made with; leading drafts stay, new ones are fresh.

        Lossless as long as the choice does not look at drafts: times and counts of accepted tokens may decide.
        """
        if not 1 <= width <= self.max_width:
            raise ConfigError(f"width={width}: expected 1 to {self.max_width}, the width this window was made for")
        if width == self.width:
            return
        before, self._drafts = self._drafts, self._room(width)
        first = self._drafts.take(before)
        if first < width - 1:
            self._refresh(torch.arange(self.batch, device=self.device), first, self._fresh_level)

    def _room(self, width: int) -> Drafts:
        """The drafts of a width, allocated once: graphs captured at that width work on them."""
        if width not in self._widths:
            vocab = self.image_vocab if self._bound and self.plan.tracks_q and self.image_vocab else 0
            dim = self._embedding.shape[1] if self.plan.noisy and self._embedding is not None else 0
            self._widths[width] = Drafts.allocate(self.batch, width, vocab, dim, self.device)
        return self._widths[width]

    def _begin(self, rows: list[int]) -> None:
        """Put `rows` where a new picture starts."""
        index = torch.tensor(rows, device=self.device)
        for counter, value in ((self.lengths, 0), (self.steps, 0), (self._done, 0), (self.failed, -1)):
            counter[index] = value
        self.failed_step[index] = -1
        self._tokens[index] = -1
        for drafts in self._widths.values():
            drafts.histogram[index] = 0
        self._draw_tables(index)
        if self.max_width > 1:
            self._refresh(index, 0, self._fresh_level if self.plan.noisy_start else CLEAN)

    def _draw_tables(self, rows: Tensor) -> None:
        """What depends on the rows' seeds: initial tokens, and noise where it is kept as a table."""
        seeds = self.seeds[rows]
        self._initial[rows] = initial_tokens(seeds, self._forced, self.image_vocab, self.layout.legal)
        if self._noise is not None:
            positions = torch.arange(self._noise.shape[1], device=self.device).expand(len(rows), -1)
            self._noise[rows] = rng.normals(seeds, positions, 0, self._noise.shape[2])
        if self._gumbel is not None:
            positions = torch.arange(self.total, device=self.device).expand(len(rows), -1)
            self._gumbel[rows, : self.total] = rng.gumbel(seeds, positions, 0, rng.SAMPLE, self._gumbel.shape[2])

    def _refresh(self, rows: Tensor, first: int, level: int) -> None:
        """Fresh drafts from slot `first` on of `rows`, at a noise level or as tokens."""
        drafts = self._drafts
        positions = self.lengths[rows, None] + self._slots[first : drafts.width - 1]
        tokens = self._initial[rows[:, None], positions]
        levels = torch.where(self._forced[positions] < 0, level, CLEAN).to(torch.int32)
        noisy = None
        if drafts.noisy is not None:
            noisy = rng.normals(self.seeds[rows], positions, 0, drafts.noisy.shape[2])
        drafts.refill(first, rows, tokens, levels, noisy)

    # ------------------------------------------------------------------ state

    def _make_counters(self) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((self.batch, *shape), value, dtype=dtype, device=self.device)

        self.lengths, self.steps, self._done = full(0), full(0), full(0)
        self.failed, self.failed_step = full(-1), full(-1)
        self._tokens = full(-1, self.total + self.max_width, dtype=torch.int64)
        self._initial = torch.zeros_like(self._tokens)
        self._slots = torch.arange(self.max_width, device=self.device)
        self._fresh_level = self.config.denoise_levels - 1 if self.plan.noisy else CLEAN
        # Padding counts as forced, so that no rule needs a special case for the end of the picture.
        padded = torch.tensor([*self.layout.forced, *[0] * self.max_width])
        self._forced = padded.to(self.device)
        self._gumbel: Tensor | None = None

    def _make_noise(self) -> None:
        """Everything that only SJD2 needs: statistics, level ratios, a table of noise."""
        self._mean = self._std = self._ratios = self._noise = self._directions = None
        if not self.plan.noisy:
            return
        if self._embedding is None or self.image_vocab is None:
            raise ConfigError("decoder='sjd2' denoises embeddings: pass `embedding` [V+F, D] and `start_embeds` [B, D]")
        self._mean, self._std = embedding_statistics(self._embedding, self.image_vocab)
        self.times = noise_times(self.config.denoise_levels, self.config.t_min).to(self.device)
        self._ratios = refine_ratios(self.times)
        dim, padded = self._embedding.shape[1], self.total + self.max_width
        if keeps_noise_table("refine", self.device.type, self.batch * padded * dim):
            self._noise = torch.zeros(self.batch, padded, dim, device=self.device)
        if self.plan.nearest:
            rows = (self._embedding[: self.image_vocab].float() - self._mean) / self._std
            self._directions = torch.nn.functional.normalize(rows, dim=-1)

    def _bind(self, vocab: int) -> None:
        """Make what depends on V, at the latest with the first logits."""
        self._bound, self.image_vocab = True, vocab
        padded = self.total + self.max_width
        size = self.batch * padded * vocab
        if self.plan.per_position and keeps_noise_table("sample_window", self.device.type, size):
            self._gumbel = torch.zeros(self.batch, padded, vocab, device=self.device)

    def _bind_late(self, vocab: int) -> None:
        """The same where neither layout nor embedding told V: the tables and q are made with the first logits."""
        self._bind(vocab)
        self._draw_tables(torch.arange(self.batch, device=self.device))
        if self.plan.tracks_q:
            q = torch.zeros(self.batch, self.width - 1, vocab, device=self.device)
            self._drafts = self._widths[self.width] = replace(self._drafts, q=q)

    # ------------------------------------------------------------------ checks

    def _check_logits(self, logits: Tensor) -> None:
        shape, wanted = tuple(logits.shape), (self.batch, self.width)
        good = logits.dim() in (3, 4) and shape[-3:-1] == wanted and (logits.dim() == 3 or shape[0] == 2)
        vocab = "V" if self.image_vocab is None else self.image_vocab
        if good and not self._bound:
            self._bind_late(shape[-1])
        if not good or shape[-1] != self.image_vocab:
            b, w = wanted
            raise ConfigError(
                f"logits have shape {shape}: expected [{b}, {w}, {vocab}], or [2, {b}, {w}, {vocab}] for "
                "(cond, uncond); if there are more or fewer image ids, say so by TokenLayout(image_vocab=…)"
            )
        if not logits.is_floating_point():
            raise ConfigError(f"logits are {logits.dtype}: expected a floating-point type")


def keeps_noise_table(op: str, device: str, size: int) -> bool:
    """Whether a window hands `op` its position-keyed noise as a table of `size` numbers."""
    return device == "cpu" and size <= NOISE_TABLE_LIMIT and dispatch.choice(op, device)[0] != "c"


def initial_tokens(
    seeds: Tensor, forced: Tensor, image_vocab: int | None, legal: tuple[int, int] | None = None
) -> Tensor:
    """Token drafts i64 [B, P] for positions without any prediction: forced tokens, else random image ids."""
    positions = torch.arange(forced.shape[0], device=forced.device).expand(seeds.shape[0], -1)
    begin, end = legal or (0, image_vocab or 1)
    u = rng.uniforms(seeds, positions, 0, rng.INIT, 1).squeeze(-1)
    drawn = (u * (end - begin)).long().clamp(max=end - begin - 1) + begin
    return torch.where(forced >= 0, forced, drawn)
