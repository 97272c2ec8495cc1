"""DecodeConfig: every option of a decode, checked when it is made."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import ConfigError

DECODERS = ("ar", "jacobi", "sjd", "coupled", "sjd2")
VERIFICATIONS = ("match", "ratio", "paper")
COUPLINGS = ("gumbel", "maximal", "none")
WARMUPS = ("tokens", "noise")
AUTO = "auto"
AUTO_WIDTH = 96  # the widest that window="auto" considers
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode; the fields are the keyword options of `Engine.generate`.

    decoder          one of `DECODERS`
    window           model inputs per forward pass and image (`ar` always uses one); "auto": the engine measures which
                     is fastest and may change it on the way (`sjd` and `coupled` then draw other, equally lawful
                     pictures for the same seed from run to run)
    denoise_levels   noise levels of `sjd2`: forward passes from pure noise to a clean draft
    t_min            the smallest noise level, in (0, 1)
    guidance_scale   l_uncond + s · (l_cond − l_uncond), where the model gives both
    temperature      0 = always the likeliest token
    top_k, top_p     0 and 1.0 switch them off
    seed             of the image, or one per prompt
    verification     `sjd2`: "match" (the tokens of `ar`), "ratio" (its law) or "paper" (not exact)
    coupling         how drafts behind a rejection are renewed: `coupled`, and `sjd2` unless in "match"
    repeat_distance  a token draft without a prediction repeats the accepted token so many positions before it
                     (a row above, say: SJD's vertical repeat); 0 = a random image id
    warmup           `sjd2`: the first window starts as "tokens" or, as published, as "noise"
    negative_prompt  prompt of the unconditional rows
    max_batch        images decoded at the same time
    """

    decoder: str = "ar"
    window: int | Literal["auto"] = 32
    denoise_levels: int = 5
    t_min: float = 0.05
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | tuple[int, ...] = 0
    verification: str = "match"
    coupling: str = "gumbel"
    repeat_distance: int = 0
    warmup: str = "tokens"
    negative_prompt: str = ""
    max_batch: int = 16

    def __post_init__(self) -> None:
        self._check_choice("decoder", DECODERS)
        self._check_choice("verification", VERIFICATIONS)
        self._check_choice("coupling", COUPLINGS)
        self._check_choice("warmup", WARMUPS)
        if self.window != AUTO:
            self._check_int("window", 1, 4096)
        self._check_int("denoise_levels", 1, 1000)
        self._check_int("repeat_distance", 0, 2**31 - 1)
        self._check_int("top_k", 0, 2**31 - 1)
        self._check_int("max_batch", 1, 65536)
        self._check_float("temperature", 0.0, math.inf)
        self._check_float("top_p", 0.0, 1.0, open_below=True)
        self._check_float("t_min", 0.0, 1.0, open_below=True, open_above=True)
        self._check_float("guidance_scale", -math.inf, math.inf)
        if not isinstance(self.negative_prompt, str):
            raise ConfigError(f"negative_prompt={self.negative_prompt!r}: expected a str")
        object.__setattr__(self, "seed", _checked_seed(self.seed))
        if self.decoder == "sjd2" and self.verification == "paper" and self.coupling == "maximal":
            raise ConfigError(
                "verification='paper' redraws by its own rule, so coupling='maximal' has no meaning there; "
                "use coupling='none' (as published) or 'gumbel', or verification='ratio'"
            )

    @property
    def width(self) -> int:
        """Model inputs per forward pass and row, at most."""
        if self.decoder == "ar":
            return 1
        return AUTO_WIDTH if self.window == "auto" else self.window

    @property
    def exact(self) -> bool:
        """Whether the output follows the law of plain autoregressive decoding."""
        return not (self.decoder == "sjd2" and self.verification == "paper")

    @property
    def uses_noise(self) -> bool:
        """Whether the model will see noisy embeddings, hence must have been trained for them."""
        return self.decoder == "sjd2"

    def seeds(self, count: int) -> list[int]:
        """One seed per image: the given ones, or seed, seed + 1, …"""
        if isinstance(self.seed, int):
            return [(self.seed + index) % (MAX_SEED + 1) for index in range(count)]
        if len(self.seed) != count:
            raise ConfigError(f"seed has {len(self.seed)} entries for {count} images; give one int, or one each")
        return list(self.seed)

    @classmethod
    def build(cls, defaults: Mapping[str, Any] | None = None, **options: Any) -> DecodeConfig:
        """Merge options over `defaults`; `None` stands for the default.

        `defaults` may hold, beside options, a mapping per decoder name whose entries win over the general
        ones when that decoder is used: {"top_k": 100, "sjd2": {"window": 64}}.
        """
        defaults = defaults or {}
        given = {name: value for name, value in options.items() if value is not None}
        _check_names(given)
        general = {name: value for name, value in defaults.items() if name not in DECODERS}
        decoder = given.get("decoder", general.get("decoder", cls.decoder))
        special = defaults.get(decoder) or {} if isinstance(decoder, str) else {}
        merged = {**general, **special}
        _check_names(merged)
        return cls(**{**{k: v for k, v in merged.items() if v is not None}, **given})

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(choices)}{hint}")

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = _as_int(getattr(self, name))
        if value is None or not low <= value <= high:
            raise ConfigError(f"{name}={getattr(self, name)!r}: expected an integer from {low} to {high}")
        object.__setattr__(self, name, value)

    def _check_float(
        self, name: str, low: float, high: float, open_below: bool = False, open_above: bool = False
    ) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if good:
            good = (low < value if open_below else low <= value) and (value < high if open_above else value <= high)
        if not good:
            left, right = "(" if open_below else "[", ")" if open_above else "]"
            raise ConfigError(f"{name}={value!r}: expected a finite number in {left}{low:g}, {high:g}{right}")
        object.__setattr__(self, name, float(value))


def _as_int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _checked_seed(seed: Any) -> int | tuple[int, ...]:
    one = _as_int(seed)
    if one is None and isinstance(seed, Iterable) and not isinstance(seed, (str, bytes)):
        many = tuple(_as_int(value) for value in seed)
    else:
        many = (one,)
    if not many or any(value is None or not 0 <= value <= MAX_SEED for value in many):
        raise ConfigError(f"seed={seed!r}: expected an integer from 0 to 2**63 - 1, or one per prompt")
    return one if one is not None else tuple(value for value in many if value is not None)


def _check_names(options: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(DecodeConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.0)
            raise ConfigError(f"unknown option {name!r}; did you mean {close[0]!r}? All options: {', '.join(known)}")
