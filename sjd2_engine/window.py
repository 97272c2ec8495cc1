"""JacobiWindow: the state machine of every decoder. It owns the drafts; the caller owns the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sjd2_kernels.ops  # noqa: F401  (registers torch.ops.sjd2)
from sjd2_kernels import dispatch, rng

from .config import MAX_SEED, DecodeConfig
from .decoders import make_plan
from .errors import ConfigError
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

    lengths, steps, failed, failed_step i32 [B]: accepted tokens, forward passes used, first position with
    NaN or infinite logits and the step of it (−1 = fine); histogram i64 [B, W+1]: steps by accepted tokens.
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
        self.config, self.layout, self.plan = config, layout, make_plan(config)
        self.width = config.width
        self.total = len(layout)
        self.device = torch.device(device or ("cpu" if embedding is None else embedding.device))
        self.seeds = _seed_tensor(config, seeds, start_embeds, self.device)
        self.batch = self.seeds.shape[0]
        self.image_vocab = _image_vocab(layout, embedding)
        self._embedding = None if embedding is None else embedding.detach().to(self.device)
        self._start = _checked_start(start_embeds, self._embedding, self.batch)
        self._kv_lengths = self._checked_kv_lengths(kv_lengths)
        with torch.no_grad():
            self._make_counters()
            self._make_drafts()
            self._make_noise()
        self._bound = False
        if self.image_vocab is not None:
            self._bind(self.image_vocab)
        self._pending: list[tuple[Tensor, torch.cuda.Event]] = []

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def inputs(self) -> WindowInputs:
        """The inputs of the next forward pass."""
        last = self._tokens.gather(1, (self.lengths[:, None] - 1).clamp(min=0).long())
        last = last.masked_fill(self.lengths[:, None] == 0, -1)
        positions = (self.lengths[:, None] - 1) + self._slots
        if not self.plan.noisy:
            tokens, levels = torch.cat((last, self._drafts), 1), self._clean
        else:
            tokens = torch.cat((last, self._drafts.masked_fill(self._levels >= 0, -1)), 1)
            levels = torch.cat((self._clean[:, :1], self._levels), 1)
        embeds = None
        if self._embedding is not None:
            embeds = torch.ops.sjd2.embed_window(
                tokens, levels, self._embedding, self._start, self._noisy, self._mean, self._std
            )
        return WindowInputs(embeds, tokens, positions, levels)

    @torch.no_grad()
    def step(self, logits: Tensor) -> WindowStep:
        """Take the model's output in: [B, W, V] over image ids, or [2, B, W, V] = (cond, uncond)."""
        self._check_logits(logits)
        config, plan, ops = self.config, self.plan, torch.ops.sjd2
        begin, end = self.layout.legal or (0, logits.shape[-1])
        tokens, p, bad = ops.sample_window(
            logits, self.seeds, self.lengths, self.steps, self._gumbel, config.guidance_scale,
            config.temperature, config.top_k, config.top_p, begin, end, plan.per_position, plan.tracks_q,
        )  # fmt: skip
        decided, accepted, settled, fault = ops.verify(
            tokens, p, bad, self._drafts, self._q, self._status, self._levels, self._forced, self.lengths,
            self.steps, self._done, self.seeds, self.total, plan.rule,
        )  # fmt: skip
        ops.commit(
            decided, accepted, fault, self._tokens, self.lengths, self.steps, self._done, self.failed,
            self.failed_step, self.histogram, self._kv_lengths, self.total,
        )  # fmt: skip
        if self.width > 1:
            self._repeat()
            ops.refine(
                decided, p, accepted, settled, self.lengths, self._forced, self._initial, self._drafts,
                self._status, self._levels, self._q, self._noisy, self._embedding, self._mean, self._std,
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

    @property
    def done(self) -> bool:
        """Whether every row has ended; on CUDA one step late, so that nothing waits for the device."""
        if self.device.type != "cuda":
            return bool(self._done.all())
        # The answer of the call before: by now its copy has been overtaken by a whole forward pass.
        flag = torch.empty(1, dtype=torch.bool, pin_memory=True)
        flag.copy_(self._done.all(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((flag, event))
        if len(self._pending) < 2:
            return False
        flag, event = self._pending.pop(0)
        event.synchronize()
        return bool(flag.item())

    @property
    def rows_done(self) -> Tensor:
        """Which rows have ended: i32 [B] on the device, 0 or 1."""
        return self._done

    # ------------------------------------------------------------------ state

    def _make_counters(self) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((self.batch, *shape), value, dtype=dtype, device=self.device)

        self.lengths, self.steps, self._done = full(0), full(0), full(0)
        self.failed, self.failed_step = full(-1), full(-1)
        self.histogram = full(0, self.width + 1, dtype=torch.int64)
        self._tokens = full(-1, self.total + self.width, dtype=torch.int64)
        self._slots = torch.arange(self.width, device=self.device)
        self._clean = full(CLEAN, self.width)
        # Padding counts as forced, so that no rule needs a special case for the end of the picture.
        padded = torch.tensor([*self.layout.forced, *[0] * self.width])
        self._forced = padded.to(self.device)

    def _make_drafts(self) -> None:
        count = self.width - 1
        self._initial = initial_tokens(self.seeds, self._forced, self.image_vocab, self.layout.legal)
        self._drafts = self._initial[:, :count].clone()
        self._status = torch.zeros_like(self._drafts, dtype=torch.int32)
        self._levels = torch.full_like(self._status, CLEAN)
        self._fresh_level = self.config.denoise_levels - 1 if self.plan.noisy else CLEAN
        if self.plan.noisy_start:
            self._levels.masked_fill_((self._forced[:count] < 0).expand_as(self._levels), self._fresh_level)

    def _make_noise(self) -> None:
        """Everything that only SJD2 needs: statistics, level ratios, noisy embeddings."""
        self._noisy = self._mean = self._std = self._ratios = self._noise = self._directions = None
        if not self.plan.noisy:
            return
        if self._embedding is None or self.image_vocab is None:
            raise ConfigError("decoder='sjd2' denoises embeddings: pass `embedding` [V+F, D] and `start_embeds` [B, D]")
        self._mean, self._std = embedding_statistics(self._embedding, self.image_vocab)
        self.times = noise_times(self.config.denoise_levels, self.config.t_min).to(self.device)
        self._ratios = refine_ratios(self.times)
        dim, padded = self._embedding.shape[1], self.total + self.width
        positions = torch.arange(padded, device=self.device).expand(self.batch, -1)
        if keeps_noise_table("refine", self.device.type, self.batch * padded * dim):
            self._noise = rng.normals(self.seeds, positions, 0, dim)
        self._noisy = rng.normals(self.seeds, positions[:, : self.width - 1], 0, dim).contiguous()
        if self.plan.nearest:
            rows = (self._embedding[: self.image_vocab].float() - self._mean) / self._std
            self._directions = torch.nn.functional.normalize(rows, dim=-1)

    def _bind(self, vocab: int) -> None:
        """Make what depends on V, at the latest with the first logits."""
        if self.image_vocab is None:
            self._initial = initial_tokens(self.seeds, self._forced, vocab, self.layout.legal)
        self._bound, self.image_vocab = True, vocab
        ids = vocab if self.plan.tracks_q else 0
        self._q = torch.zeros(self.batch, self.width - 1, ids, device=self.device)
        self._gumbel = None
        size = self.batch * (self.total + self.width) * vocab
        if self.plan.per_position and keeps_noise_table("sample_window", self.device.type, size):
            positions = torch.arange(self.total, device=self.device).expand(self.batch, -1)
            table = rng.gumbel(self.seeds, positions, 0, rng.SAMPLE, vocab)
            self._gumbel = torch.nn.functional.pad(table, (0, 0, 0, self.width))

    # ------------------------------------------------------------------ checks

    def _check_logits(self, logits: Tensor) -> None:
        shape, wanted = tuple(logits.shape), (self.batch, self.width)
        good = logits.dim() in (3, 4) and shape[-3:-1] == wanted and (logits.dim() == 3 or shape[0] == 2)
        vocab = "V" if self.image_vocab is None else self.image_vocab
        if good and not self._bound:
            self._bind(shape[-1])
        if not good or shape[-1] != self.image_vocab:
            b, w = wanted
            raise ConfigError(
                f"logits have shape {shape}: expected [{b}, {w}, {vocab}], or [2, {b}, {w}, {vocab}] for "
                "(cond, uncond); if there are more or fewer image ids, say so by TokenLayout(image_vocab=…)"
            )
        if not logits.is_floating_point():
            raise ConfigError(f"logits are {logits.dtype}: expected a floating-point type")

    def _checked_kv_lengths(self, kv_lengths: Tensor | None) -> Tensor:
        if kv_lengths is None:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        if kv_lengths.dtype != torch.int32 or kv_lengths.dim() != 1 or kv_lengths.shape[0] % self.batch:
            raise ConfigError(
                f"kv_lengths is {kv_lengths.dtype} {tuple(kv_lengths.shape)}: expected int32 [R·{self.batch}]"
            )
        return kv_lengths


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


def _image_vocab(layout: TokenLayout, embedding: Tensor | None) -> int | None:
    """V as the layout says, else the smallest structure id, else all rows of the embedding."""
    vocab = layout.image_vocab if layout.image_vocab is not None else layout.smallest_forced
    if embedding is None:
        return vocab
    if embedding.dim() != 2 or not embedding.is_floating_point():
        raise ConfigError(f"embedding is {embedding.dtype} {tuple(embedding.shape)}: expected floats [V+F, D]")
    rows = embedding.shape[0]
    needed = max(max(layout.forced) + 1, vocab or 1)
    if rows < needed:
        raise ConfigError(
            f"embedding has {rows} rows, but the layout uses local ids up to {needed - 1}: expected one "
            "row per image id, then one per structure id"
        )
    return rows if vocab is None else vocab


def _seed_tensor(
    config: DecodeConfig, seeds: Sequence[int] | Tensor | None, start: Tensor | None, device: torch.device
) -> Tensor:
    if seeds is None:
        count = start.shape[0] if start is not None else 1 if isinstance(config.seed, int) else len(config.seed)
        values = config.seeds(count)
    else:
        values = [int(value) for value in seeds]
    if not values or any(not 0 <= value <= MAX_SEED for value in values):
        raise ConfigError(f"seeds={values}: expected one integer from 0 to 2**63 - 1 per row, for at least one row")
    return torch.tensor(values, dtype=torch.int64, device=device)


def _checked_start(start: Tensor | None, embedding: Tensor | None, batch: int) -> Tensor | None:
    if embedding is None:
        if start is not None:
            raise ConfigError("start_embeds were given without an embedding: give both, or neither")
        return None
    wanted = (batch, embedding.shape[1])
    if start is None or tuple(start.shape) != wanted:
        got = None if start is None else tuple(start.shape)
        raise ConfigError(
            f"start_embeds have shape {got}: expected {wanted}, the embedding of each prompt's last token, "
            f"one row for each of the {batch} seeds"
        )
    return start.detach().to(embedding)
