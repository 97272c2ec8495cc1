"""Buffers that show what a kernel forgot to write, and what it wrote beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MARGIN = 64  # cells on either side; a multiple of any alignment a kernel is specialised on
_EMPTY = torch.empty


class Guards:
    """Hands out tensors inside larger buffers, and checks the cells around them."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A tensor full of poison: NaN, or −77 for integers."""
        size = torch.Size(shape).numel()
        buffer = _EMPTY(size + 2 * MARGIN, dtype=dtype, device=device).fill_(_poison(dtype))
        self._buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, guarded."""
        return self.empty(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        for buffer in self._buffers:
            margins = torch.cat((buffer[:MARGIN], buffer[-MARGIN:]))
            intact = margins.isnan() if margins.is_floating_point() else margins == _poison(buffer.dtype)
            assert bool(intact.all()), "the kernel wrote outside its buffer"


def guarded_call(monkeypatch: pytest.MonkeyPatch, op: Callable[..., Tensor], *args: object) -> Tensor:
    """The output of `op`, allocated by torch.empty with poison inside and guards around."""
    guards = Guards()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(shape, dtype, device))
        out = op(*args)
    guards.check()
    assert len(guards._buffers) == 1
    return out


def _poison(dtype: torch.dtype) -> float:
    if dtype is torch.bool:
        return True
    return torch.nan if dtype.is_floating_point else -77
