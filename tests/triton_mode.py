"""Where Triton kernels are tested: on a GPU if there is one, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: the interpreter is chosen when triton is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _mend_interpreter() -> None:
    """Where the interpreter of Triton 3.6 differs from a GPU.

    It reads a loop bound by int(array of one element), which NumPy refuses since 2.4; it cuts float32 off to bfloat16
    instead of rounding it; and it multiplies the bit patterns of bfloat16 matrices.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert, dot = (
        interpreter._patch_lang_tensor,
        interpreter._convert_float,
        interpreter.InterpreterBuilder.create_dot,
    )

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_to_nearest(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)  # ties to even
        return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)

    def wide(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def wide_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return dot(self, wide(a), wide(b), d, input_precision, max_num_imprecise_acc)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter._convert_float = convert_to_nearest
    interpreter.InterpreterBuilder.create_dot = wide_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _mend_interpreter()
