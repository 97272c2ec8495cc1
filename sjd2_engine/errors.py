"""The errors users meet; every message says what was given, what is expected and what to do."""

from __future__ import annotations


class Sjd2Error(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(Sjd2Error, ValueError):
    """An option, shape or combination of options that cannot work."""


class PromptError(Sjd2Error, ValueError):
    """A prompt the model cannot take."""


class CheckpointError(Sjd2Error):
    """Weights that are missing, damaged, or not made for what is asked of them."""


class BackendError(Sjd2Error):
    """A device, kernel library or compiler that is not usable here."""


class NumericalError(Sjd2Error):
    """NaN or infinite logits: names image, step and position (`None` where unknown)."""

    def __init__(
        self, message: str, *, image: int | None = None, step: int | None = None, position: int | None = None
    ) -> None:
        super().__init__(message)
        self.image, self.step, self.position = image, step, position
