"""TokenLayout: which positions of a picture hold image tokens, and which a known structure token."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ConfigError


@dataclass(frozen=True)
class TokenLayout:
    """One entry per position: −1 = an image token, else the local id of a forced structure token.

    Local ids: 0 … V−1 are image tokens, V … V+F−1 structure tokens. `image_vocab` is V; where it is not
    given, the window takes the smallest forced id for it. `legal` (first, end) narrows the image ids
    that may be drawn, for codebooks that are padded.
    """

    forced: tuple[int, ...]
    image_vocab: int | None = None
    legal: tuple[int, int] | None = None

    def __init__(
        self, forced: Iterable[int], image_vocab: int | None = None, legal: Sequence[int] | None = None
    ) -> None:
        object.__setattr__(self, "forced", _integers("forced", forced))
        object.__setattr__(self, "image_vocab", image_vocab)
        object.__setattr__(self, "legal", None if legal is None else _integers("legal", legal))
        self._check()

    def _check(self) -> None:
        bad = [value for value in self.forced if value < -1]
        if bad:
            raise ConfigError(f"forced holds {bad[0]}: expected -1 (image token) or a local id of at least 0")
        if -1 not in self.forced:
            raise ConfigError(f"forced has {len(self.forced)} entries and no image token (-1) among them")
        if self.image_vocab is None:
            vocab = self.smallest_forced
        else:
            (vocab,) = _integers("image_vocab", (self.image_vocab,))
            if vocab < 1:
                raise ConfigError(f"image_vocab={vocab}: expected at least 1")
            if self.smallest_forced is not None and self.smallest_forced < vocab:
                raise ConfigError(
                    f"forced holds {self.smallest_forced}, which is an image id (image_vocab={vocab}): "
                    f"structure tokens have local ids from {vocab}"
                )
        if vocab == 0:
            raise ConfigError("forced holds 0, which is an image id: structure tokens come after the image ids")
        if self.legal is not None:
            first, end = self.legal if len(self.legal) == 2 else (0, 0)
            if not 0 <= first < end <= (vocab or end):
                bound = vocab or "V"
                raise ConfigError(f"legal={self.legal}: expected (first, end) with 0 <= first < end <= {bound}")

    @classmethod
    def raster(
        cls,
        height: int,
        width: int,
        *,
        image_vocab: int,
        eol: bool | int = True,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        legal: Sequence[int] | None = None,
    ) -> TokenLayout:
        """`height` rows of `width` image tokens, each ended by the forced token `eol` (True = local id V)."""
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least 1")
        end = [image_vocab if eol is True else eol] if eol is not False else []
        return cls([*prefix, *([-1] * width + end) * height, *suffix], image_vocab, legal)

    def __len__(self) -> int:
        return len(self.forced)

    @property
    def smallest_forced(self) -> int | None:
        """The smallest structure id in use; `None` without forced positions."""
        return min((value for value in self.forced if value >= 0), default=None)

    @cached_property
    def image_positions(self) -> tuple[int, ...]:
        """The positions that hold image tokens, in order."""
        return tuple(index for index, value in enumerate(self.forced) if value < 0)

    @property
    def image_count(self) -> int:
        """How many image tokens a picture has."""
        return len(self.image_positions)

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """Leave the forced tokens out: [B, N] → [B, image_count]."""
        if tokens.dim() != 2 or tokens.shape[1] != len(self):
            raise ConfigError(f"tokens have shape {tuple(tokens.shape)}: expected [B, {len(self)}]")
        return tokens[:, torch.tensor(self.image_positions, device=tokens.device)]

    def all_tokens(self, image_tokens: Tensor) -> Tensor:
        """Put the forced tokens in: [B, image_count] → [B, N]."""
        if image_tokens.dim() != 2 or image_tokens.shape[1] != self.image_count:
            raise ConfigError(f"image tokens have shape {tuple(image_tokens.shape)}: expected [B, {self.image_count}]")
        tokens = torch.tensor(self.forced, dtype=image_tokens.dtype, device=image_tokens.device)
        tokens = tokens.repeat(image_tokens.shape[0], 1)
        tokens[:, torch.tensor(self.image_positions, device=tokens.device)] = image_tokens
        return tokens


def _integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ConfigError(f"{name}={values!r}: expected integers") from None
