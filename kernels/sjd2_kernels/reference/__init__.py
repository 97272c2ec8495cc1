"""The meaning of every op, in plain PyTorch: `decoding` holds the window's ops, `model` those of the transformer."""

from __future__ import annotations

from .decoding import (
    COUPLED,
    FRESH,
    KEEP_RATIO,
    MATCH,
    PAPER,
    RATIO,
    SETTLED,
    TRACKED,
    commit,
    embed_window,
    perturb,
    refine,
    sample_window,
    verify,
)
from .model import LAYER_NORM, NO_NORM, RMS_NORM, kv_compact, qk_norm_rope_cache, rms_norm, swiglu, window_attention

__all__ = [
    "COUPLED", "FRESH", "KEEP_RATIO", "LAYER_NORM", "MATCH", "NO_NORM", "PAPER", "RATIO", "RMS_NORM", "SETTLED",
    "TRACKED", "commit", "embed_window", "kv_compact", "perturb", "qk_norm_rope_cache", "refine", "rms_norm",
    "sample_window", "swiglu", "verify", "window_attention",
]  # fmt: skip
