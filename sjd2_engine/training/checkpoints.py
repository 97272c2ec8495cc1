"""Where a run stands, on disk: whole or not at all, and enough to go on bit for bit.

    run/settings.json       what the run was told
    run/step-00000300/      weights, optimiser and moving average, one file per process (torch.distributed.checkpoint)

Pictures, levels and noise follow from the seed and the step (training/batches.py), so no other random state exists.
A checkpoint gets its name when everything in it is on disk, and the one before it is deleted after that.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import CheckpointError, ConfigError
from ..files import replace_file
from .optimise import MovingAverage

NAME = "step-{:08d}"
PARTIAL = ".partial"


class Checkpoints:
    """Checkpoints of one run in `folder`; all processes of the run call every method together."""

    def __init__(self, folder: Path, is_main: bool, wait: Any) -> None:
        self.folder, self.is_main, self._wait = folder, is_main, wait

    def settings(self, given: dict[str, Any]) -> None:
        """Keep what decides the result; ConfigError where an unfinished run was told something else."""
        path = self.folder / "settings.json"
        wanted = json.loads(json.dumps(given))
        if path.exists() and self.latest() is not None:
            stored = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
            if changed:
                name = changed[0]
                raise ConfigError(
                    f"the run in '{self.folder}' was begun with {name}={stored.get(name)!r}, now it is "
                    f"{wanted.get(name)!r}; say the same to go on, or choose another folder with --out"
                )
        self._wait()
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(wanted, indent=1) + "\n")
        self._wait()

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return max((path for path in self.folder.glob("step-*") if path.suffix != PARTIAL), default=None)

    def save(
        self, step: int, module: nn.Module, optimisers: list[torch.optim.Optimizer], average: MovingAverage | None
    ) -> None:
        """Write the state after `step` steps; ConfigError where there is no room, and the one before it stays."""
        final = self.folder / NAME.format(step)
        partial = final.with_suffix(PARTIAL)
        if self.is_main:
            for left in self.folder.glob(f"*{PARTIAL}"):  # of a killed run
                shutil.rmtree(left)
            shutil.rmtree(final, ignore_errors=True)
        self._wait()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process is not a process group
                dcp.save(_state(module, optimisers, average, step), checkpoint_id=partial)
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            raise ConfigError(
                f"the checkpoint of step {step} could not be written to '{self.folder}' ({_cause(error)}); make room "
                f"and run the same command again: it goes on from {_name(self.latest())}"
            ) from error
        self._wait()
        if self.is_main:
            os.replace(partial, final)
            for old in self.folder.glob("step-*"):
                if old != final:
                    shutil.rmtree(old)
        self._wait()

    def load(self, module: nn.Module, optimisers: list[torch.optim.Optimizer], average: MovingAverage | None) -> int:
        """Take up the newest checkpoint, if there is one; returns the steps done."""
        path = self.latest()
        if path is None:
            return 0
        state = _state(module, optimisers, average, 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=path)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{path} cannot be read ({_cause(error)}); delete it to begin anew, the data stays as it is"
            ) from error
        set_state_dict(module, optimisers, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        return int(state["step"])


def _state(
    module: nn.Module, optimisers: list[torch.optim.Optimizer], average: MovingAverage | None, step: int
) -> dict[str, Any]:
    model, optimiser = get_state_dict(module, optimisers)
    state: dict[str, Any] = {"model": model, "optimiser": optimiser, "step": torch.tensor(step)}
    if average is not None:
        averaged: dict[str, Tensor] = average.weights  # loaded in place
        state["average"] = averaged
    return state


def _cause(error: BaseException) -> str:
    inner = error
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))[0]  # of the first process that failed
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    return " ".join(str(inner).split())[:200] or type(inner).__name__


def _name(path: Path | None) -> str:
    return "the beginning" if path is None else path.name
