"""Which implementation of an op runs: Triton on CUDA, the C core on the CPU, the reference where neither can.

`with backend("reference")` and its like override the choice, for tests and bug reports. An implementation that
cannot serve a call raises `NotSupported` before it touches anything; the reference then does it, and the reason is
logged once.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "c", "triton")

# Where each op's kernel lives: a module of this package with a function of the op's name.
TRITON = {
    "embed_window": "embedding",
    "perturb": "embedding",
    "sample_window": "sampling",
    "verify": "verification",
    "commit": "verification",
    "refine": "refinement",
    "kv_compact": "cache",
    "qk_norm_rope_cache": "cache",
    "window_attention": "attention",
    "rms_norm": "norm",
    "swiglu": "norm",
}
C = {name: "native" for name in ("embed_window", "perturb", "sample_window", "verify", "commit", "refine")}
MODULES = {"triton": TRITON, "c": C}

_override: ContextVar[str | None] = ContextVar("sjd2_backend", default=None)


class NotSupported(RuntimeError):
    """This implementation cannot serve this call; the message says why."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer one implementation for every op inside the block: "reference", "c" or "triton".

    "triton" on CPU tensors needs TRITON_INTERPRET=1 in the environment before Triton is imported.
    Raises ValueError for any other name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: expected one of {', '.join(BACKENDS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def implementation(name: str, op: str) -> Callable[..., Any]:
    """The function that does `op` in backend `name`; raises NotSupported where there is none on this machine."""
    found = _find(name, op)
    if isinstance(found, str):
        raise NotSupported(found)
    return found


@cache
def _find(name: str, op: str) -> Callable[..., Any] | str:
    """The function, or why there is none: a failed import is not tried again with every call."""
    if name == "reference":
        return getattr(importlib.import_module(f"{__package__}.reference"), op)
    if op not in MODULES[name]:
        return f"{op} has no {name} implementation"
    try:
        module = importlib.import_module(f"{__package__}.{MODULES[name][op]}")
    except ImportError as error:
        return f"{name} cannot be loaded: {error}"
    return getattr(module, op)


def preferred(device: str) -> str:
    """The backend that an op asks for first on a device type ("cpu", "cuda", …)."""
    return _override.get() or {"cuda": "triton", "cpu": "c"}.get(device, "reference")


def choice(op: str, device: str) -> tuple[str, str]:
    """The backend that `op` gets on a device type, and why."""
    wanted = preferred(device)
    chosen_by = "asked for" if _override.get() else f"the first choice on {device}"
    try:
        implementation(wanted, op)
    except NotSupported as error:
        return "reference", str(error)
    return wanted, chosen_by


def run(op: str, *args: Any) -> Any:
    """Call `op` in the preferred backend of its tensors' device, or the reference where that one cannot serve."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    wanted = preferred(device.type)
    try:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return implementation(wanted, op)(*args)
    except NotSupported as error:
        if wanted == "reference":
            raise
        _say_once(op, wanted, str(error))
        return implementation("reference", op)(*args)


@cache
def _say_once(op: str, wanted: str, reason: str) -> None:
    logger.info("sjd2::%s runs on the reference, not on %s: %s", op, wanted, reason)
