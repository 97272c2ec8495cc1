"""Matrix products of a loaded model on the CPU: oneDNN with weights packed once.

For the 8 to 128 rows of a window oneDNN's kernels are about twice as fast as PyTorch's default BLAS on the processors
measured (docs/performance.md), and as fast for the two rows of plain AR; packing saves a re-ordering per call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`nn.Linear` whose float32 weight [out, in] is kept in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # No buffer: the layout has no storage that could be moved, saved or cast.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch has oneDNN and the weight is a plain one, no quantised, of float32 on the CPU."""
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype == torch.float32
    return bool(available) and weight.device.type == "cpu" and plain


def pack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` that can be packed, in place; for inference only."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))
