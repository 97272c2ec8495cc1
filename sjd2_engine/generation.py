"""What `sjd2 generate` does: pictures into a folder, each batch written when it is done, none drawn twice."""

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
    for start in range(0, len(todo), config.max_batch):
        chosen = todo[start : start + config.max_batch]
        seeds = [seed + i for i in chosen]
        try:
            result = engine.generate([prompts[i] for i in chosen], decoder, **{**options, "seed": seeds})
        except NumericalError as error:  # of all pictures of this batch
            failures.append(f"{paths[chosen[error.image or 0]].name}: {error}")
            continue
        failures += [f"{paths[chosen[error.image or 0]].name}: {error}" for error in result.failures]
        for i, image, forwards in zip(chosen, result.images, result.stats.forward_passes):
            if image is not None:
                save_png(image, paths[i], facts[i])
                yield f"{paths[i]}  {forwards} forward passes for {result.stats.tokens} tokens"
    if failures:
        raise NumericalError(f"{len(failures)} picture(s) failed, the others are written; {failures[0]}")
