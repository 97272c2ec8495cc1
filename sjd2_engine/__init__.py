"""sjd2_engine: several image tokens per forward pass for autoregressive text-to-image models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DecodeConfig
    from .engine import Engine
    from .layout import TokenLayout
    from .window import JacobiWindow

__version__ = "0.1.0"
__all__ = ["DecodeConfig", "Engine", "JacobiWindow", "TokenLayout", "__version__"]

_HOMES = {"DecodeConfig": "config", "Engine": "engine", "JacobiWindow": "window", "TokenLayout": "layout"}


def __getattr__(name: str) -> Any:
    # Names load on first use: help texts need no torch, and whoever embeds the window needs no engine.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
