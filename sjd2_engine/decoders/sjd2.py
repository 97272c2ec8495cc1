"""Speculative Jacobi-Denoising Decoding (Teng et al., NeurIPS 2025, arXiv 2510.08994).

New positions start as Gaussian noise in the normalised embedding space and go down one noise level per
forward pass, towards the token predicted for them; below level 0 a draft is a token and can be accepted.

match  clean drafts pass as in `jacobi`: the tokens of `ar` on the same weights
ratio  clean drafts pass as in `coupled`: the law of `ar` on the same weights
paper  as published: noisy drafts pass too, judged by their nearest token; not exact

In the first two a noisy draft stops the scan, so that keys and values of accepted tokens are clean.
"""

from __future__ import annotations

from dataclasses import replace

from sjd2_kernels import reference

from ..config import DecodeConfig
from . import coupled, jacobi
from .plan import Plan


def plan(config: DecodeConfig) -> Plan:
    """The rule of `config.verification`, on drafts that begin as noise."""
    if config.verification == "match":
        base = jacobi.plan(config)
    elif config.verification == "ratio":
        base = coupled.plan(config)
    else:
        base = Plan(rule=reference.PAPER, per_position=config.coupling == "gumbel", nearest=True)
    return replace(base, noisy=True, noisy_start=config.warmup == "noise")
