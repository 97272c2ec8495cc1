"""How far a kernel may be from the exact result: no magic numbers, as far as plain PyTorch is in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_close_as_plain(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error of `got` at most twice that of `plain` (both in one dtype) and two roundings; `exact` is float64."""
    assert got.dtype == plain.dtype and exact.dtype == torch.float64
    assert got.shape == plain.shape == exact.shape
    assert bool(got.isfinite().all())
    rounding = ((plain + 0.3 - 0.3) - plain).abs().max().double()
    allowed = 2 * (plain.double() - exact).abs().max() + 2 * rounding
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
