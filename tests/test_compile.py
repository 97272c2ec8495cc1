"""Every Triton kernel compiles for every GPU generation, and fits into its registers and shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sjd2_kernels import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# CUDA C++ Programming Guide, technical specifications: bytes of shared memory that one block can have.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compiled(arch: int, choose: str, cache: Path) -> list[dict[str, Any]]:
    """Rows of the report, from a process where Triton compiles: this one may be interpreting."""
    script = (
        "import json; from dataclasses import asdict; from sjd2_kernels import compile_report, compile_cases as c\n"
        f"print(json.dumps([asdict(row) for row in compile_report.report({arch}, {choose})]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(rows: list[dict[str, Any]], arch: int) -> None:
    assert rows
    spilling = [row for row in rows if row["local"] > 0]
    assert not spilling, f"values outside registers: {spilling}"
    too_large = [row for row in rows if row["shared"] > SHARED[arch]]
    assert not too_large, f"more shared memory than a block can have: {too_large}"


@pytest.mark.parametrize("arch", list(SHARED))
def test_every_case_fits(arch: int, tmp_path: Path) -> None:
    rows = compiled(arch, "c.CASES", tmp_path)
    for row in rows:
        print(row)
    check(rows, arch)
    sources = "".join(file.read_text() for file in Path(dispatch.__file__).parent.glob("*.py"))
    assert {row["kernel"] for row in rows} == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))


def test_spills_are_seen(tmp_path: Path) -> None:
    """The report itself: too few registers for a kernel show as local memory."""
    starved = "refinement.DENOISE_LONG.update(maxnreg=32) or [c.Case(c.refine, {})]"
    rows = compiled(90, f"(lambda refinement: {starved})(__import__('sjd2_kernels.refinement').refinement)", tmp_path)
    assert any(row["local"] > 0 for row in rows)
    with pytest.raises(AssertionError, match="outside registers"):
        check(rows, 90)
