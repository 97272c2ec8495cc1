"""The flash-attn library, version 3 on Hopper where it is installed, else version 2: optional, `[flash]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from .base import HALVES, Attention, Pass, Workload
from .merge import merge_extra_key

# The library's own choice of splits depends on the batch and the device. For windows a constant, so that runs repeat;
# 4 gives 2 rows of 32 heads a program for each multiprocessor. No GPU has been asked whether another is better.
SPLITS = 4
LONGEST_SPLIT = 128  # more queries than this fill the device without splitting the keys
HOPPER = 9


class FlashAttention:
    """`flash_attn_with_kvcache` on the cache behind the timestep slots, whose keys are merged afterwards."""

    name = "flash"

    def available(self, workload: Workload) -> tuple[bool, str]:
        if workload.device.type != "cuda" or workload.capability is None:
            return False, "flash-attn needs CUDA"
        major, minor = workload.capability
        if major < 8:
            return False, f"flash-attn needs compute capability 8.0, this is {major}.{minor}"
        if workload.dtype not in HALVES:
            return False, "flash-attn needs float16 or bfloat16"
        if workload.head_dim > 256 or workload.head_dim % 8:
            return False, f"flash-attn needs heads of 8, 16 … 256 dimensions, not {workload.head_dim}"
        found = find(major)
        return (False, found) if isinstance(found, str) else (True, f"flash-attn {found[1]}")

    def returns_lse(self, workload: Workload) -> bool:
        return True

    def version(self, workload: Workload) -> int:
        """Major version of the library that would serve, 0 where none can."""
        if not self.available(workload)[0] or workload.capability is None:
            return 0
        found = find(workload.capability[0])
        return 0 if isinstance(found, str) else found[1]

    def prepare(self, workload: Workload, call: Pass) -> Attention:
        found = find(workload.capability[0] if workload.capability else 0)
        if isinstance(found, str):
            raise ImportError(found)
        kernel, used, front = found[0], call.lengths + call.width, call.front
        levels = call.levels if call.timed else None
        options = {
            "cache_seqlens": used,
            "softmax_scale": call.scale,
            "causal": True,
            "num_splits": SPLITS if call.width <= LONGEST_SPLIT else 1,
            "return_softmax_lse": levels is not None,
        }

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            result = kernel(q, keys[:, front:], values[:, front:], **options)
            if levels is None:
                return result
            out, lse, *_ = result  # lse [R, H, T]; version 3 may add more
            return merge_extra_key(out, lse.transpose(1, 2), q, keys[:, :front], values[:, :front], levels, call.scale)

        return attend


@cache
def find(major: int) -> tuple[Callable[..., Any], int] | str:
    """The library's function and version for GPUs of that major compute capability, or why there is none."""
    if major == HOPPER:
        try:
            from flash_attn_interface import flash_attn_with_kvcache

            return flash_attn_with_kvcache, 3
        except ImportError:
            pass  # version 2 runs on Hopper too
    try:
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache, 2
    except ImportError as error:
        # A wheel built for another PyTorch fails here as well; its message says which symbol is missing.
        return f"flash-attn cannot be imported ({error}): pip install 'sjd2-engine[flash]'"
