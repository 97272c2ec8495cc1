"""What an attention backend is: who it can serve, and a function per pass that every layer calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..transformer import TransformerConfig

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [R, T, H, d], and a layer's keys and values [R, S, Hkv, d] with the pass's own entries written -> [R, T, H, d]."""

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Workload:
    """What stays the same from pass to pass, by which a backend is chosen.

    timesteps: whether queries may have a timestep key each. capability: of the GPU, as (9, 0); None elsewhere.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    timesteps: bool = False
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: TransformerConfig, device: torch.device, dtype: torch.dtype, timesteps: bool) -> Workload:
        """That of a decoder on a device."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device, dtype, heads, kv_heads, config.head_dim, timesteps, capability)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim} in {dtype} on {self.device}"


@dataclass(frozen=True)
class Pass:
    """What all layers of one pass share: `width` queries per row, which are the entries behind `lengths` older ones.

    Query t of row r sees entries 0 … lengths[r] + t, which lie in slots `front` and following of a cache of `slots`
    slots, and the timestep key in slot levels[r, t] where that is in 0 … front − 1. lengths int32 [R]; levels
    int32 [R, T], or None where no query has such a key.
    """

    lengths: Tensor
    levels: Tensor | None
    width: int
    slots: int
    front: int
    scale: float

    @property
    def timed(self) -> bool:
        """Whether there are timestep keys to be seen."""
        return self.levels is not None and self.front > 0


class Backend(Protocol):
    """One way to compute attention. On CUDA neither method synchronises, so that passes can be captured."""

    name: str

    def available(self, workload: Workload) -> tuple[bool, str]:
        """Whether it can serve here, and by what or why not (with what to install, where that would help)."""
        ...

    def returns_lse(self, workload: Workload) -> bool:
        """Whether it gives the log-sum-exp, by which a timestep key is merged after it."""
        ...

    def prepare(self, workload: Workload, call: Pass) -> Attention:
        """The attention of one pass; what its layers share is computed here, once."""
        ...
