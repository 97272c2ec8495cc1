"""Word tokenizer of the bundled model: one id per word of the caption grammar, placed after the image ids."""

from __future__ import annotations

import difflib
import re

from ..errors import PromptError
from .vq import CODES
from .world import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES, TEXTURES, TONES

END_OF_LINE = CODES  # local id of the one structure token
BEGIN = CODES + 1
BEGIN_IMAGE = CODES + 2
FIRST_WORD = CODES + 3
MAX_WORDS = 24
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        ["a", "an", "and", "on", "background", "small", "large"]
        + [word for relation in RELATIONS for word in relation.split()]
        + [*NUMBERS, *COLOURS, *SHAPES, *PLURALS.values(), *TEXTURES, *TONES]
    )
)
VOCABULARY = FIRST_WORD + len(WORDS)
_ID_OF = {word: FIRST_WORD + index for index, word in enumerate(WORDS)}


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def encode(text: str) -> list[int]:
    """Ids of a prompt: begin, words, begin-of-image; the empty text is the unconditional prompt.

    Raises PromptError for a word outside the vocabulary or more than 24 words.
    """
    words = words_of(text)
    for word in words:
        if word not in _ID_OF:
            near = difflib.get_close_matches(word, WORDS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise PromptError(
                f"The model does not know the word {word!r} in {text!r}. {hint}It knows: {', '.join(sorted(WORDS))}."
            )
    if len(words) > MAX_WORDS:
        raise PromptError(f"The prompt has {len(words)} words, the model reads at most {MAX_WORDS}: shorten it.")
    return [BEGIN, *(_ID_OF[word] for word in words), BEGIN_IMAGE]
