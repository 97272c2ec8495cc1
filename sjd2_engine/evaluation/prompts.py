"""Where the prompts of a measurement come from: held-out scenes, which can be scored, or a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import MAX_SEED
from ..errors import PromptError
from ..scenes.captions import heldout_prompts
from ..scenes.scene_eval import Verdict, score
from ..scenes.world import SIDE, Prompt


@dataclass(frozen=True)
class Case:
    """One prompt; `judge` tells whether a picture shows it (None: it cannot tell).

    id, seed: as a prompt file gives them (None: the place in the run decides). metadata: whatever else stood there.
    """

    text: str
    category: str = ""
    judge: Callable[[Image.Image], Verdict | None] | None = None
    id: str | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def scene_cases(count: int, seed: int) -> list[Case]:
    """Captions that the bundled models never saw in training, GenEval's six categories in turn."""
    return [Case(p.text, p.category, partial(_judge, p)) for p in heldout_prompts(count, seed)]


def _judge(prompt: Prompt, image: Image.Image) -> Verdict | None:
    # SceneEval reads pictures of the bundled models' size; those of other models go unjudged.
    return score(image, prompt) if image.size == (SIDE, SIDE) else None


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    prompts = [line.strip() for line in _lines(path) if line.strip()]
    if not prompts:
        raise PromptError(f"'{path}' holds no prompt; expected one per line")
    return prompts


def read_cases(path: str | Path) -> list[Case]:
    """The prompts of a file: JSON lines where its name ends in .jsonl, else one prompt per line.

    A JSON line has `prompt`, and may have `id`, `seed` and `metadata`; whatever else it has is metadata too, so that
    GenEval's evaluation_metadata.jsonl can be read as it is (`tag` is the category).
    """
    if Path(path).suffix != ".jsonl":
        return [Case(text) for text in read_prompts(path)]
    cases = [_case(line, f"line {number} of '{path}'") for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not cases:
        raise PromptError(f"'{path}' holds no prompt; expected one JSON object with 'prompt' per line")
    return cases


def _lines(path: str | Path) -> list[str]:
    try:
        # Not splitlines(): JSON strings may hold line separators of Unicode as they are.
        return Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read prompts from '{path}' ({error}); expected a text file") from error


def _case(line: str, where: str) -> Case:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f'{where} is no JSON ({error}); expected an object such as {{"prompt": "…"}}') from error
    text = given.get("prompt") if isinstance(given, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where} has no prompt; expected a JSON object with the text under 'prompt'")
    metadata = {key: value for key, value in given.items() if key not in ("prompt", "id", "seed", "metadata")}
    more = given.get("metadata") or {}
    if not isinstance(more, dict):
        raise PromptError(f"{where} has metadata={more!r}; expected a JSON object")
    metadata.update(more)
    seed, name = given.get("seed"), given.get("id")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED):
        raise PromptError(f"{where} has seed={seed!r}; expected an integer from 0 to 2**63 - 1")
    category = metadata.get("tag", "")
    return Case(
        text.strip(), category if isinstance(category, str) else "", None, None if name is None else str(name), seed,
        metadata,
    )  # fmt: skip
