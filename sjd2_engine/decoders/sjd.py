"""Speculative Jacobi Decoding (Teng et al., ICLR 2025, arXiv 2410.01699).

Drafts pass with probability min(1, p(x)/q(x)); the first that does not is redrawn from the residual, and
everything behind it independently from its own p.
"""

from __future__ import annotations

from sjd2_kernels import reference

from ..config import DecodeConfig
from .plan import Plan


def plan(config: DecodeConfig) -> Plan:
    """Every step draws with noise of its own: the redraws must not depend on the drafts before them."""
    return Plan(rule=reference.RATIO, per_position=False)
