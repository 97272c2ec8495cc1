"""Plain attention with an additive mask: the fastest there is on a CPU, and the last resort elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Attention, Pass, Workload


class CpuAttention:
    """PyTorch's scaled-dot-product attention over the part of the cache that is filled."""

    name = "cpu"

    def available(self, workload: Workload) -> tuple[bool, str]:
        if workload.device.type != "cpu":
            return False, "reads the lengths on the host, which stops a GPU at every pass"
        return True, "PyTorch's scaled-dot-product attention with a mask"

    def returns_lse(self, workload: Workload) -> bool:
        return False

    def prepare(self, workload: Workload, call: Pass) -> Attention:
        return masked_attention(call, workload.dtype)


def masked_attention(call: Pass, dtype: torch.dtype) -> Attention:
    """Attention under a dense mask in `dtype`, [R, 1, T, front + entries]."""
    device = call.lengths.device
    positions = call.lengths[:, None] + torch.arange(call.width, device=device)
    # On the CPU reading a number costs nothing, and a short cache is read faster than a masked long one.
    on_host = device.type == "cpu"
    depth = int(call.lengths.max()) + call.width if on_host else call.slots - call.front
    hidden = torch.arange(depth, device=device) > positions[:, :, None]
    if call.front:
        own = torch.arange(call.front, device=device)
        blind = torch.ones_like(own, dtype=torch.bool).expand(*positions.shape, -1)
        other = blind if call.levels is None else call.levels[:, :, None] != own
        hidden = torch.cat([other, hidden], 2)
    mask = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None]
    end = call.front + depth

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = q.shape[2] != keys.shape[2]
        q, keys, values = (x.transpose(1, 2) for x in (q, keys[:, :end], values[:, :end]))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=call.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend
