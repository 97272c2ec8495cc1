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
TIMED = 3  # passes that time a width at the beginning
DOUBT = 2.0  # how many times its first guess h may be when wide windows are given up untimed
MEMORY = 24  # latest timings of the width in use
DRIFT = 2.0  # how many times faster or slower the machine may get before all widths are timed again
SETTLE = 6  # passes after a change of width before acceptance counts: drafts have to ripen first
REVIEW = 24  # counted passes between two decisions
KNOWN = 32  # counted passes that make a width known; until then curiosity speaks for it
CURIOSITY, GAIN = 1.03, 1.04  # how much better it is taken to be, and what a change must promise
BOLD, ODDS = 768, 0.8  # every so many counted passes the likeliest unknown width is tried if it promises this share
TRUST = 40.0  # passes that the law is worth beside what was counted at a width
FORGET = 4096  # counted passes of a width, after which older ones weigh half
HALVES = tuple(1.3**n for n in range(2, 18))  # candidates for h: 1.7 to 87
HALF_SPREAD = 0.5  # of log h around its first guess


@dataclass
class _Seen:
    """What is known of a width."""

    timings: list[float] = field(default_factory=list)
    seconds: float | None = None  # of a pass, on the machine as it was when all widths were timed
    passes: float = 0.0
    accepted: float = 0.0


class WindowTuner:
    """Chooses among `widths`, beginning with `first`; `half`: the first guess for the width of half of A."""

    def __init__(self, first: int, widths: tuple[int, ...] = WIDTHS, half: float = 8.0) -> None:
        self.widths, self.half, self.width = tuple(sorted({first, *widths})), half, first
        self._first = first
        self._seen = {width: _Seen() for width in self.widths}
        self._trials = self._all_trials()
        self._recent: deque[float] = deque(maxlen=MEMORY)
        self._left: tuple[int, float] | None = None  # the width before, and the seconds that its passes took then
        self._settling, self._since_review, self._since_trial = SETTLE, 0, 0

    def _all_trials(self) -> list[int]:
        """Widths to be timed, the next one last: first itself, wider ones, narrower ones."""
        wider = [width for width in self.widths if width > self._first]
        return [*(width for width in self.widths if width < self._first), *wider[::-1], self._first]

    def observe(self, width: int, seconds: float | None, accepted: float) -> None:
        """A pass of `width` took so long (None: something else happened meanwhile), tokens accepted per row."""
        seen = self._seen[width]
        if width != self.width:
            return  # launched before the last change
        if self._trials:
            if seconds is not None:
                seen.timings.append(seconds)
            if len(seen.timings) >= TIMED:
                seen.seconds = statistics.median(seen.timings)
                self._next_trial()
            return
        if seconds is not None:
            self._recent.append(seconds)
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
        self._trials.remove(self.width)
        if self._trials and self.width > self._first and not self._wider_may_win():
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
        if len(self._recent) < MEMORY // 2:
            return
        now = statistics.median(self._recent)
        if self._left is not None:
            # Two long looks in a row tell the ratio of two widths better than the first short ones.
            before, then = self._left
            self._seen[self.width].seconds = self._time(before) * now / then
            self._left = None
        if not 1 / DRIFT < now / self._time(self.width) < DRIFT:
            self._time_again()
            return
        width = self._decided(self.rates())
        if width != self.width:
            self._left, self.width, self._settling = (self.width, now), width, SETTLE
            self._recent.clear()

    def _time_again(self) -> None:
        for seen in self._seen.values():
            seen.timings, seen.seconds = [], None
        self._trials = self._all_trials()
        self.width = self._first
        self._recent.clear()

    def _decided(self, promise: dict[int, float]) -> int:
        """The width to stay with: the present one unless another promises enough more, or is due for a trial."""
        unknown = [width for width in self.widths if self._seen[width].passes < KNOWN]
        if self.width in unknown:
            return self.width  # begun is half done
        hoped = {width: rate * (CURIOSITY if width in unknown else 1.0) for width, rate in promise.items()}
        best = max(hoped, key=lambda width: hoped[width])
        likely = max(unknown, default=best, key=lambda width: hoped[width])
        if self._since_trial >= BOLD and hoped[likely] > ODDS * hoped[self.width]:
            self._since_trial = 0
            return likely
        return best if hoped[best] > GAIN * hoped[self.width] else self.width

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
        """Seconds of a pass, no less than of a narrower one; in proportion to the widest that was timed beyond it."""
        times = [(w, seen.seconds) for w, seen in self._seen.items() if seen.seconds is not None]
        timed = max((w for w, _ in times if w <= width), default=times[0][0])
        least, most = max(t for w, t in times if w <= timed), min(t for w, t in times if w >= timed)
        return (least + most) / 2 * max(1.0, width / timed)
