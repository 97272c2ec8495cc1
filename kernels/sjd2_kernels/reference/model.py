"""The meaning of the transformer's ops, in plain PyTorch on any device; sums in float32, rounded once at the end.

R rows of the cache (conditional first, then unconditional), T queries per row, H heads sharing Hkv key/value
heads, d dimensions per head, S slots per row. A row's cache is `front` timestep slots, one per noise level, then
its tokens: query t of row r stands at position lengths[r] + t and lies in slot front + lengths[r] + t.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is done to queries and keys before the rotation (`norm`).
NO_NORM = 0
RMS_NORM = 1  # over each head's dimensions
LAYER_NORM = 2  # likewise, with mean and bias (Chameleon)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """x / rms(x) · weight over the last dimension, in x's dtype; x [..., D], weight [D].

    With `residual` [..., D] it becomes residual + x (in place, rounded to its dtype) and that sum is normalised.
    """
    wide = x.float()
    if residual is not None:
        residual += x
        wide = residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [..., 2F] = (gate, up): [..., F] in its dtype."""
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def qk_norm_rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    eps: float,
    front: int,
) -> Tensor:
    """Normalise and rotate queries and keys, write keys and values behind each row's valid entries (in place).

    qkv [R, T, H + 2·Hkv, d]; cos, sin f32 [positions, d] with the sign of rotate-half folded into `sin`; lengths
    i32 [R]; keys, values [R, S, Hkv, d] with S ≥ front + lengths + T. Weights and biases [heads, d] or [1, d], as
    `norm` asks for. Returns the queries [R, T, H, d].
    """
    rows, width = qkv.shape[:2]
    kv_heads = keys.shape[2]
    heads = qkv.shape[2] - 2 * kv_heads
    positions = lengths[:, None].long() + torch.arange(width, device=qkv.device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    table = cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    q = _rotated(_normed(q.float(), q_weight, q_bias, norm, eps), *table).to(qkv.dtype)
    k = _rotated(_normed(k.float(), k_weight, k_bias, norm, eps), *table)
    row = torch.arange(rows, device=qkv.device)[:, None]
    keys[row, front + positions] = k.to(keys.dtype)
    values[row, front + positions] = v.to(values.dtype)
    return q


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, levels: Tensor | None, front: int, scale: float
) -> Tensor:
    """Causal attention of a window's queries to a static cache that already holds their own keys: [R, T, H, d].

    q [R, T, H, d]; keys, values [R, S, Hkv, d], H a multiple of Hkv; lengths i32 [R], the entries before the
    window: query t sees the first lengths[r] + t + 1 of them. levels i32 [R, T]: a query with a level ≥ 0 also sees
    the timestep slot of that level (SJD2, arXiv 2510.08994); None or −1 = none. Slots not seen may hold anything.
    """
    heads, kv_heads, width, slots = q.shape[2], keys.shape[2], q.shape[1], keys.shape[1]
    slot = torch.arange(slots, device=q.device)
    last = front + lengths[:, None, None] + torch.arange(width, device=q.device)[:, None]
    seen = (slot >= front) & (slot <= last)
    if levels is not None:
        seen = seen | (slot < front) & (slot == levels.unsqueeze(-1))
    # Unseen slots may hold NaN or infinities: they must not reach a product.
    valid = seen.any(1)[:, :, None, None]
    keys, values = (x.float().masked_fill(~valid, 0.0).repeat_interleave(heads // kv_heads, 2) for x in (keys, values))
    scores = torch.einsum("rthd,rshd->rhts", q.float(), keys) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhts,rshd->rthd", weights, values).to(q.dtype).contiguous()


def kv_compact(keys: Tensor, values: Tensor, lengths: Tensor, source: Tensor, counts: Tensor, front: int) -> None:
    """Move scattered entries behind the valid ones together (in place), as after accepting a branch of a draft tree.

    keys, values [layers, R, S, Hkv, d] with S ≥ front + lengths + M; lengths, counts i32 [R]; source i32 [R, M] with
    j ≤ source[r, j] and rising along j < counts[r]: entry lengths[r] + source[r, j] moves to lengths[r] + j.
    """
    rows, longest = source.shape
    j = torch.arange(longest, device=source.device)
    origin = torch.where(j < counts[:, None], source, j)
    row = torch.arange(rows, device=source.device)[:, None]
    begin = front + lengths[:, None].long()
    for cache in (keys, values):
        cache[:, row, begin + j] = cache[:, row, begin + origin]


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: int, eps: float) -> Tensor:
    if norm == LAYER_NORM:
        x = x - x.mean(-1, keepdim=True)
    if norm != NO_NORM:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.float()
    return x if bias is None else x + bias.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
