"""What `sjd2 generate` does: pictures into a folder, each written as soon as it is done, none drawn twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .engine import Engine
from .errors import NumericalError
from .files import picture_facts, picture_path, png_facts, save_png


def draw(
    engine: Engine, prompts: Sequence[str], out: Path, decoder: str | None, seed: int, options: dict[str, Any]
) -> Iterator[str]:
    """Draw prompt i with seed + i into `out`; yields one line per picture for the terminal.

    A picture that is there already, drawn from the same prompt, seed, decoder, model and settings, is kept.
    One that fails does not stop the others: its NumericalError is raised when they are written.
    """
    # Checks the options and every prompt now; without a step taken nothing is computed.
    engine.stream(prompts, decoder, seed=seed, **options)
    config = engine.config_for(decoder, **options)
    facts = [picture_facts(p, seed + i, engine.model_name, config) for i, p in enumerate(prompts)]
    paths = [picture_path(out, i, p, seed + i) for i, p in enumerate(prompts)]
    todo = [i for i, path in enumerate(paths) if png_facts(path) != facts[i]]
    for i in sorted({*range(len(prompts))} - {*todo}):
        yield f"{paths[i]}  kept: drawn before with the same settings"
    failures: list[str] = []
    if todo:
        seeds = [seed + i for i in todo]
        for event in engine.stream([prompts[i] for i in todo], decoder, **{**options, "seed": seeds}):
            for at, picture in event.finished.items():
                i = todo[at]
                if picture.image is None:
                    failures.append(f"{paths[i].name}: {picture.failure}")
                    continue
                save_png(picture.image, paths[i], facts[i])
                total = len(engine.model.layout)
                yield f"{paths[i]}  {picture.forward_passes} forward passes for {total} tokens"
    if failures:
        raise NumericalError(f"{len(failures)} picture(s) failed, the others are written; {failures[0]}")
