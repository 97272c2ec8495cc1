"""What a kernel may assume of a tensor; where it does not hold, the reference serves the call."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import NotSupported

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def expect(
    name: str, tensor: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], *shape: int, strided: bool = False
) -> None:
    """Raise NotSupported unless `tensor` has this dtype (or one of these), this shape, and is contiguous."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise NotSupported(f"{name} is {tensor.dtype}: expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise NotSupported(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if not strided and not tensor.is_contiguous():
        raise NotSupported(f"{name} has strides {tensor.stride()}: expected a contiguous tensor")
