"""What all workers of a batch are told: model, options, folder, and each picture's name and proof."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import DecodeConfig
from ..errors import CheckpointError, ConfigError
from ..files import picture_facts, picture_path
from ..models import LoadOptions, describe_model
from .prompts import Item

DEVICES = ("auto", "cpu", "cuda")
PER_FOLDER = 1000  # pictures per sub-folder: a million in one folder is slow on every file system


@dataclass(frozen=True)
class Plan:
    """A batch without its prompts; travels to every worker.

    model: as given, folders absolute. out: absolute. run: a name that no other run has. defaults: the model's.
    """

    model: str
    out: Path
    run: str
    defaults: Mapping[str, Any]
    decoder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    image_size: tuple[int, int] | int | None = None
    allow_pickle: bool = False
    version: str = __version__

    @property
    def model_name(self) -> str:
        """What pictures say they were drawn by, as `Engine.model_name`."""
        return Path(self.model).resolve().name

    def options_for(self, negative_prompt: str | None) -> dict[str, Any]:
        """Options of a decode; a prompt's own negative prompt wins over the run's."""
        return {**self.options, **({} if negative_prompt is None else {"negative_prompt": negative_prompt})}

    def config(self, negative_prompt: str | None = None) -> DecodeConfig:
        return DecodeConfig.build(self.defaults, decoder=self.decoder, **self.options_for(negative_prompt))

    def facts(self, item: Item) -> dict[str, str]:
        """What the item's PNG says of itself: that of `sjd2 generate`, and the size where one was asked for."""
        return {**_common_facts(self, item.negative_prompt), "prompt": item.prompt, "seed": str(item.seed)}

    def key(self, item: Item) -> str:
        """Digest of everything that decides how the picture looks."""
        return hashlib.sha256(json.dumps(self.facts(item), sort_keys=True).encode()).hexdigest()[:32]

    def picture(self, item: Item) -> str:
        """Path of the item's picture within `out`: 00012/12345_a-red-circle_seed7.png."""
        return f"{item.index // PER_FOLDER:05d}/{picture_path(Path(), item.index, item.prompt, item.seed).name}"

    def __hash__(self) -> int:
        return hash(self.run)


@functools.lru_cache(maxsize=256)
def _common_facts(plan: Plan, negative_prompt: str | None) -> dict[str, str]:
    facts = picture_facts("", 0, plan.model_name, plan.config(negative_prompt))
    return facts if plan.image_size is None else {**facts, "image_size": json.dumps(plan.image_size)}


def make_plan(model: str, out: Path, run: str, **given: Any) -> Plan:
    """A checked plan, without loading weights; raises ConfigError and CheckpointError."""
    device = given.get("device", "auto")
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: expected {', '.join(DEVICES)}; Ray gives every worker a GPU of its own")
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    options = LoadOptions(given.get("image_size"), given.get("allow_pickle", False))
    facts = describe_model(place, options)
    plan = Plan(place, out.resolve(), run, facts.defaults, **given)
    if plan.config().uses_noise and facts.noise is None:
        raise CheckpointError(
            f"decoder='sjd2' needs weights trained on noisy inputs, and {model!r} is not; make some by "
            f"`sjd2 finetune --model {model}`, or take another decoder"
        )
    return plan
