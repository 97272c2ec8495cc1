"""PyTorch's own attention: its FlashAttention with used key lengths where there is one, else under a mask."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base import HALVES, Attention, Pass, Workload
from .masked import masked_attention
from .merge import merge_extra_key

# Splitting the keys pays off for few queries only; whether every release can, is not said. One split repeats, and
# what a row gets does not depend on the others.
SPLITS = 1
NEEDED = {"seqused_k", "num_splits", "enable_gqa", "return_aux", "window_size", "scale"}


class SdpaAttention:
    """`torch.nn.attention.varlen.varlen_attn` over the cache where it lies, or scaled-dot-product attention."""

    name = "sdpa"

    def available(self, workload: Workload) -> tuple[bool, str]:
        varlen, why = variable_length(workload)
        return True, why if varlen else f"scaled-dot-product attention with a mask ({why})"

    def returns_lse(self, workload: Workload) -> bool:
        return variable_length(workload)[0]

    def prepare(self, workload: Workload, call: Pass) -> Attention:
        if not variable_length(workload)[0]:
            return masked_attention(call, workload.dtype)
        return _variable_length_attention(workload, call)


def variable_length(workload: Workload) -> tuple[bool, str]:
    """Whether PyTorch's FlashAttention serves rows that use a part of their keys, and why not."""
    if workload.device.type != "cuda" or workload.capability is None:
        return False, "PyTorch's FlashAttention needs CUDA"
    if workload.capability < (8, 0):
        return False, f"PyTorch's FlashAttention needs compute capability 8.0, this is {_dotted(workload.capability)}"
    if workload.dtype not in HALVES:
        return False, "PyTorch's FlashAttention needs float16 or bfloat16"
    if workload.head_dim > 256 or workload.head_dim % 8:
        return False, f"PyTorch's FlashAttention needs heads of 8, 16 … 256 dimensions, not {workload.head_dim}"
    missing = _missing()
    if missing:
        return False, f"varlen_attn of PyTorch {torch.__version__} has no {missing}"
    return True, "PyTorch's FlashAttention with used key lengths (varlen_attn)"


@cache
def _missing() -> str:
    """Arguments that varlen_attn of this PyTorch lacks."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "such function"
    return ", ".join(sorted(NEEDED - set(inspect.signature(varlen_attn).parameters)))


def _variable_length_attention(workload: Workload, call: Pass) -> Attention:
    from torch.nn.attention import varlen

    rows, device, front = call.lengths.shape[0], call.lengths.device, call.front
    first_query = torch.arange(rows + 1, device=device, dtype=torch.int32) * call.width
    # Rows of the cache lie one behind the other; without the first `front` slots each begins at its first entry.
    first_key = (torch.arange(rows + 1, device=device, dtype=torch.int32) * call.slots).clamp(
        max=rows * call.slots - front
    )
    used = call.lengths + call.width
    levels = call.levels if call.timed else None
    aux = varlen.AuxRequest(lse=levels is not None)

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        flat_keys, flat_values = (x.flatten(0, 1)[front:] for x in (keys, values))
        found: Any = varlen.varlen_attn(
            q.flatten(0, 1), flat_keys, flat_values, first_query, first_key, call.width, call.slots - front,
            return_aux=aux, scale=call.scale, window_size=(-1, 0), enable_gqa=workload.heads != workload.kv_heads,
            seqused_k=used, num_splits=SPLITS,
        )  # fmt: skip
        if levels is None:
            return found.view(q.shape)
        out, lse = found
        lse = lse.view(workload.heads, rows, call.width).permute(1, 2, 0)
        return merge_extra_key(out.view(q.shape), lse, q, keys[:, :front], values[:, :front], levels, call.scale)

    return attend


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
