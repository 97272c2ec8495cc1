"""SceneEval: is the picture what the caption asked for? By image analysis, in GenEval's six categories.

The rules are GenEval's (arXiv 2310.11513): everything asked must be there, things nobody asked for do not
matter, counts must be exact in the category "counting", and of several candidates the surest one is judged.
The overall score is the mean of the six categories' shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .detection import COVER, Detection, as_pixels, coloured, detect
from .render import render
from .world import CATEGORIES, PLURALS, TEXTURES, TONES, Phrase, Prompt, Scene

__all__ = [
    "Detection",
    "Score",
    "Summary",
    "Verdict",
    "background_matches",
    "detect",
    "score",
    "score_all",
    "summarise",
]

SLACK = 4.0  # pixels by which centres must differ for a relation to hold: half a token
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its prompt, why or why not, and what was seen in it."""

    correct: bool
    reason: str
    detections: tuple[Detection, ...] = ()


@dataclass(frozen=True)
class Score:
    """A share of right pictures with its 95 % interval."""

    correct: int
    total: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The overall score (mean of the categories that have pictures) and one score per category."""

    overall: Score
    categories: dict[str, Score] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Shares only, "overall" first: what a results document stores."""
        return {"overall": self.overall.score, **{name: part.score for name, part in self.categories.items()}}


def _words(phrase: Phrase, count: int) -> str:
    noun = phrase.shape if count == 1 else PLURALS[phrase.shape]
    return " ".join(word for word in (phrase.size, phrase.colour, noun) if word)


def _matching(phrase: Phrase, things: Sequence[Detection]) -> list[Detection]:
    """Things that a phrase may mean, the surest first."""
    return [
        thing
        for thing in things
        if thing.shape == phrase.shape and phrase.colour in (None, thing.colour) and phrase.size in (None, thing.size)
    ]


def _related(relation: str, first: Detection, second: Detection) -> bool:
    """Whether the relation holds between two centres; only its own axis counts."""
    gap = second.x - first.x if relation in ("left of", "right of") else second.y - first.y
    return (gap if relation in ("left of", "above") else -gap) > SLACK


def _judge(prompt: Prompt, things: Sequence[Detection]) -> tuple[bool, str]:
    groups = [_matching(phrase, things) for phrase in prompt.phrases]
    counts = []
    right = True
    for phrase, group in zip(prompt.phrases, groups):
        enough = len(group) == phrase.count if prompt.category == "counting" else len(group) >= phrase.count
        right &= enough
        counts.append(f"{len(group)} {_words(phrase, len(group))} found, {phrase.count} asked")
    if right and prompt.relation:
        first, second = (_words(phrase, 1) for phrase in prompt.phrases)
        right = _related(prompt.relation, groups[0][0], groups[1][0])
        counts.append(f"the {first} is {'' if right else 'not '}{prompt.relation} the {second}")
    reason = "; ".join(counts)
    if not right:
        seen = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in things)
        reason += f" (seen: {seen or 'nothing'})"
    return right, reason


def score(image: Image.Image | np.ndarray, prompt: Prompt) -> Verdict:
    """Judge a picture (PIL, or uint8 [128, 128, 3]) against its prompt."""
    things = detect(image)
    correct, reason = _judge(prompt, things)
    return Verdict(correct, reason, tuple(things))


def score_all(images: Iterable[Image.Image | np.ndarray], prompts: Iterable[Prompt]) -> dict[str, list[Verdict]]:
    """Judge pictures against their prompts, one each; verdicts by category, as `summarise` takes them."""
    verdicts: dict[str, list[Verdict]] = {category: [] for category in CATEGORIES}
    for image, prompt in zip(images, prompts, strict=True):
        verdicts[prompt.category].append(score(image, prompt))
    return {category: judged for category, judged in verdicts.items() if judged}


def _wilson(correct: int, total: int) -> Score:
    share, z2 = correct / total, Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Score(correct, total, share, max(0.0, middle - reach), min(1.0, middle + reach))


def _mean(parts: Sequence[Score]) -> Score:
    """Mean of independent shares, with a normal interval.

    Variances are Agresti and Coull's (two successes and two failures added), so that a perfect score on few
    pictures does not claim to be certain.
    """
    share = sum(part.score for part in parts) / len(parts)
    adjusted = [((part.correct + 2) / (part.total + 4), part.total + 4) for part in parts]
    reach = Z95 * math.sqrt(sum(p * (1 - p) / n for p, n in adjusted)) / len(parts)
    correct, total = sum(part.correct for part in parts), sum(part.total for part in parts)
    return Score(correct, total, share, max(0.0, share - reach), min(1.0, share + reach))


def summarise(verdicts: Mapping[str, Sequence[Verdict]]) -> Summary:
    """Scores per category (Wilson intervals) and overall, from verdicts by category."""
    parts = {
        category: _wilson(sum(verdict.correct for verdict in judged), len(judged))
        for category, judged in verdicts.items()
        if judged
    }
    if not parts:
        raise ConfigError("No verdicts to summarise: expected at least one judged picture, got none.")
    return Summary(_mean(list(parts.values())), parts)


@cache
def _backgrounds() -> dict[tuple[str, str], np.ndarray]:
    """Every bare background, float [128, 128], by (texture, tone)."""
    pairs = [(texture, tone) for texture in TEXTURES for tone in TONES]
    return {pair: render(Scene((), *pair))[..., 0].astype(np.float64) for pair in pairs}


def background_matches(image: Image.Image | np.ndarray, prompt: Prompt) -> bool:
    """Whether the background has the texture and tone asked for, or none was; no part of the categories."""
    if prompt.texture is None and prompt.tone is None:
        return True
    pixels = as_pixels(image)
    cover, _, plane = coloured(pixels)
    # A faint tint is the soft edge of a thing: neither it nor the thing is background.
    ground = (cover < COVER) & (np.linalg.norm(plane, axis=2) < 25)
    light = pixels.mean(axis=2)
    errors = {pair: float(np.abs(light - bare)[ground].mean()) for pair, bare in _backgrounds().items()}
    texture, tone = min(errors, key=lambda pair: errors[pair])
    return prompt.texture in (None, texture) and prompt.tone in (None, tone)
