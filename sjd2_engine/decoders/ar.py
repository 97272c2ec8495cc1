"""Plain autoregressive decoding: a window of one slot, so every forward pass gives one token."""

from __future__ import annotations

from sjd2_kernels import reference

from ..config import DecodeConfig
from .plan import Plan


def plan(config: DecodeConfig) -> Plan:
    """Draws are keyed by position, so that `jacobi` and `sjd2` in "match" can give the same tokens."""
    return Plan(rule=reference.MATCH, per_position=True)
