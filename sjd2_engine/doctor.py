"""What `sjd2 doctor` finds: versions, devices, bundled models, and which backend each op uses and why."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from sjd2_kernels import dispatch, ops

from .evaluation import machine
from .models import bundled_models


def devices() -> list[dict[str, Any]]:
    """Every device torch can use, the one that "auto" takes first."""
    found: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = round(facts.total_memory / 2**30, 1)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": facts.name,
                "memory_gib": memory,
                "sm": f"{facts.major}.{facts.minor}",
            }
        )
    return [*found, {"device": "cpu", "name": machine.cpu_name(), "cores": os.cpu_count()}]


def models() -> list[dict[str, Any]]:
    """The models that come with the package, with their size on disk."""
    return [
        {"name": name, "mib": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 1)}
        for name, folder in bundled_models().items()
    ]


def examine() -> dict[str, Any]:
    """Everything there is to know, as one JSON-able document."""
    used = list(dict.fromkeys(d["device"].split(":")[0] for d in devices()))
    rows = [
        {"op": op, "device": device, "backend": backend, "why": why}
        for op in ops.NAMES
        for device in used
        for backend, why in [dispatch.choice(op, device)]
    ]
    return {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": devices(),
        "models": models(),
        "attention": {
            "backend": "sdpa",
            "why": "PyTorch's scaled_dot_product_attention: the only one so far",
        },
        "ops": rows,
    }


def show(facts: dict[str, Any]) -> None:
    """Print the document as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table("", "", show_header=False, box=None)
    for name, version in facts["versions"].items():
        about.add_row(name, version)
    about.add_row("commit", facts["commit"])
    about.add_row("platform", facts["platform"])
    about.add_row("torch threads", str(facts["threads"]))
    for device in facts["devices"]:
        extra = ", ".join(f"{v} {k}" for k, v in device.items() if k not in ("device", "name"))
        about.add_row(device["device"], f"{device['name']} ({extra})")
    for model in facts["models"]:
        about.add_row("bundled model", f"{model['name']} ({model['mib']} MiB)")
    if not facts["models"]:
        about.add_row("bundled model", "none found in the package")
    about.add_row("attention", f"{facts['attention']['backend']} ({facts['attention']['why']})")
    console.print(about)
    table = Table("op", "device", "backend", "why", title="Ops", title_justify="left")
    for row in facts["ops"]:
        table.add_row(row["op"], row["device"], row["backend"], row["why"])
    console.print(table)
