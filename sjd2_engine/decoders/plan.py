"""What a decoder is to the window: a rule of verification, and how drafts begin and are renewed."""

from __future__ import annotations

from dataclasses import dataclass

from sjd2_kernels import reference


@dataclass(frozen=True)
class Plan:
    """A decoder in terms of the window's ops.

    rule          how drafts are verified: one of the rules of `sjd2_kernels.reference`
    per_position  draws from p use the Gumbel noise of their position, the same in every step
    noisy         new positions start as Gaussian noise and are denoised level by level
    noisy_start   so do the positions of the very first window (else they start as tokens)
    nearest       the token of a noisy draft is the nearest vocabulary row, not the last prediction
    """

    rule: int
    per_position: bool
    noisy: bool = False
    noisy_start: bool = False
    nearest: bool = False

    @property
    def tracks_q(self) -> bool:
        """Whether drafts must keep the distribution they were drawn from."""
        return self.rule != reference.MATCH
