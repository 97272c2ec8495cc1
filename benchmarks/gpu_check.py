"""Is everything right and fast on this GPU? Checks every op against the reference, runs the GPU tests, times the ops.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py [--out FILE] [--tests] [--no-times] [--budget SECONDS]

The first thing to run on a new kind of GPU; benchmarks/decode_gpu.py comes next. Prints tables; the last line of stdout
is one JSON document, which --out holds as well, from the first results on. Exit status: 0 fine, 1 a check or test
failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import Check, run_checks
from benchmarks.gpu.document import dump, write
from benchmarks.gpu.timing import Bench, copy_rate, graph_seconds, step_seconds, time_ops
from sjd2_engine.evaluation.machine import commit, device_name, versions

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 500  # seconds; a command of nine minutes has room for the start
NEXT = (
    "steps --models lumina-mgpt-7b", "steps --models emu3-8b", "steps --models janus-pro-7b",
    "steps --models janus-pro-1b", "profile", "transformers", "scenes", "sync",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU and those of the kernels")
    parser.add_argument("--no-times", action="store_true", help="check only")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for --tests to end in ({BUDGET})")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch sees none on this machine", file=sys.stderr)
        return 2
    device, deadline = torch.device("cuda"), time.monotonic() + options.budget
    bench = Bench(device, graph_seconds, torch.compile, torch.cuda.get_device_properties(device).L2_cache_size)
    document: dict[str, Any] = {}

    def save() -> None:
        if options.out:
            dump(document, options.out)

    tests = (lambda: run_tests(deadline)) if options.tests else None
    report(bench, run_checks(device), not options.no_times, tests, document, save)
    point_to_next()
    write(document, options.out)
    return 0 if document["passed"] else 1


def report(
    bench: Bench,
    results: Iterable[Check],
    timed: bool = True,
    tests: Callable[[], list[dict[str, Any]]] | None = None,
    document: dict[str, Any] | None = None,
    save: Callable[[], None] = lambda: None,
    **sizes: Any,
) -> dict[str, Any]:
    """Fill the JSON document, correctness first; prints the tables on the way.

    `sizes`: of the copy, the ops and the step, for tests.
    """
    began = time.monotonic()
    document = {} if document is None else document
    checks = printed(results)
    document.update({
        "device": device_name(bench.device), "versions": versions(), "commit": commit(),
        "passed": all(check.passed for check in checks), "checks": [vars(check) for check in checks], "tests": None,
        "copy_gb_s": None, "ops": [], "step_us": None,
    })  # fmt: skip
    save()
    if tests is not None:
        document["tests"] = tests()
        document["passed"] &= all(group["passed"] for group in document["tests"])
        save()
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


def test_groups() -> dict[str, list[str]]:
    """pytest's arguments for each group; what is asked of the engine comes first.

    The Triton tests are not marked: they run on the GPU where there is one, and in the interpreter elsewhere.
    """
    engine, kernels = ROOT / "tests" / "test_gpu_engine.py", sorted(ROOT.glob("tests/test_triton_*.py"))
    # By name, so that a machine needs no more installed than these files import.
    marked = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    others = [path for path in marked if path != engine and path not in kernels]
    # Kernels are compiled on the way: by as many processes as there are files.
    spread = ["-n", str(len(kernels)), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    return {
        "the engine on a GPU": [str(engine)],
        "what else needs a GPU": ["-m", "gpu", *map(str, others)],
        "the kernels": [*spread, *map(str, kernels)],
    }


def run_tests(deadline: float) -> list[dict[str, Any]]:
    """What pytest says of each group, as far as there is time; it prints to this process' stdout."""
    found = []
    for name, arguments in test_groups().items():
        began = time.monotonic()
        print(f"\ntests: {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=max(1.0, deadline - began)).returncode
            result = "passed" if status == 0 else f"pytest ended with status {status}"
        except subprocess.TimeoutExpired:
            result = "no time left"
        seconds = round(time.monotonic() - began, 1)
        found.append({"name": name, "passed": result == "passed", "result": result, "seconds": seconds})
        print(f"tests: {name}: {result}", flush=True)
    return found


def point_to_next() -> None:
    """How fast decoding is comes after whether the ops are right."""
    print("\nNext, each within nine minutes:")
    for arguments in NEXT:
        print(f"  PYTHONPATH=.:kernels python benchmarks/decode_gpu.py {arguments} --out FILE")


if __name__ == "__main__":
    raise SystemExit(main())
