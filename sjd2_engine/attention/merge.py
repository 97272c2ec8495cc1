"""One more key per query, added to attention that has been computed without it."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_extra_key(
    out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, levels: Tensor, scale: float
) -> Tensor:
    """Attention [R, T, H, d] over the keys of `out` and, for each query, one of K more.

    out, q [R, T, H, d]; lse float32 [R, T, H], natural logarithm of the sum of exponentials behind `out`; keys and
    values [R, K, Hkv, d]; levels int [R, T], the one that a query sees, none where outside 0 … K − 1. In float32.
    """
    count, kv_heads = keys.shape[1:3]
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    chosen = levels.clamp(0, count - 1)
    key, value = (x[rows, chosen].unsqueeze(3).float() for x in (keys, values))  # [R, T, Hkv, 1, d]
    unseen = (levels != chosen)[..., None]
    logit = (q.unflatten(2, (kv_heads, -1)).float() * key).sum(-1).flatten(2) * scale
    logit = logit.masked_fill(unseen, float("-inf"))
    # One exponential decides both weights: that of the extra key, and what is left for the others.
    weight = torch.sigmoid(logit - lse)[..., None]
    merged = out.float().lerp(value.expand(-1, -1, -1, q.shape[2] // kv_heads, -1).flatten(2, 3), weight)
    return merged.to(out.dtype)
