"""The decoders, one small file each; a decoder is a `Plan` made from the options."""

from __future__ import annotations

from collections.abc import Callable

from ..config import DecodeConfig
from . import ar, coupled, jacobi, sjd, sjd2
from .plan import Plan

PLANS: dict[str, Callable[[DecodeConfig], Plan]] = {
    "ar": ar.plan,
    "jacobi": jacobi.plan,
    "sjd": sjd.plan,
    "coupled": coupled.plan,
    "sjd2": sjd2.plan,
}


def make_plan(config: DecodeConfig) -> Plan:
    """The plan of `config.decoder`."""
    return PLANS[config.decoder](config)


__all__ = ["PLANS", "Plan", "make_plan"]
