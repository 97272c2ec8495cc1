"""This project's `window_attention` op: split keys, and each query's timestep key in the same kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2_kernels import dispatch

from .base import HALVES, Attention, Pass, Workload


class TritonAttention:
    """`torch.ops.sjd2.window_attention`."""

    name = "triton"

    def available(self, workload: Workload) -> tuple[bool, str]:
        device = workload.device.type
        if device != "cuda" and dispatch.preferred(device) != "triton":
            return False, "the kernel needs CUDA (on the CPU it runs in Triton's interpreter, for tests)"
        backend, why = dispatch.choice("window_attention", device)
        if backend != "triton":
            return False, why
        if workload.dtype not in (torch.float32, *HALVES):
            return False, f"the kernel knows float32, float16 and bfloat16, not {workload.dtype}"
        from sjd2_kernels.attention import LARGEST_HEAD

        if workload.head_dim > LARGEST_HEAD or workload.heads % workload.kv_heads:
            return False, f"the kernel takes heads of at most {LARGEST_HEAD} dimensions, in whole groups"
        return True, "split keys, timestep keys in the same kernel"

    def returns_lse(self, workload: Workload) -> bool:
        return False

    def prepare(self, workload: Workload, call: Pass) -> Attention:
        levels = call.levels if call.timed else None

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return torch.ops.sjd2.window_attention(
                q.contiguous(), keys, values, call.lengths, levels, call.front, call.scale
            )

        return attend
