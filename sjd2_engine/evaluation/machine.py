"""What a measurement was made with: versions, device, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "transformers")


def version_of(package: str) -> str | None:
    """A distribution's installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of everything that can move a number."""
    found = {name: version_of(name) for name in PACKAGES}
    own = version_of("sjd2-engine") or "source tree"
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {
        "sjd2-engine": own,
        "python": platform.python_version(),
        **{k: v for k, v in found.items() if v},
        **cuda,
    }


def commit() -> str:
    """The source tree's commit, marked `+` when files differ from it; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be someone else's
        return "unknown"
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10)
        return answer.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def reset_peak_memory() -> None:
    """Start counting the process's peak memory afresh; where the system cannot, it stays the peak so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device | str) -> str:
    """The device for people: a GPU's name, or the processor with the threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU {cpu_name()} ({threads} of {os.cpu_count()} threads)"
    return str(device)
