"""Where the prompts of a measurement come from: held-out scenes, which can be scored, or a text file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import PromptError
from ..scenes.captions import heldout_prompts
from ..scenes.scene_eval import Verdict, score
from ..scenes.world import SIDE, Prompt


@dataclass(frozen=True)
class Case:
    """One prompt; `judge` tells whether a picture shows it (None: it cannot tell)."""

    text: str
    category: str = ""
    judge: Callable[[Image.Image], Verdict | None] | None = None


def scene_cases(count: int, seed: int) -> list[Case]:
    """Captions that the bundled models never saw in training, GenEval's six categories in turn."""
    return [Case(p.text, p.category, partial(_judge, p)) for p in heldout_prompts(count, seed)]


def _judge(prompt: Prompt, image: Image.Image) -> Verdict | None:
    # SceneEval reads pictures of the bundled models' size; those of other models go unjudged.
    return score(image, prompt) if image.size == (SIDE, SIDE) else None


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read prompts from '{path}' ({error}); expected a text file") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"'{path}' holds no prompt; expected one per line")
    return prompts
