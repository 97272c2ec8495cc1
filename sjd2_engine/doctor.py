"""What `sjd2 doctor` finds: versions, devices, bundled models, and which backend each op uses and why."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any

import torch

from sjd2_kernels import dispatch, ops
from sjd2_kernels.build import find_compiler

from .attention import Workload, survey
from .config import DECODERS, DecodeConfig
from .engine import DTYPES
from .errors import BackendError, ConfigError
from .evaluation import machine
from .memory import decode_memory, parameters
from .models import LoadOptions, bundled_models, describe_model
from .quantize import KINDS, check_quantize


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
        "attention": [row for device in used for row in _attention(torch.device(device))],
        "options": [row for device in used for row in _options(torch.device(device))],
        "ops": rows,
    }


def _attention(device: torch.device) -> list[dict[str, Any]]:
    """Every attention backend for heads of 128 dimensions in the device's usual dtype."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    workload = Workload(device, dtype, heads=32, kv_heads=8, head_dim=128, capability=capability)
    return [{"device": device.type, **row} for row in survey(workload)]


def _options(device: torch.device) -> list[dict[str, Any]]:
    """What else an engine can be loaded with, and whether it works here."""
    triton, compiler = machine.version_of("triton"), find_compiler()
    if device.type == "cuda":
        found = [("compile", triton is not None, f"triton: {triton or 'not installed'}")]
    else:
        found = [("compile", compiler is not None, f"C++ compiler: {' '.join(compiler or ['none found'])}")]
    for kind in KINDS:
        try:
            check_quantize(kind, device)
            found.append((f"quantize={kind}", True, f"torchao {machine.version_of('torchao')}"))
        except BackendError as error:
            found.append((f"quantize={kind}", False, str(error)))
    return [{"device": device.type, "option": name, "available": able, "why": why} for name, able, why in found]


def examine_model(name: str, options: LoadOptions, dtype: str = "auto", batch: int = 1) -> dict[str, Any]:
    """What a model is and how much memory decoding it takes, without reading its weights.

    Raises CheckpointError for what is unknown, missing or damaged, ConfigError for an unknown dtype.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected 'auto' or one of {', '.join(DTYPES)}")
    facts = describe_model(name, options)
    sizes, (height, width) = facts.transformer, facts.image_size
    memory = {}
    for decoder in DECODERS:
        config = DecodeConfig.build(facts.defaults, decoder=decoder)
        need = decode_memory(facts, config, DTYPES[dtype], batch, device)
        memory[decoder] = {"window": config.width, **asdict(need), "total": need.total}
    return {
        "model": name,
        "family": facts.family,
        "parameters": parameters(facts),
        "layers": sizes.num_hidden_layers,
        "hidden_size": sizes.hidden_size,
        "heads": f"{sizes.num_attention_heads} ({sizes.num_key_value_heads} for keys and values)",
        "image_size": f"{height}x{width} px (height x width)",
        "tokens": f"{len(facts.layout)} ({facts.layout.image_count} free), codebook {facts.image_vocabulary}",
        "tuned_for_sjd2": facts.noise is not None,
        "dtype": dtype,
        "batch": batch,
        "memory_bytes": memory,
    }


def show_model(facts: dict[str, Any]) -> None:
    """Print what `examine_model` found as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table("", "", show_header=False, box=None)
    for name, value in facts.items():
        if name != "memory_bytes":
            about.add_row(name.replace("_", " "), f"{value:,}" if name == "parameters" else str(value))
    console.print(about)
    title = f"Memory of a decode in MiB, {facts['batch']} picture(s), {facts['dtype']}"
    columns = ("weights", "cache", "window_state", "one_pass", "total")
    table = Table("decoder", "window", *(c.replace("_", " ") for c in columns), title=title, title_justify="left")
    for decoder, need in facts["memory_bytes"].items():
        table.add_row(decoder, str(need["window"]), *(f"{need[c] / 2**20:,.1f}" for c in columns))
    console.print(table)


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
    console.print(about)
    table = Table("attention", "device", "available", "why", 'taken by "auto"', title="Attention", title_justify="left")
    for row in facts["attention"]:
        table.add_row(row["backend"], row["device"], _yes(row["available"]), row["why"], row["auto"])
    console.print(table)
    table = Table("option", "device", "available", "why", title="Options", title_justify="left")
    for row in facts["options"]:
        table.add_row(row["option"], row["device"], _yes(row["available"]), row["why"])
    console.print(table)
    table = Table("op", "device", "backend", "why", title="Ops", title_justify="left")
    for row in facts["ops"]:
        table.add_row(row["op"], row["device"], row["backend"], row["why"])
    console.print(table)


def _yes(available: bool) -> str:
    return "yes" if available else "no"
