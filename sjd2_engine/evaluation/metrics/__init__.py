"""What pictures are scored by; each metric checks what it needs before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import ConfigError
from .base import Finding, Metric, MetricResult, Picture

__all__ = ["NAMES", "Finding", "Metric", "MetricResult", "Picture", "make_metrics"]

NAMES = ("scene_eval", "fid", "clip", "geneval")


def make_metrics(
    names: Sequence[str],
    device: torch.device,
    clip: str | None = None,
    inception: Path | None = None,
    reference: Path | None = None,
) -> list[Metric]:
    """The metrics of these names, loaded and ready.

    clip: folder or hub id of a CLIP model of transformers. inception: extractor file. reference: folder of real
    pictures or .npz of their moments. Raises ConfigError and CheckpointError where something is missing.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ConfigError(f"--metrics names {', '.join(unknown) or 'nothing'}; expected some of {', '.join(NAMES)}")
    made: list[Metric] = []
    for name in dict.fromkeys(names):
        if name == "scene_eval":
            from .scene_eval import SceneEval

            made.append(SceneEval())
        elif name == "fid":
            from .fid import Fid

            made.append(Fid(device, inception, reference))
        elif name == "clip":
            from .clip_score import ClipScore

            made.append(ClipScore(device, clip))
        else:
            from .geneval import GenEval

            made.append(GenEval())
    return made
