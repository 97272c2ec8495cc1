"""The ops of sjd2_engine: `torch.ops.sjd2.*`, each with one meaning, written down in `reference`."""

from __future__ import annotations

from . import ops, reference, rng
from .dispatch import BACKENDS, NotSupported, backend

__all__ = ["BACKENDS", "NotSupported", "backend", "ops", "reference", "rng"]
