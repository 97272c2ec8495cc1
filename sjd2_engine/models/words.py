"""Word tokenizer for models with a closed vocabulary: one id per word, in the order the checkpoint gives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from ..errors import PromptError


class WordTokenizer:
    """Maps lower-case words to `first`, `first + 1`, …; `longest` is the number of words the model can read."""

    def __init__(self, words: Sequence[str], first: int, longest: int) -> None:
        self.words, self.longest = tuple(words), longest
        self._id_of = {word: first + index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text; punctuation and case do not matter.

        Raises PromptError for words outside the vocabulary and for texts that are too long.
        """
        words = re.findall(r"[^\W_]+", text.lower())
        if len(words) > self.longest:
            raise PromptError(f"the prompt has {len(words)} words, the model reads at most {self.longest}; shorten it")
        for word in words:
            if word not in self._id_of:
                raise PromptError(self._unknown(word, text))
        return [self._id_of[word] for word in words]

    def _unknown(self, word: str, text: str) -> str:
        near = difflib.get_close_matches(word, self.words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"the model does not know the word {word!r} of {text!r}{hint} It knows: {', '.join(sorted(self.words))}"
