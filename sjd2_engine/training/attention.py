"""Causal attention in which some queries see one key more: their noise level's timestep token (SJD2, arXiv 2510.08994).

A dense mask for that one key would cost T x T numbers and every fast kernel. Instead a flash kernel attends to the
ordinary keys and returns its log-sum-exp, and the extra key is merged in:

    lse = log(exp(lse_ordinary) + exp(s)),  w = exp(s - lse),  out = (1 - w) * out_ordinary + w * v_extra

In the backward pass the flash kernel gets the *merged* output and log-sum-exp: from them it recomputes the very
probabilities of the whole softmax, so its gradients for queries, keys and values are those of the merged attention, up
to the extra key's own terms, which are added by hand. Nothing is approximated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule import CLEAN

_HALF = (torch.float16, torch.bfloat16)
_EFFICIENT_ROWS = 32  # the memory-efficient kernel pads its log-sum-exp to multiples of this many queries
_WIDTH = 8  # CUDA kernels want head sizes that are multiples of it


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Causal attention of [B, H, T, d]: output, log-sum-exp f32 [B, H, T] (f64 for f64), what its backward needs."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse, ()
    if q.dtype in _HALF:
        out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
        cum_q, cum_k, _, _, seed, offset, _ = rest
        return out, lse, (cum_q, cum_k, seed, offset)
    out, lse, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
    return out, lse[..., : q.shape[2]], tuple(rest)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
    if q.dtype in _HALF:
        cum_q, cum_k, seed, offset = rest
        ends = (q.shape[2], k.shape[2])
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), cum_q, cum_k, *ends, 0.0, True, seed, offset, scale=scale
        )
    lse = F.pad(lse, (0, -lse.shape[-1] % _EFFICIENT_ROWS), value=float("inf")).contiguous()
    wanted = [True, True, True, False]
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, *rest, 0.0, wanted, True, scale=scale
    )
    return grads[0], grads[1], grads[2]


def _own_level(levels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """One-hot [B, 1, T, K] of each query's level; all zero for clean queries."""
    return (levels[:, None, :, None] == torch.arange(count, device=levels.device)).to(dtype)


class _Merged(torch.autograd.Function):
    """q, k, v [B, H, T, d], the steps' keys and values [B, H, K, d], levels int64 [B, T] -> [B, H, T, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, step_k: Tensor, step_v: Tensor, levels: Tensor, scale: float
    ) -> Tensor:
        out, lse, rest = _flash(q, k, v, scale)
        own = _own_level(levels, step_k.shape[2], q.dtype)
        # One score per query, in the precision of the log-sum-exp; a product with a one-hot row picks exactly.
        score = ((q * (own @ step_k)).sum(-1, dtype=lse.dtype) * scale).masked_fill(
            levels[:, None] == CLEAN, float("-inf")
        )
        merged = torch.logaddexp(lse, score)
        weight = (score - merged).exp().unsqueeze(-1)
        out = ((1 - weight) * out + weight * (own @ step_v)).to(q.dtype)
        ctx.save_for_backward(q, k, v, step_k, step_v, levels, out, merged, weight, *rest)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, step_k, step_v, levels, out, merged, weight, *rest = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = _flash_backward(grad, q, k, v, out, merged, tuple(rest), ctx.scale)
        own = _own_level(levels, step_k.shape[2], q.dtype)
        d_weight = (grad * (own @ step_v - out)).sum(-1, keepdim=True, dtype=merged.dtype)
        d_score = (weight * d_weight * ctx.scale).to(q.dtype)
        to_step = own.transpose(-1, -2)
        d_step_k = to_step @ (d_score * q)
        d_step_v = to_step @ (weight.to(grad.dtype) * grad)
        return dq + d_score * (own @ step_k), dk, dv, d_step_k, d_step_v, None, None


def timestep_attention(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, steps: int) -> Tensor:
    """Causal attention of q [B, K+T, H, d] to k and v [B, K+T, Hkv, d], the first K entries being timestep tokens.

    levels int64 [B, T]: the timestep token that each query behind them sees, -1 = none. A timestep token sees only
    itself, so its output is its own value. Rows padded on the right need no mask: no real query looks to its right.
    Returns [B, K+T, H, d] in q's dtype; differentiable in q, k and v.
    """
    group, width = q.shape[2] // k.shape[2], q.shape[3]
    scale = width**-0.5
    if q.device.type != "cpu" and width % _WIDTH:
        q, k, v = (F.pad(x, (0, -width % _WIDTH)) for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    alone = v[:, :steps, :, :width]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _Merged.apply(
        q[:, :, steps:], k[:, :, steps:], v[:, :, steps:], k[:, :, :steps], v[:, :, :steps], levels, scale
    )
    return torch.cat([alone, out.transpose(1, 2)[..., :width]], 1)
