"""Continuous batching: prompts wait, slots draw, and whoever is done makes room at once."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image
from torch import Tensor

from .errors import ConfigError, NumericalError, PromptError
from .graphs import Lagged
from .results import Picture
from .slots import ACCEPTED, DONE, LENGTH, Inputs, Slots, check_room, prompt_inputs
from .tuning import WindowTuner

PREVIEW_SHARE = 0.02  # of the time, with preview_every="auto"
PreviewEvery = int | Literal["auto"]


@dataclass(eq=False)
class _Ticket:
    """A prompt on its way through a slot."""

    key: Hashable
    seed: int
    inputs: Inputs
    started: float = 0.0


@dataclass(frozen=True)
class Progress:
    """What one step did for one picture: tokens accepted now (local ids), tokens so far, a preview or None."""

    key: Hashable
    accepted: int
    tokens: list[int]
    length: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Advance:
    """One step of a session: the pictures in its slots, and those that have become ready."""

    progress: list[Progress] = field(default_factory=list)
    finished: dict[Hashable, Picture] = field(default_factory=dict)


class Session:
    """Draws prompts as they come, `slots.count` at a time; not for several threads at once.

    preview_every: a picture of what is there every so many steps; 0 = never, "auto" = as often as two hundredths of the
    time allow. On CUDA everything is known one step late, so that the device never waits.
    """

    lag = 0  # steps that reports come late

    def __init__(self, slots: Slots, preview_every: PreviewEvery = 0, tuner: WindowTuner | None = None) -> None:
        self.check(preview_every)
        self.slots, self.tuner, self.preview_every = slots, tuner, preview_every
        self.passes: Counter[int] = Counter()  # by width
        self._waiting: deque[_Ticket] = deque()
        self._slots: list[_Ticket | None] = [None] * slots.count
        self._reports = Lagged()
        self._launched: deque[tuple[tuple[_Ticket | None, ...], int]] = deque()
        self._leaving: list[tuple[_Ticket, Lagged, Lagged]] = []
        self._previews: dict[int, tuple[_Ticket, Lagged]] = {}
        if slots.window.device.type == "cuda":
            self.lag = 1
        self._step, self._preview_seconds, self._began = 0, 0.0, time.perf_counter()
        self._clock: float | None = None  # when the report before arrived, if nothing else happened since

    @staticmethod
    def check(preview_every: PreviewEvery) -> None:
        """Raise ConfigError for what is no number of steps."""
        if preview_every == "auto":
            return
        if isinstance(preview_every, bool) or not isinstance(preview_every, int) or preview_every < 0:
            raise ConfigError(f"preview_every={preview_every!r}: expected 0 (never), a number of steps, or 'auto'")

    @property
    def waiting(self) -> int:
        """Prompts without a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Pictures in slots."""
        return sum(ticket is not None for ticket in self._slots)

    @property
    def busy(self) -> bool:
        """Whether anything is still to come."""
        return bool(self._waiting or self.active or self._leaving)

    def submit(self, prompt: str, seed: int, key: Hashable) -> None:
        """Queue a prompt under a key that events will carry. Raises PromptError, ConfigError."""
        inputs = prompt_inputs(self.slots.model, self.slots.config, prompt)
        check_room(self.slots.model, self.slots.config, inputs)
        if inputs.length > self.slots.room:
            raise PromptError(
                f"the prompt has {inputs.length} tokens, the session was opened for at most {self.slots.room}; shorten "
                "it, or open a session with more room"
            )
        self._waiting.append(_Ticket(key, seed, inputs))

    def cancel(self, key: Hashable) -> bool:
        """Give a prompt up, waiting or half drawn; whether there was one."""
        found = any(ticket.key == key for ticket in self._waiting)
        self._waiting = deque(ticket for ticket in self._waiting if ticket.key != key)
        for slot, ticket in enumerate(self._slots):
            if ticket is not None and ticket.key == key:
                self._slots[slot] = None
                self.slots.stop(slot)
                found = True
        return found

    def cancel_all(self) -> None:
        """Give everything up; the slots are idle then."""
        for key in [ticket.key for ticket in (*self._waiting, *self._slots) if ticket is not None]:
            self.cancel(key)
        self._leaving.clear()

    def unfinished(self) -> list[Hashable]:
        """Keys of everything queued and not yet handed out, those in slots first."""
        tickets = [*(ticket for ticket, _, _ in self._leaving), *self._slots, *self._waiting]
        return [ticket.key for ticket in tickets if ticket is not None]

    def step(self) -> Advance:
        """Fill idle slots, do one forward pass, and tell what is known by now."""
        self._admit()
        progress: list[Progress] = []
        if self.active:
            width = self._choose_width()
            captured = self.slots.graphs.report().graphs
            self._reports.push(self.slots.step())
            if self.slots.graphs.report().graphs != captured:
                self._clock = None  # a capture takes longer than the pass that follows it
            self._launched.append((tuple(self._slots), width))
            self.passes[width] += 1
            self._step += 1
            if len(self._reports) > self.lag:
                progress = self._read()
        return Advance(progress, self._arrived())

    def _admit(self) -> None:
        for slot, ticket in enumerate(self._slots):
            if ticket is None and self._waiting:
                ticket = self._waiting.popleft()
                ticket.started = time.perf_counter()
                self.slots.start(slot, ticket.inputs, ticket.seed)
                self._slots[slot] = ticket
                self._clock = None

    def _choose_width(self) -> int:
        width = self.slots.window.width
        if self.tuner is not None and self.tuner.width != width:
            width = self.tuner.width
            self.slots.resize(width)
            self._clock = None
        return width

    def _read(self) -> list[Progress]:
        """Events of the oldest report; slots whose pictures are done become idle."""
        rows = self._reports.pop().tolist()
        tickets, width = self._launched.popleft()
        self._tell_tuner(width, rows, tickets)
        show = self._preview_due()
        progress = []
        for slot, (ticket, row) in enumerate(zip(tickets, rows)):
            if ticket is None or self._slots[slot] is not ticket:
                continue  # idle, or given up since
            count = row[ACCEPTED]
            new = row[len(row) - count :] if count else []
            progress.append(Progress(ticket.key, count, new, row[LENGTH], self._preview(slot, ticket, show)))
            if row[DONE]:
                tokens = self.slots.image_tokens(slot)
                summary = Lagged()
                summary.push(self.slots.summary(slot))
                self._leaving.append((ticket, summary, self.slots.pixels.start(tokens)))
                self._slots[slot] = None
                self._previews.pop(slot, None)
        return progress

    def _tell_tuner(self, width: int, rows: list[list[int]], tickets: tuple[_Ticket | None, ...]) -> None:
        now = time.perf_counter()
        if self.tuner is not None:
            accepted = [row[ACCEPTED] for row, ticket in zip(rows, tickets) if ticket is not None]
            seconds = None if self._clock is None else now - self._clock
            self.tuner.observe(width, seconds, sum(accepted) / max(1, len(accepted)))
        self._clock = now

    def _preview_due(self) -> bool:
        if isinstance(self.preview_every, str):
            return self._preview_seconds <= PREVIEW_SHARE * (time.perf_counter() - self._began)
        return self.preview_every > 0 and self._step % self.preview_every == 0

    def _preview(self, slot: int, ticket: _Ticket, show: bool) -> Image.Image | None:
        """The preview of a slot that has arrived; begins another if it is time to."""
        if self.preview_every == 0:
            return None
        started = time.perf_counter()
        if show:
            self._previews[slot] = (ticket, self.slots.pixels.start(self.slots.image_tokens(slot)))
        owner, arriving = self._previews.get(slot, (None, Lagged()))
        if owner is not ticket or not arriving.ready:
            return None
        del self._previews[slot]
        image = Image.fromarray(arriving.pop().numpy())
        self._preview_seconds += time.perf_counter() - started
        self._clock = None
        return image

    def _arrived(self) -> dict[Hashable, Picture]:
        """Finished pictures whose pixels are here; waits for them when there is nothing else to do."""
        finished, leaving = {}, []
        for ticket, summary, pixels in self._leaving:
            if self.active and not pixels.ready:
                leaving.append((ticket, summary, pixels))
            else:
                finished[ticket.key] = self._picture(ticket, summary.pop(), pixels.pop())
                self._clock = None
        self._leaving = leaving
        return finished

    def _picture(self, ticket: _Ticket, summary: Tensor, pixels: Tensor) -> Picture:
        count = self.slots.model.layout.image_count
        steps, position, step, *histogram = summary[: len(summary) - count].tolist()
        failure = None
        if position >= 0:
            message = (
                f"NaN or infinite logits: image {ticket.key}, step {step}, position {position}; "
                "try dtype='float32', or check the weights"
            )
            image = ticket.key if isinstance(ticket.key, int) else None
            failure = NumericalError(message, image=image, step=step, position=position)
        return Picture(
            None if failure else Image.fromarray(pixels.numpy()),
            summary[len(summary) - count :].clone(),
            steps,
            {accepted: times for accepted, times in enumerate(histogram) if times},
            time.perf_counter() - ticket.started,
            failure,
        )
