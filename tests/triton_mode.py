"""Where Triton kernels are tested: on a GPU if there is one, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: the interpreter is chosen when triton is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _let_tensors_bound_loops() -> None:
    """Triton 3.6 reads a loop bound by int(array of one element), which NumPy refuses since 2.4."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _let_tensors_bound_loops()
