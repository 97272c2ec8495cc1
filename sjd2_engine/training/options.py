"""What a run of noise training is told, and what each family takes where it is told nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..schedule import noise_times


@dataclass(frozen=True)
class NoiseRecipe:
    """How the inputs of a picture are noised.

    levels         counts of noise levels; a picture is trained on one of them, the first most often. Decoding takes
                   the first
    t_min          the smallest noise time of each count; the others are Karras-spaced up to 1
    segment        least and most positions of one level
    clean_run      least and most clean positions between two staircases
    reset          chance that a staircase ends after a segment, before its last level
    clean_share    of the pictures, left without any noise
    other_counts   of the noised pictures, trained on another count of levels than the first
    unconditional  of the pictures, trained with the prompt that guidance leads away from
    """

    levels: tuple[int, ...] = (25,)
    t_min: float = 0.05
    segment: tuple[int, int] = (1, 8)
    clean_run: tuple[int, int] = (0, 96)
    reset: float = 0.02
    clean_share: float = 0.0
    other_counts: float = 0.3
    unconditional: float = 0.1

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("levels is empty: expected one or more counts of noise levels, like 25 or 3,2")
        for count in self.levels:
            noise_times(count, self.t_min)
        for name, least in (("segment", 1), ("clean_run", 0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ConfigError(f"{name}={low},{high}: expected the least and the most positions, from {least} on")
        for name in ("reset", "clean_share", "other_counts", "unconditional"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share from 0 to below 1")

    def times(self) -> Tensor:
        """Noise times f32 [sum of the counts]: those of the first count of levels, then those of the others."""
        return torch.cat([noise_times(count, self.t_min) for count in self.levels])


@dataclass(frozen=True)
class Options:
    """One run of `sjd2 finetune`; defaults are those of the publication (arXiv 2510.08994).

    noise          how inputs are noised
    epochs, steps  passes over the data, or optimiser steps where those are given
    batch          pictures per optimiser step, over all processes
    micro_batch    pictures per forward pass and process
    rate           largest learning rate; `optimiser` "adamw", or "muon" (AdamW beside it for tables and gains)
    schedule       "cosine" (to `final_share` of the rate) or "constant", after `warmup` steps
    clip           largest norm of the gradient
    ema            decay of a moving average of the weights, which then is what is saved; 0 = none
    lora           rank of the adapters trained instead of the weights; 0 = all weights
    precision      "bf16" (weights kept in float32) or "float32"
    shard          split weights, gradients and optimiser over the processes (FSDP2)
    checkpointing  recompute activations in the backward pass instead of keeping them
    compiled       torch.compile
    validation     pictures at the end of the data that are kept apart
    """

    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    epochs: float = 6.0
    steps: int | None = None
    batch: int = 64
    micro_batch: int = 1
    rate: float = 2e-5
    optimiser: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: int = 100
    final_share: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    lora: int = 0
    precision: str = "bf16"
    shard: bool = False
    checkpointing: bool = True
    compiled: bool = False
    validation: int = 256
    validate_every: int = 500
    save_every: int = 250
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "validation", "validate_every", "save_every", "log_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("steps", self.steps is None or self.steps >= 1, "at least 1")
        self._expect("epochs", self.epochs > 0, "more than 0")
        for name in ("rate", "clip"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in ("warmup", "lora", "weight_decay"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ema", "final_share"):
            self._expect(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._expect("optimiser", self.optimiser in ("adamw", "muon"), "'adamw' or 'muon'")
        self._expect("schedule", self.schedule in ("cosine", "constant"), "'cosine' or 'constant'")
        self._expect("precision", self.precision in ("bf16", "float32"), "'bf16' or 'float32'")
        if self.shard and (self.optimiser == "muon" or self.lora):
            raise ConfigError("shard works with optimiser='adamw' and all weights: leave muon or lora out, or shard")

    def _expect(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @classmethod
    def build(cls, family: str, **given: Any) -> Options:
        """The family's defaults with what is given over them; an unknown name is an error that names the closest."""
        noise_names = {entry.name for entry in fields(NoiseRecipe)}
        names = {entry.name for entry in fields(cls)} - {"noise"}
        usual = dict(FAMILY_DEFAULTS.get(family, {}))
        if "epochs" in given:
            usual.pop("steps", None)  # they would win over what was asked for
        merged = {**usual, **given}
        for name in merged:
            if name not in names | noise_names:
                close = difflib.get_close_matches(name, names | noise_names, 1)
                raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        noise = NoiseRecipe(**{name: value for name, value in merged.items() if name in noise_names})
        return cls(noise=noise, **{name: value for name, value in merged.items() if name in names})

    def accumulation(self, processes: int) -> int:
        """Forward passes per optimiser step and process; ConfigError where they do not come out even."""
        passes, rest = divmod(self.batch, self.micro_batch * processes)
        if rest or not passes:
            raise ConfigError(
                f"batch={self.batch} is no multiple of micro_batch={self.micro_batch} times {processes} processes: "
                "choose another micro_batch or batch"
            )
        return passes

    def steps_for(self, pictures: int) -> int:
        """Optimiser steps of the whole run over `pictures` training pictures."""
        return self.steps or max(1, round(self.epochs * pictures / self.batch))

    def lasting(self) -> dict[str, Any]:
        """What decides the result, hence must stay the same when a run goes on; the rest may change."""
        passing = ("micro_batch", "shard", "checkpointing", "validate_every", "save_every", "log_every", "compiled")
        return {name: value for name, value in asdict(self).items() if name not in passing}


# The bundled model is small enough for another recipe: few levels, all near t = 1 (docs/decoders.md), a rate as in
# its base training, and pictures without noise in every batch, which keep plain decoding as good as it was.
FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "scenes": {
        "levels": (3, 2), "t_min": 0.75, "segment": (2, 12), "clean_run": (0, 60), "reset": 0.0, "clean_share": 0.5,
        "steps": 1300, "batch": 32, "micro_batch": 32, "rate": 1e-3, "optimiser": "muon", "weight_decay": 0.05,
        "warmup": 150, "final_share": 0.02, "checkpointing": False, "compiled": True, "validation": 512,
        "validate_every": 100_000, "save_every": 250, "log_every": 25, "seed": 4,
    },
}  # fmt: skip
