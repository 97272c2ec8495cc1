"""Attention of a few queries to a long static cache, behind one interface: which backend serves, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import BackendError, ConfigError
from .base import Attention, Backend, Pass, Workload
from .flash import FlashAttention
from .masked import CpuAttention
from .merge import merge_extra_key
from .sdpa import SdpaAttention
from .triton import TritonAttention

FLASH = FlashAttention()
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonAttention(), FLASH, SdpaAttention(), CpuAttention())
}


def check_name(wanted: str) -> None:
    """Raises ConfigError unless `wanted` is "auto" or a backend's name."""
    if wanted != "auto" and wanted not in BACKENDS:
        raise ConfigError(f"attention={wanted!r}: expected 'auto' or one of {', '.join(BACKENDS)}")


def choose(wanted: str, workload: Workload) -> tuple[Backend, str]:
    """The backend asked for, or with "auto" the one expected to be fastest, and why.

    Raises ConfigError for an unknown name, BackendError where the one asked for cannot serve.
    """
    check_name(wanted)
    if wanted != "auto":
        able, why = BACKENDS[wanted].available(workload)
        if not able:
            others = ", ".join(name for name, b in BACKENDS.items() if b.available(workload)[0])
            raise BackendError(f"attention={wanted!r} cannot serve {workload}: {why}; 'auto' or one of {others} can")
        return BACKENDS[wanted], "asked for"
    able = ((name, why) for name, why in _preference(workload) if BACKENDS[name].available(workload)[0])
    name, why = next(able)
    return BACKENDS[name], why


def _preference(workload: Workload) -> list[tuple[str, str]]:
    """Names, best first, and what speaks for each; the last can always serve."""
    if workload.device.type == "cpu":
        return [("cpu", "the fastest on a CPU")]
    # From what each is built for: no GPU has timed one against the other yet (docs/performance.md).
    order = [
        ("triton", "made for few queries and a long cache, and reads timestep keys in the same kernel"),
        ("flash", "window_attention cannot serve"),
        ("sdpa", "neither window_attention nor flash-attn can serve"),
    ]
    if not workload.timesteps and FLASH.version(workload) == 3:
        order.insert(0, ("flash", "flash-attn 3 is made for this GPU, and there are no timestep keys"))
    return order


def survey(workload: Workload) -> list[dict[str, Any]]:
    """Every backend: name, whether it is available for such calls, why, and for which of them "auto" takes it, why."""
    plain, timed = (choose("auto", replace(workload, timesteps=timed)) for timed in (False, True))
    rows = []
    for name, backend in BACKENDS.items():
        able, why = backend.available(workload)
        if plain[0] is timed[0] is backend:
            auto = f"always: {plain[1]}"
        else:
            kinds = (("without timestep keys", plain), ("with timestep keys, as in sjd2", timed))
            auto = "; ".join(f"{kind}: {reason}" for kind, (chosen, reason) in kinds if chosen is backend)
        rows.append({"backend": name, "available": able, "why": why, "auto": auto})
    return rows


__all__ = ["BACKENDS", "Attention", "Backend", "Pass", "Workload", "check_name", "choose", "merge_extra_key", "survey"]
