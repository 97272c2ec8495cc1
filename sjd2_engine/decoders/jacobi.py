"""Jacobi decoding with fixed noise: x_i = argmax(log p_i + G(seed, i)), a fixed-point iteration on `ar`.

A draft that equals its new argmax is what `ar` would have drawn; the first that differs is replaced by
it, which is already right, and the others become the new drafts. The tokens are those of `ar`.
"""

from __future__ import annotations

from sjd2_kernels import reference

from ..config import DecodeConfig
from .plan import Plan


def plan(config: DecodeConfig) -> Plan:
    """Any draft may be tested, also one that nothing is known about."""
    return Plan(rule=reference.MATCH, per_position=True)
