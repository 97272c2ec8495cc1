"""States of a window and guarded calls, for the tests of the C core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import Guards
from torch import Tensor

VERIFY = (
    "tokens", "p", "bad", "drafts", "q", "status", "levels", "forced", "lengths", "steps", "done", "seeds", "total",
)  # fmt: skip


def guarded(op: Callable[..., Any], *args: Any) -> Any:
    """Call with every output, and every tensor that the op may write, between guards."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(tuple(shape), dtype, device))
        result = op(*args)
    guards.check()
    return result


def counters(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """seeds (most above 2³²), lengths, steps."""
    rows = torch.arange(batch)
    return rows * (2**33 + 7) + 5, (rows * 3).int(), (rows + 2).int()


def window_state(seed: int, batch: int, window: int, vocab: int, total: int) -> dict[str, Any]:
    """Everything that verify, commit and refine look at, at random but consistent."""
    make = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=make).to(dtype)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=make) < share

    drafts, padded = window - 1, total + window
    p = (3 * torch.randn(batch, window, vocab, generator=make)).softmax(-1)
    q = (3 * torch.randn(batch, drafts, vocab, generator=make)).softmax(-1)
    q = torch.where(chance(0.3, batch, drafts, 1), p[:, :-1], q)
    q, p = q.masked_fill(chance(0.1, *q.shape), 0.0), p.masked_fill(chance(0.1, *p.shape), 0.0)
    forced = torch.where(chance(0.25, padded), vocab, -1)
    forced[total:] = 0
    lengths = integers(0, total, batch)
    done = chance(0.2, batch).int()
    lengths = torch.where(done == 1, total, lengths).int()
    tokens = integers(0, vocab, batch, window, dtype=torch.int64)
    known = forced.take(lengths[:, None].long() + torch.arange(drafts))
    drafted = torch.where(
        chance(0.6, batch, drafts), tokens[:, :-1], integers(0, vocab, batch, drafts, dtype=torch.int64)
    )
    return {
        "tokens": tokens, "p": p, "bad": chance(0.05, batch, window), "drafts": torch.where(known >= 0, known, drafted),
        "q": q, "status": integers(0, 3, batch, drafts), "levels": integers(-3, 3, batch, drafts).clamp(min=-1),
        "forced": forced, "lengths": lengths, "steps": integers(0, 9, batch), "done": done, "seeds": counters(batch)[0],
        "total": total, "padded": padded, "initial": integers(0, vocab, batch, padded, dtype=torch.int64),
        "histogram": integers(0, 9, batch, window + 1, dtype=torch.int64), "make": make,
    }  # fmt: skip


def verify_arguments(state: dict[str, Any], rule: int) -> list[Any]:
    return [*(state[name] for name in VERIFY), rule]
