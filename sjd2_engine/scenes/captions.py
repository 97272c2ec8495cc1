"""Captions and scenes drawn together: every caption is true of its scene, and some captions are held out."""

from __future__ import annotations

import zlib

import numpy as np

from .world import (
    CATEGORIES,
    COLOURS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIDE,
    TEXTURES,
    TONES,
    Item,
    Phrase,
    Prompt,
    Scene,
)

GRID = 8  # centres lie on a grid of this many pixels, the corners of the tokens: a shape is then always cut alike
MARGIN = 4  # pixels between things, and between a thing and the border
REACH = 1.2  # outline of the widest shape, in radii
WORD_OF = {count: word for word, count in NUMBERS.items()}
HELD_OUT_ONE_IN = 10


def held_out(text: str) -> bool:
    """Whether a caption is kept from training: a tenth of all texts, by checksum."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def _say(phrase: Phrase) -> str:
    noun = phrase.shape if phrase.count == 1 else PLURALS[phrase.shape]
    words = [word for word in (phrase.size, phrase.colour, noun) if word]
    article = ("an" if words[0][0] in "aeiou" else "a") if phrase.count == 1 else WORD_OF[phrase.count]
    return " ".join([article, *words])


def caption(phrases: tuple[Phrase, ...], relation: str | None, texture: str | None, tone: str | None) -> str:
    """The one way to say a meaning, such as `a red circle left of a small star on a dotted grey background`."""
    text = f" {relation or 'and'} ".join(_say(phrase) for phrase in phrases)
    ground = " ".join(word for word in (texture, tone) if word)
    return f"{text} on a {ground} background" if ground else text


def _pick(rng: np.random.Generator, options) -> str:
    return str(options[int(rng.integers(len(options)))])


def _phrases(rng: np.random.Generator, category: str) -> tuple[Phrase, ...]:
    colours = list(COLOURS)
    if category in ("single object", "colours"):
        size = _pick(rng, ("small", "large")) if rng.random() < 0.35 else None
        return (Phrase(_pick(rng, SHAPES), 1, _pick(rng, colours) if category == "colours" else None, size),)
    if category == "counting":
        colour = _pick(rng, colours) if rng.random() < 0.5 else None
        return (Phrase(_pick(rng, SHAPES), int(rng.integers(2, 5)), colour),)
    first, second = rng.permutation(SHAPES)[:2]
    if category == "colour attribution" or (category == "position" and rng.random() < 0.6):
        hues = rng.permutation(colours)[:2]
        size = _pick(rng, ("small", "large")) if rng.random() < 0.2 else None
        return Phrase(str(first), 1, str(hues[0]), size), Phrase(str(second), 1, str(hues[1]))
    return Phrase(str(first)), Phrase(str(second))


def sample_prompt(rng: np.random.Generator, category: str | None = None) -> Prompt:
    """A random caption with its meaning; categories are those of GenEval (arXiv 2310.11513)."""
    category = category or _pick(rng, CATEGORIES)
    phrases = _phrases(rng, category)
    relation = _pick(rng, RELATIONS) if category == "position" else None
    texture = _pick(rng, TEXTURES) if rng.random() < 0.5 else None
    tone = _pick(rng, list(TONES)) if texture else None
    return Prompt(caption(phrases, relation, texture, tone), category, phrases, relation, texture, tone)


def _holds(relation: str | None, a: tuple[int, int], b: tuple[int, int]) -> bool:
    dx, dy = a[0] - b[0], a[1] - b[1]
    if relation is None:
        return True
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    wanted = along < 0 if relation in ("left of", "above") else along > 0
    return wanted and abs(along) >= abs(across)


def _place(rng: np.random.Generator, radii: list[int], relation: str | None) -> list[tuple[int, int]]:
    """Centres for things of these radii: apart from each other, inside the picture, in the relation asked for."""
    while True:
        spots: list[tuple[int, int]] = []
        for radius in radii:
            low = -(-int(REACH * radius + MARGIN) // GRID)
            for _ in range(30):
                x, y = (int(v) * GRID for v in rng.integers(low, SIDE // GRID - low + 1, 2))
                apart = (
                    (x - u) ** 2 + (y - v) ** 2 >= (REACH * (radius + r) + MARGIN) ** 2
                    for (u, v), r in zip(spots, radii, strict=False)
                )
                if all(apart):
                    spots.append((x, y))
                    break
            else:
                break
        if len(spots) == len(radii) and (len(spots) < 2 or _holds(relation, spots[0], spots[1])):
            return spots


def scene_of(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene of which the caption is true; what it leaves open is drawn freely."""
    things = []
    for phrase in prompt.phrases:
        taken = {colour for _, colour, _ in things}
        colour = phrase.colour or _pick(rng, [c for c in COLOURS if c not in taken])
        things += [(phrase.shape, colour, phrase.size or "medium")] * phrase.count
    items = tuple(Item(shape, colour, size, 0, 0) for shape, colour, size in things)
    spots = _place(rng, [item.radius for item in items], prompt.relation)
    placed = tuple(Item(i.shape, i.colour, i.size, x, y) for i, (x, y) in zip(items, spots, strict=True))
    return Scene(placed, prompt.texture or _pick(rng, TEXTURES), prompt.tone or _pick(rng, list(TONES)))


def sample_training_pair(rng: np.random.Generator) -> tuple[Prompt, Scene]:
    """A caption that is not held out, and a scene for it."""
    while True:
        prompt = sample_prompt(rng)
        if not held_out(prompt.text):
            return prompt, scene_of(prompt, rng)


def heldout_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Captions that training never saw, all different, the six categories in turn."""
    rng = np.random.default_rng([seed, 0x5CE7E])
    prompts: list[Prompt] = []
    seen: set[str] = set()
    misses = 0
    while len(prompts) < count:
        prompt = sample_prompt(rng, CATEGORIES[len(prompts) % len(CATEGORIES)])
        misses += 1
        # A category with few captions may run out of new ones; then they come round again.
        if held_out(prompt.text) and (prompt.text not in seen or misses > 2000):
            prompts.append(prompt)
            seen.add(prompt.text)
            misses = 0
    return prompts
