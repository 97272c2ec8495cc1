"""Is everything right and fast on this GPU? Checks every op against the reference, then times it.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py [--out FILE] [--tests] [--no-times]

Prints a table; the last line of stdout is one JSON document. Exit status: 0 fine, 1 a check failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import Check, run_checks
from benchmarks.gpu.timing import Bench, copy_rate, graph_seconds, step_seconds, time_ops

ROOT = Path(__file__).resolve().parents[1]
TESTS = (["-m", "gpu", "tests"], ["tests/test_triton_*.py"])  # the latter run on the GPU where there is one


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    parser.add_argument("--tests", action="store_true", help="run the tests marked gpu and the Triton tests, too")
    parser.add_argument("--no-times", action="store_true", help="check only")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch sees none on this machine", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    bench = Bench(device, graph_seconds, torch.compile, properties.L2_cache_size)
    document = report(bench, run_checks(device), not options.no_times)
    document["tests_passed"] = run_tests() if options.tests else None
    write(document, options.out)
    return 0 if document["passed"] and document["tests_passed"] is not False else 1


def report(bench: Bench, results: Iterable[Check], timed: bool = True, **sizes: Any) -> dict[str, Any]:
    """The JSON document; prints the tables on the way. `sizes`: of the copy, the ops and the step, for tests."""
    began = time.monotonic()
    checks = printed(results)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor(),
        "versions": versions(),
        "commit": commit(),
        "passed": all(check.passed for check in checks),
        "checks": [vars(check) for check in checks],
        "copy_gb_s": None,
        "ops": [],
        "step_us": None,
    }
    if timed:
        rate = copy_rate(bench, **sizes.get("copy", {}))
        document["copy_gb_s"] = rate / 1e9
        document["ops"] = time_ops(bench, rate, **sizes.get("ops", {}))
        for entry in document["ops"]:
            same = [c for c in checks if (c.op, c.dtype) == (entry["name"], entry["dtype"])]
            entry["max_err"] = max(c.max_error for c in same) if same else None
        document["step_us"] = step_seconds(bench, **sizes.get("step", {})) * 1e6
        print_times(document)
    document["seconds"] = round(time.monotonic() - began, 1)
    return document


def printed(results: Iterable[Check]) -> list[Check]:
    """All of them, each printed as it comes."""
    print(f"{'op':20} {'dtype':9} {'max error':>9} {'of allowed':>10} {'ties':>4}  result")
    checks = []
    for check in results:
        result = "ok" if check.passed else f"FAILED: {check.reason}"
        numbers = f"{check.max_error:9.2g} {check.error:10.0%} {check.ties:4}"
        print(f"{check.op:20} {check.dtype:9} {numbers}  {result}", flush=True)
        checks.append(check)
    return checks


def print_times(document: dict[str, Any]) -> None:
    print(f"\ncopy: {document['copy_gb_s']:.0f} GB/s")
    print(f"{'op':20} {'us':>8} {'GB/s':>6} {'of copy':>7} {'vs compile':>10} {'vs flash':>8}  shape")
    for entry in document["ops"]:
        cells = (
            f"{entry['gb_s']:6.0f} {entry['share_of_copy']:7.0%}" if entry["gb_s"] else f"{'–':>6} {'–':>7}",
            f"{entry['speedup_vs_compile']:10.2f}" if entry["speedup_vs_compile"] else f"{'–':>10}",
            f"{entry['speedup_vs_flash']:8.2f}" if entry.get("speedup_vs_flash") else f"{'–':>8}",
        )
        print(f"{entry['name']:20} {entry['us']:8.1f} {' '.join(cells)}  {entry['shape']}")
    print(f"\none step without the model: {document['step_us']:.1f} us")


def versions() -> dict[str, str]:
    import triton

    return {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }  # fmt: skip


def commit() -> str | None:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def run_tests() -> bool:
    """Whether pytest passes; it prints to this process' stdout."""
    sys.stdout.flush()
    passed = True
    for arguments in TESTS:
        paths = [str(path) for arg in arguments for path in (sorted(ROOT.glob(arg)) if "*" in arg else [arg])]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        passed &= subprocess.run(command, cwd=ROOT).returncode == 0
    return passed


def write(document: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(document)
    if out:
        out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    raise SystemExit(main())
