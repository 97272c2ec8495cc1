"""One worker: an engine that draws what it is given, writes each picture when it is finished, and logs it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..engine import Engine
from ..errors import ConfigError, NumericalError, PromptError
from ..evaluation.machine import device_name
from ..files import check_writable, png_facts, save_png
from . import folder
from .folder import Record
from .plan import Plan
from .prompts import Item


@dataclass
class Drawn:
    """What came of a chunk: a record per picture that is there now, an error per prompt that has none, by index.

    fresh: how many pictures were drawn, not found. seconds: spent on the chunk.
    """

    records: dict[int, Record] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    fresh: int = 0
    seconds: float = 0.0


class Worker:
    """The class that Ray makes an actor of; it knows nothing of Ray."""

    def start(self, plan: Plan, name: str) -> dict[str, Any]:
        """Load the model and open a log; returns what there is to say of this worker.

        Raises ConfigError where the host runs another version or does not see the output folder, and what
        `Engine.from_pretrained` raises.
        """
        host = socket.gethostname()
        if plan.version != __version__:
            raise ConfigError(f"host {host} has sjd2-engine {__version__}, the driver {plan.version}; install the same")
        path = folder.log_path(plan, name)
        if not path.parent.is_dir():
            raise ConfigError(
                f"host {host} does not see '{path.parent}', which the driver made; --out must be on storage that all "
                "hosts share under the same path"
            )
        check_writable(plan.out)
        self.plan, self.run_folder = plan, path.parent
        self.engine = Engine.from_pretrained(
            plan.model, plan.device, plan.dtype, image_size=plan.image_size, allow_pickle=plan.allow_pickle
        )
        self.engine.model.encode_prompt(plan.config().negative_prompt)
        self.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        about = {"host": host, "pid": os.getpid(), "device": device_name(self.engine.device)}
        folder.append(self.log, {"worker": name, **about})
        return about

    def draw(self, items: Sequence[Item]) -> Drawn:
        """Draw prompts that share a negative prompt. What is wrong with a prompt is in the answer; what is wrong
        with the worker is raised."""
        started = time.perf_counter()
        drawn = Drawn()
        todo = []
        for item in items:
            # Another worker may have finished it and died before it could tell.
            if png_facts(self.plan.out / self.plan.picture(item)) == self.plan.facts(item):
                drawn.records[item.index] = {"picture": self.plan.picture(item), "key": self.plan.key(item)}
            else:
                todo.append(item)
        try:
            self._decode(todo, drawn)
        except (PromptError, ConfigError):  # of one prompt that the model cannot take: find out which
            for item in todo:
                if item.index in drawn.records or item.index in drawn.errors:
                    continue
                try:
                    self._decode([item], drawn)
                except (PromptError, ConfigError) as error:
                    drawn.errors[item.index] = str(error)
        drawn.seconds = time.perf_counter() - started
        return drawn

    def _decode(self, items: Sequence[Item], drawn: Drawn) -> None:
        for item, picture in self._pictures(items):
            if picture.failure is not None or picture.image is None:
                drawn.errors[item.index] = _reason(picture.failure)
                continue
            if not self.run_folder.is_dir():
                raise RuntimeError("this run is over: its driver was killed and another run has the folder now")
            name = self.plan.picture(item)
            save_png(picture.image, self.plan.out / name, self.plan.facts(item))
            record = {
                "picture": name,
                "key": self.plan.key(item),
                "forward_passes": picture.forward_passes,
                "tokens": len(self.engine.model.layout),
                "accepted_per_step": picture.accepted_per_step,
            }
            folder.append(self.log, record)
            drawn.records[item.index] = record
            drawn.fresh += 1

    def _pictures(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        if not items:
            return
        options = {**self.plan.options_for(items[0].negative_prompt), "seed": [item.seed for item in items]}
        for event in self.engine.stream([item.prompt for item in items], self.plan.decoder, **options):
            for index, picture in event.finished.items():
                yield items[index], picture


def _reason(failure: NumericalError | None) -> str:
    # The error counts images from the start of a chunk, which means nothing to whoever reads the manifest.
    if failure is None or failure.step is None:
        return str(failure)
    return f"NaN or infinite logits at step {failure.step}, position {failure.position}; try --dtype float32"
