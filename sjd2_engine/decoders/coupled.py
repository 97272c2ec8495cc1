"""Speculative Coupled Decoding (So et al., arXiv 2510.24211): `sjd` whose redraws resemble the old drafts.

maximal  every draft behind the rejection passes the acceptance test too: kept, else drawn from the residual
gumbel   it is redrawn with the Gumbel noise of its position
none     it is redrawn independently: `sjd`

In each case the new token follows p, whatever the old one was, so q := p for kept and redrawn drafts alike.
Position-keyed noise is lossless because the model is causal: p of a position depends on tokens before it,
never on its own noise; the acceptance test and the residual have noise of their own.
"""

from __future__ import annotations

from sjd2_kernels import reference

from ..config import DecodeConfig
from . import sjd
from .plan import Plan


def plan(config: DecodeConfig) -> Plan:
    """The plan of `config.coupling`; a position without a q draws from p once, hence per position."""
    if config.coupling == "none":
        return sjd.plan(config)
    rule = reference.COUPLED if config.coupling == "maximal" else reference.RATIO
    return Plan(rule=rule, per_position=True)
