"""window="auto": the width that accepts most tokens per second, by what has been measured so far.

Tokens accepted per pass saturate with the width, a(W) = A · W / (W + h), and a pass gets dearer, often in stairs. The
first passes of a decode time the widths, from the usual one outwards as long as the law gives them a chance; from then
on the widths in use tell how much is accepted, the law fills in for the others, and one that promises more is tried.
Every pass draws its picture like any other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96)
TIMED = 2  # passes that time a width at the beginning
DOUBT = 2.0  # how many times its first guess h may be when wide windows are given up untimed
MEMORY = 32  # latest timings of a width that count
SETTLE = 6  # passes after a change of width before acceptance counts: drafts have to ripen first
REVIEW = 24  # counted passes between two decisions
KNOWN = 32  # counted passes that make a width known; until then curiosity speaks for it
CURIOSITY, GAIN = 1.03, 1.02  # how much better it is taken to be, and what a change must promise
BOLD, ODDS = 768, 0.8  # every so many counted passes the likeliest unknown width is tried if it promises this share
TRUST = 64.0  # passes that the law is worth beside what was counted at a width
FORGET = 4096  # counted passes of a width, after which older ones weigh half
HALVES = tuple(1.3**n for n in range(2, 18))  # candidates for h: 1.7 to 87
HALF_SPREAD = 0.5  # of log h around its first guess


@dataclass
class _Seen:
    """What is known of a width."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    passes: float = 0.0
    accepted: float = 0.0


class WindowTuner:
    """Chooses among `widths`, beginning with `first`; `half`: the first guess for the width of half of A."""

    def __init__(self, first: int, widths: tuple[int, ...] = WIDTHS, half: float = 8.0) -> None:
        self.widths, self.half, self.width = tuple(sorted({first, *widths})), half, first
        self._first = first
        self._seen = {width: _Seen() for width in self.widths}
        # Widths still to be timed, the next one last: first itself, wider ones, narrower ones.
        narrower, wider = (tuple(w for w in self.widths if w < first), tuple(w for w in self.widths if w > first))
        self._trials = [*narrower, *wider[::-1], first]
        self._settling, self._since_review, self._since_trial = SETTLE, 0, 0

    def observe(self, width: int, seconds: float | None, accepted: float) -> None:
        """A pass of `width` took so long (None: something else happened meanwhile), tokens accepted per row."""
        seen = self._seen[width]
        if seconds is not None:
            seen.seconds.append(seconds)
        if width != self.width:
            return  # launched before the last change
        if self._trials:
            self._next_trial()
            return
        if self._settling:
            self._settling -= 1
            return
        seen.passes += 1
        seen.accepted += accepted
        if seen.passes >= FORGET:
            seen.passes, seen.accepted = seen.passes / 2, seen.accepted / 2
        self._since_review += 1
        if self._since_review >= REVIEW:
            self._review()

    def rates(self) -> dict[int, float]:
        """Tokens per second and row that each width is expected to accept."""
        top, half = self._law()
        return {width: self._acceptance(width, top, half) / self._time(width) for width in self.widths}

    def _next_trial(self) -> None:
        if len(self._seen[self.width].seconds) < TIMED:
            return
        self._trials.remove(self.width)
        if self.width > self._first and not self._wider_may_win():
            self._trials = [width for width in self._trials if width < self._first]
        self.width = self._trials[-1] if self._trials else self._first

    def _wider_may_win(self) -> bool:
        """Whether the widest could, at what the last one timed costs: then one in between could, too."""
        half, widest = DOUBT * self.half, self.widths[-1]
        gain = widest / (widest + half) * (self._first + half) / self._first
        return self._time(self.width) < gain * self._time(self._first)

    def _review(self) -> None:
        self._since_review = 0
        self._since_trial += REVIEW
        promise = self.rates()
        unknown = [width for width in self.widths if self._seen[width].passes < KNOWN]
        if self.width in unknown:
            return  # begun is half done
        for width in unknown:
            promise[width] *= CURIOSITY
        best = max(promise, key=lambda width: promise[width])
        likely = max(unknown, default=best, key=lambda width: promise[width])
        if self._since_trial >= BOLD and promise[likely] > ODDS * promise[self.width]:
            self.width, self._since_trial = likely, 0
        elif promise[best] > GAIN * promise[self.width]:
            self.width = best
        self._settling = SETTLE

    def _law(self) -> tuple[float, float]:
        """A and h of the law, by least squares over the widths seen, h held near its first guess."""
        seen = [(w, s.passes, s.accepted / s.passes) for w, s in self._seen.items() if s.passes]
        if not seen:
            return 1.0, self.half
        scale = statistics.mean(mean for _, _, mean in seen)  # a pass' acceptance varies by about itself
        found = []
        for half in HALVES:
            shares = [width / (width + half) for width, _, _ in seen]
            top = sum(n * mean * share for (_, n, mean), share in zip(seen, shares))
            top /= sum(n * share * share for (_, n, _), share in zip(seen, shares))
            misfit = sum(n * (mean - top * share) ** 2 for (_, n, mean), share in zip(seen, shares)) / scale**2
            found.append((misfit + (math.log(half / self.half) / HALF_SPREAD) ** 2, top, half))
        return min(found)[1:]

    def _acceptance(self, width: int, top: float, half: float) -> float:
        seen = self._seen[width]
        expected = top * width / (width + half)
        return (seen.accepted + TRUST * expected) / (seen.passes + TRUST)

    def _time(self, width: int) -> float:
        """Median seconds of the latest passes; in proportion to the next narrower width for one that was given up."""
        timed = next(w for w in reversed(self.widths) if w <= width and self._seen[w].seconds)
        return statistics.median(self._seen[timed].seconds) * width / timed
