"""Attention of a few queries to a long cache, by PyTorch's scaled-dot-product kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention, q [R, T, H, d] to keys and values [R, S, Hkv, d]; additive mask [R, 1, T, S] in q's dtype."""
    grouped = q.shape[2] != keys.shape[2]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
