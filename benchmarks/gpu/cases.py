"""Real arguments of every op, for the sizes of a decode; bytes that each call cannot avoid to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sjd2_kernels import reference

LEVELS = 25  # noise levels, and timestep slots in front of the cache


@dataclass(frozen=True)
class Sizes:
    """A decode with guidance: 2·batch rows in the cache, `length` entries in front of the window."""

    batch: int = 1
    window: int = 96
    vocab: int = 8192
    dim: int = 4096
    feed: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head: int = 128
    length: int = 2304
    layers: int = 4
    dtype: torch.dtype = torch.bfloat16
    norm: int = reference.LAYER_NORM
    rule: int = reference.PAPER
    top_k: int = 2000
    top_p: float = 1.0

    @property
    def rows(self) -> int:
        return 2 * self.batch


# One image of a 7B model; a batch; grouped heads over a long cache.
STEP = Sizes()
BATCH = Sizes(batch=16, length=256)
GROUPED = Sizes(window=16, kv_heads=8, length=8384)


class Case:
    """One image batch in the middle of its decode, and from it the arguments of any op."""

    def __init__(self, sizes: Sizes, device: torch.device, seed: int = 0) -> None:
        self.sizes, self.device = sizes, device
        self._generator = torch.Generator(device).manual_seed(seed)
        # Positions enough for every replay of a step: lengths move on while it is timed.
        self.total = max(200_000, sizes.length + 10) if device.type == "cuda" else sizes.length + 3 * sizes.window

    def arguments(self, op: str) -> list[Any]:
        return getattr(self, op)()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self.device, dtype=dtype)

    def full(self, value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    # ---------------------------------------------------------------- what the ops of a step share

    @cached_property
    def state(self) -> dict[str, Any]:
        """Window and counters; half of the drafts are noisy, and one position in 48 is forced."""
        s, count, padded = self.sizes, self.sizes.window - 1, self.total + self.sizes.window
        forced = self.full(-1, padded, dtype=torch.int64)
        forced[47::48] = s.vocab
        levels = self.integers(0, LEVELS, s.batch, count)
        levels[:, : count // 2] = -1
        return {
            "table": self.normal(s.vocab + 1, s.dim, dtype=s.dtype),
            "start": self.normal(s.batch, s.dim, dtype=s.dtype),
            "mean": self.normal(s.dim),
            "std": self.normal(s.dim).abs() + 0.5,
            "times": torch.linspace(0.03, 0.75, LEVELS, device=self.device),
            "ratios": torch.linspace(0.0, 0.9, LEVELS, device=self.device),
            "seeds": self.integers(0, 2**62, s.batch, dtype=torch.int64),
            "lengths": self.full(s.length, s.batch),
            "steps": self.full(5, s.batch),
            "done": self.full(0, s.batch),
            "failed": self.full(-1, s.batch),
            "failed_step": self.full(0, s.batch),
            "histogram": self.full(0, s.batch, s.window + 1, dtype=torch.int64),
            "kv_lengths": self.full(s.length, s.rows),
            "picture": self.integers(0, s.vocab, s.batch, padded, dtype=torch.int64),
            "initial": self.integers(0, s.vocab, s.batch, padded, dtype=torch.int64),
            "forced": forced,
            "drafts": self.integers(0, s.vocab, s.batch, count, dtype=torch.int64),
            "status": self.full(reference.TRACKED, s.batch, count),
            "levels": levels,
            "q": (self.normal(s.batch, count, s.vocab) * 2).softmax(-1),
            "noisy": self.normal(s.batch, count, s.dim),
            "logits": self.normal(2, s.batch, s.window, s.vocab, dtype=s.dtype) * 2,
        }

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.sample_window(*self.sample_window())

    @cached_property
    def verified(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.verify(*self.verify())

    def _of_state(self, *names: str) -> list[Any]:
        return [self.state[name] for name in names]

    # ---------------------------------------------------------------- the ops of a step

    def embed_window(self) -> list[Any]:
        first = self.full(1, self.sizes.batch, 1)
        tokens = torch.cat((first.long(), self.state["drafts"]), 1)
        levels = torch.cat((-first, self.state["levels"]), 1)
        tokens[:, 1:][self.state["levels"] >= 0] = -1
        return [tokens, levels, *self._of_state("table", "start", "noisy", "mean", "std")]

    def sample_window(self) -> list[Any]:
        s = self.sizes
        tensors = self._of_state("logits", "seeds", "lengths", "steps")
        return [*tensors, None, 3.0, 1.0, s.top_k, s.top_p, 0, s.vocab, False, True]

    def verify(self) -> list[Any]:
        tokens, p, bad = self.sampled
        drafts = self.state["drafts"]
        drafts[:, ::2] = p[:, :-1].argmax(-1)[:, ::2]  # likely ones, so that the runs of accepted drafts differ
        known = self._of_state("drafts", "q", "status", "levels", "forced", "lengths", "steps", "done", "seeds")
        return [tokens, p, bad, *known, self.total, self.sizes.rule]

    def commit(self) -> list[Any]:
        decided, accepted, _, fault = self.verified
        names = "picture", "lengths", "steps", "done", "failed", "failed_step", "histogram", "kv_lengths"
        return [decided, accepted, fault, *self._of_state(*names), self.total]

    def refine(self) -> list[Any]:
        decided, accepted, settled, _ = self.verified
        tensors = self._of_state(
            "lengths", "forced", "initial", "drafts", "status", "levels", "q", "noisy", "table", "mean", "std", "ratios"
        )
        lengths = tensors[0] + accepted
        return [decided, self.sampled[1], accepted, settled, lengths, *tensors[1:], None, None, self.state["seeds"], 24]

    def perturb(self) -> list[Any]:
        s = self.sizes
        levels = self.integers(-1, LEVELS, s.batch, s.length)
        positions = torch.arange(s.length, device=self.device).expand(s.batch, -1)
        constants = self._of_state("seeds", "mean", "std", "times")
        return [self.normal(s.batch, s.length, s.dim, dtype=s.dtype), levels, positions, *constants, 3, True]

    # ---------------------------------------------------------------- the transformer's ops

    def rms_norm(self) -> list[Any]:
        s = self.sizes
        x = [self.normal(s.rows, s.window, s.dim, dtype=s.dtype) for _ in range(2)]
        return [x[0], self.normal(s.dim, dtype=s.dtype), 1e-5, x[1]]

    def swiglu(self) -> list[Any]:
        s = self.sizes
        return [self.normal(s.rows, s.window, 2 * s.feed, dtype=s.dtype)]

    def _cache(self, *leading: int) -> list[Tensor]:
        s = self.sizes
        shape = (*leading, s.rows, LEVELS + s.length + 2 * s.window, s.kv_heads, s.head)
        return [self.normal(*shape, dtype=s.dtype) for _ in range(2)]

    def qk_norm_rope_cache(self) -> list[Any]:
        s = self.sizes
        counts = s.heads, s.heads, s.kv_heads, s.kv_heads
        weights: list[Any] = [self.normal(n, s.head, dtype=s.dtype) for n in counts]
        if s.norm == reference.RMS_NORM:
            weights[1] = weights[3] = None
        if s.norm == reference.NO_NORM:
            weights = [None] * 4
        qkv = self.normal(s.rows, s.window, s.heads + 2 * s.kv_heads, s.head, dtype=s.dtype)
        angle = self.normal(s.length + 2 * s.window, s.head // 2)
        cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat((-angle.sin(), angle.sin()), 1)
        return [qkv, cos, sin, self.state["kv_lengths"], *self._cache(), *weights, s.norm, 1e-5, LEVELS]

    def window_attention(self) -> list[Any]:
        s = self.sizes
        q = self.normal(s.rows, s.window, s.heads, s.head, dtype=s.dtype)
        levels = self.integers(-1, LEVELS, s.rows, s.window)
        return [q, *self._cache(), self.state["kv_lengths"], levels, LEVELS, s.head**-0.5]

    def kv_compact(self) -> list[Any]:
        s = self.sizes
        longest = min(32, s.window)
        source = torch.arange(longest, device=self.device, dtype=torch.int32).mul(2).expand(s.rows, -1).contiguous()
        lengths, counts = self.state["kv_lengths"], self.full(longest // 2, s.rows)
        return [*self._cache(s.layers), lengths, source, counts, LEVELS]


# Arguments that an op changes.
MUTATED = {
    "commit": range(3, 11),
    "refine": range(7, 12),
    "kv_compact": range(2),
    "qk_norm_rope_cache": range(4, 6),
    "rms_norm": (3,),
}
STEP_OPS = ("embed_window", "sample_window", "verify", "commit", "refine")


def traffic(op: str, s: Sizes) -> int | None:
    """Bytes that one call has to read and write; None where the data decide."""
    item, token = s.dtype.itemsize, s.batch * s.window
    kv = s.rows * s.kv_heads * s.head * item  # keys of one position
    known: dict[str, Callable[[], int]] = {
        "embed_window": lambda: token * s.dim * item + token * s.dim * (item + 4) // 2,
        "perturb": lambda: 2 * s.batch * s.length * s.dim * item,
        "sample_window": lambda: token * s.vocab * (2 * item + 4),
        "refine": lambda: s.batch * (s.window - 1) * (2 * s.vocab * 4 + s.dim * (2 * 4 + item)),
        "rms_norm": lambda: 4 * s.rows * s.window * s.dim * item,
        "swiglu": lambda: 3 * s.rows * s.window * s.feed * item,
        "qk_norm_rope_cache": lambda: 2 * s.rows * s.window * (s.heads + 2 * s.kv_heads) * s.head * item,
        "window_attention": lambda: 2 * (s.length + s.window) * kv + 2 * s.rows * s.window * s.heads * s.head * item,
        "kv_compact": lambda: 2 * 2 * s.layers * (min(32, s.window) // 2 - 1) * kv,
    }
    return known[op]() if op in known else None


def plain_attention(args: list[Any]) -> Tensor:
    """window_attention by PyTorch in the arguments' own dtype, which says how exact that dtype can be."""
    q, keys, values, lengths, levels, front, scale = args
    slot = torch.arange(keys.shape[1], device=q.device)
    step = torch.arange(q.shape[1], device=q.device)[:, None]
    mask = (slot >= front) & (slot <= front + lengths[:, None, None] + step)
    mask |= (slot < front) & (slot == levels[..., None])
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, mask[:, None], scale=scale).transpose(1, 2)
