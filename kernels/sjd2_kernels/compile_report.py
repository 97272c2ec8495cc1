"""What the compiler makes of every Triton kernel, for several GPUs, without a GPU.

`python -m sjd2_kernels.compile_report` prints a table, and fails if a kernel keeps values outside its registers or
asks for more shared memory than a block can have. The wrappers are called with tensors that have no memory;
Triton binds and compiles each launch as it would on the GPU, and the launch itself is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import dispatch
from .compile_cases import CASES, Case

# Shared memory that a block can have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Row:
    """One compiled kernel: local = bytes of stack and spilled registers per thread, shared = bytes per block."""

    arch: int
    op: str
    case: str
    kernel: str
    registers: int
    local: int
    shared: int
    num_warps: int
    num_stages: int


class _Driver:
    """Stands for a GPU of one architecture."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def _compiling(arch: int, compiled: list[Any]) -> Iterator[None]:
    """Let launches only compile, for `arch`; what they compile is added to `compiled`."""

    def launcher(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_LIMITS[arch])
    config = triton.runtime.driver
    previous, config._active = config._active, _Driver(arch)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with (
            patch.object(JITFunction, "__getitem__", launcher),
            patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        ):
            yield
    finally:
        config._active = previous


def report(arch: int, cases: Iterable[Case] = CASES) -> list[Row]:
    """Compile the kernels of `cases` for one architecture (80, 89, 90 or 100): a row for each distinct one.

    Raises RuntimeError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    rows, seen = [], set()
    for case in cases:
        compiled: list[Any] = []
        with _compiling(arch, compiled):
            dispatch.implementation("triton", case.op)(*case.arguments())
        for kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                rows.append(_row(arch, case, kernel))
    return rows


def _row(arch: int, case: Case, kernel: Any) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    meta = kernel.metadata
    return Row(
        arch, case.op, case.name, meta.name, registers, stack + local, meta.shared, meta.num_warps, meta.num_stages
    )


def main() -> int:
    """Print the table of every case and architecture; 1 if a kernel does not fit, else 0."""
    fits = True
    for arch, limit in SHARED_LIMITS.items():
        print(f"{'arch':>6} {'registers':>9} {'local':>6} {'shared':>7} {'warps':>5} {'stages':>6}  kernel: case")
        for row in report(arch):
            good = row.local == 0 and row.shared <= limit
            fits = fits and good
            print(
                f"sm_{arch:<3} {row.registers:9} {row.local:6} {row.shared:7} {row.num_warps:5} {row.num_stages:6}  "
                f"{row.kernel}: {row.op} {row.case}{'' if good else '  <- does not fit'}"
            )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
