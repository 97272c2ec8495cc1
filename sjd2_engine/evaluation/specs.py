"""The words of `--decoders`: which decoder, on which weights, with which options.

    name[@weights][:option]...      several of them separated by commas

`weights` is `base` or `sjd2` (the tuned sibling); left out, sjd2 runs on the tuned weights and all others on
the base. An option is `key=value` with a key of DecodeConfig (`W` and `K` stand for window and
denoise_levels), or a word of its own: match, ratio, paper (verification); gumbel, maximal, independent
(coupling).
Examples: `coupled:gumbel`, `sjd2:ratio:W=64:K=5`, `jacobi@sjd2:window=16`.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError

SHORT_KEYS = {"W": "window", "K": "denoise_levels"}
WORDS: dict[str, tuple[str, Any]] = {
    "match": ("verification", "match"),
    "ratio": ("verification", "ratio"),
    "paper": ("verification", "paper"),
    "gumbel": ("coupling", "gumbel"),
    "maximal": ("coupling", "maximal"),
    "independent": ("coupling", "none"),
}
WEIGHTS = ("base", "sjd2")


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder as asked for on the command line."""

    decoder: str
    weights: str  # "base" or "sjd2"
    options: tuple[tuple[str, Any], ...] = ()
    words: tuple[str, ...] = ()  # the options as written, for the row's name

    @property
    def name(self) -> str:
        """The row's name: as written, without the weights, which stand in a column of their own."""
        return ":".join((self.decoder, *self.words))

    def with_window(self, window: int) -> DecoderSpec:
        """The same with this window; a spec that already names one, and `ar`, stay as they are."""
        if self.decoder == "ar" or any(key == "window" for key, _ in self.options):
            return self
        return replace(self, options=(*self.options, ("window", window)), words=(*self.words, f"W={window}"))


def _option(word: str, spec: str) -> tuple[str, Any]:
    if word in WORDS:
        return WORDS[word]
    key, sign, value = word.partition("=")
    if not (sign and key and value):
        near = difflib.get_close_matches(word, WORDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected key=value or one of {', '.join(WORDS)}"
        raise ConfigError(f"option '{word}' of decoder '{spec}' is not understood; {hint}")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = value
    return SHORT_KEYS.get(key, key), parsed


def parse_spec(text: str) -> DecoderSpec:
    """Read one decoder spec; its name and values are checked when its config is made."""
    head, *words = (part.strip() for part in text.strip().split(":"))
    decoder, at, weights = head.partition("@")
    if not decoder:
        raise ConfigError(f"'{text}' names no decoder; expected name[@base|@sjd2][:option]..., as in sjd2:W=64")
    if at and weights not in WEIGHTS:
        raise ConfigError(f"'{text}' asks for weights '{weights}'; expected @base or @sjd2")
    options = tuple(_option(word, decoder) for word in words)
    keys = [key for key, _ in options]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"decoder '{text}' sets the same option twice")
    return DecoderSpec(decoder, weights or ("sjd2" if decoder == "sjd2" else "base"), options, tuple(words))


def parse_specs(text: str, windows: str = "auto") -> list[DecoderSpec]:
    """Read a comma-separated list; `windows` ("auto" or "16,32") runs every spec once per window.

    AR is put in front for each set of weights that is used: every speed-up is against it.
    """
    wanted = [parse_spec(part) for part in text.split(",") if part.strip()]
    if not wanted:
        raise ConfigError("--decoders names no decoder; try --decoders ar,sjd,sjd2")
    if windows != "auto":
        wanted = [spec.with_window(window) for spec in wanted for window in _windows(windows)]
    rows: list[DecoderSpec] = []
    for weights in WEIGHTS:
        mine = [spec for spec in wanted if spec.weights == weights]
        if mine:
            rows += [DecoderSpec("ar", weights), *mine]
    return list(dict.fromkeys(rows))


def _windows(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--windows is '{text}'; expected auto, or sizes of at least 1 such as 16,32,64")
    return sizes
