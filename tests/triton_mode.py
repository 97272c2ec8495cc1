"""Where Triton kernels are tested: on a GPU if there is one, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: the interpreter is chosen when triton is loaded.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
