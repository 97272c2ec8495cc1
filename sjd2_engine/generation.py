"""What `sjd2 generate` does: pictures into a folder, each written when it is finished, none drawn twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .engine import Engine
from .files import picture_facts, picture_path, png_facts, save_png


def draw(
    engine: Engine, prompts: Sequence[str], out: Path, decoder: str, seed: int, options: dict[str, Any]
) -> Iterator[str]:
    """Draw prompt i with seed + i into `out`; yields one line per picture for the terminal.

    A picture that is there already, drawn from the same prompt, seed, decoder, model and settings, is kept.
    """
    config = engine.config_for(decoder, **options)
    facts = [picture_facts(p, seed + i, engine.model_name, config) for i, p in enumerate(prompts)]
    paths = [picture_path(out, i, p, seed + i) for i, p in enumerate(prompts)]
    todo = [i for i, path in enumerate(paths) if png_facts(path) != facts[i]]
    for i in sorted({*range(len(prompts))} - {*todo}):
        yield f"{paths[i]}  kept: drawn before with the same settings"
    for start in range(0, len(todo), config.max_batch):
        chosen = todo[start : start + config.max_batch]
        seeds = [seed + i for i in chosen]
        result = engine.generate([prompts[i] for i in chosen], decoder=decoder, seed=seeds, **options)
        for i, image, forwards in zip(chosen, result.images, result.stats.forward_passes):
            save_png(image, paths[i], facts[i])
            yield f"{paths[i]}  {forwards} forward passes for {result.stats.tokens} tokens"
