"""The ops of sjd2_engine: `torch.ops.sjd2.*`, each with one meaning, written down in `reference`."""

from __future__ import annotations

from . import ops, reference, rng

__all__ = ["ops", "reference", "rng"]
