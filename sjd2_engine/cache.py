"""Static key/value cache: one length per row, rollback by moving lengths, timestep keys in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Pass, Workload, choose
from .fused import can_fuse, fused_forward
from .transformer import Transformer, TransformerConfig


def cache_bytes(config: TransformerConfig, rows: int, capacity: int, levels: int, dtype: torch.dtype) -> int:
    """Memory of a StaticCache of that size."""
    per_slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return rows * (levels + capacity) * per_slot


class StaticCache:
    """Keys and values [layers, R, S, Hkv, d] allocated once; `lengths` int32 [R] says how many of a row are valid.

    Entries beyond a row's length are stale: never attended to, overwritten by the next pass. To roll back is
    to leave `lengths` where they are. The first `levels` slots hold the timestep keys, one per noise level:
    each noisy query sees the one of its own level, clean queries see none (SJD2, arXiv 2510.08994).

    `fused` says whether passes run on the fused ops: where those are kernels (CUDA) and cover the decoder; a compiled
    model never does. `attention` is the name of a backend (`sjd2_engine.attention`), "auto" the best that is there.

    An entry's position for rotation is its place among the row's entries, plus the row's entry of `offsets` int32
    [R] where that is not None: for prompts that end, instead of begin, at a fixed position.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        capacity: int,
        levels: int,
        device: torch.device,
        dtype: torch.dtype,
        offsets: Sequence[int] | None = None,
        attention: str = "auto",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            rows,
            levels + capacity,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.int32)
        self.offsets = None if offsets is None else torch.tensor(offsets, device=device, dtype=torch.int32)
        self.levels, self.capacity = levels, capacity
        self.fused = device.type == "cuda" and can_fuse(config) and offsets is None
        self.scale = config.head_dim**-0.5
        self.workload = Workload.of(config, device, dtype, levels > 0)
        self.backend, _ = choose(attention, self.workload)

    def adopt(self, other: StaticCache, rows: Sequence[int], length: int) -> None:
        """Copy the first `length` entries of another cache's rows into `rows` of this one; lengths do not move."""
        index = torch.tensor(rows, device=self.keys.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, index, self.levels : self.levels + length] = theirs[:, :, other.levels : other.levels + length]

    def write_timesteps(self, model: Transformer, encodings: Tensor) -> None:
        """Fill the timestep slots; encodings [K, D]. Such a token sees only itself and stands at position 0,
        so its keys and values are constants of the weights."""

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, :, : self.levels] = k
            self.values[layer, :, : self.levels] = v
            return v.repeat_interleave(q.shape[2] // v.shape[2], 2)  # softmax over a single key

        embeds = encodings[None].to(self.keys.dtype)
        model(embeds, torch.zeros(self.levels, dtype=torch.int64, device=embeds.device), keep)

    def forward(self, model: Transformer, embeds: Tensor, levels: Tensor | None = None) -> Tensor:
        """Hidden states [R, T, D] of embeds [R, T, D], appended behind each row's valid entries.

        levels int32 [R, T]: noise level of each input, -1 = clean; None = all clean. `lengths` do not move.
        """
        rows, width = embeds.shape[:2]
        total = self.keys.shape[2]
        call = Pass(self.lengths, levels, width, total, self.levels, self.scale)
        attention = self.backend.prepare(self.workload, call)
        if self.fused and not model.compiled:
            return fused_forward(model, embeds, self.keys, self.values, self.lengths, self.levels, attention)
        positions = self.lengths[:, None] + torch.arange(width, device=embeds.device)
        target = torch.arange(0, rows * total, total, device=embeds.device)[:, None] + self.levels + positions
        target = target.flatten().long()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.view(-1, *k.shape[2:]).index_copy_(0, target, k.flatten(0, 1))
            values.view(-1, *v.shape[2:]).index_copy_(0, target, v.flatten(0, 1))
            return attention(q, keys, values)

        rotary = positions if self.offsets is None else positions + self.offsets[:, None]
        return model(embeds, rotary, attend)
