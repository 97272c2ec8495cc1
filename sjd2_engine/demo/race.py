"""Decoders side by side on one prompt and one seed, as a task of the engine's thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..config import DecodeConfig
from ..engine import Engine
from ..results import Picture
from ..serve.engine_thread import EngineThread

KEY = "race"
FRAME_S = 0.1  # between two frames on the page
SHOW_S = 8.0  # a race that is over sooner is shown in slow motion
WARM_UP = 3  # passes of each decoder before the race: the first ones allocate, and capture graphs
PATIENCE_S = 1.0  # between two looks at whether the engine's thread still runs


@dataclass(frozen=True)
class LaneView:
    """A decoder at one moment of the race.

    seconds: spent in its own passes alone. length: accepted of `total` positions. accepted: by its last pass.
    levels: noise level of each draft in the window, −1 = a token; empty for plain AR and when it is over.
    image: of what is accepted and guessed, arbitrary elsewhere. picture: what came out, once it is over.
    """

    config: DecodeConfig
    seconds: float
    forward_passes: int
    length: int
    total: int
    accepted: int
    levels: tuple[int, ...]
    image: Image.Image
    picture: Picture | None = None


@dataclass(frozen=True)
class Frame:
    """All lanes at one moment; slow_motion: how many times slower than it ran the race is shown."""

    lanes: tuple[LaneView, ...]
    slow_motion: float

    @property
    def over(self) -> bool:
        return all(lane.picture is not None for lane in self.lanes)


class _Lane:
    """One decoder in a slot of its own."""

    def __init__(self, engine: Engine, config: DecodeConfig, room: int | None) -> None:
        options = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "seed"}
        self.engine, self.config = engine, config
        self.session = engine.session(slots=1, room=room, **options)
        self.seconds, self.passes, self.accepted = 0.0, 0, 0
        self.picture: Picture | None = None
        self._view: LaneView | None = None

    def warm_up(self, prompt: str, seed: int) -> float:
        """Some passes that do not count; returns the seconds of the last one."""
        self.session.submit(prompt, seed, KEY)
        for _ in range(WARM_UP):
            self.step()
        last, self.seconds, self.passes, self.picture, self._view = self._last, 0.0, 0, None, None
        self.session.cancel_all()
        return last

    def step(self) -> None:
        """One forward pass, waited for, on this lane's own clock."""
        self._view = None
        started = time.perf_counter()
        advance = self.session.step()
        if self.engine.device.type == "cuda":
            # Or this pass would run on the next lane's clock.
            torch.cuda.synchronize(self.engine.device)
        self._last = time.perf_counter() - started
        self.seconds += self._last
        for progress in advance.progress:
            self.passes += 1
            self.accepted = progress.accepted
        for picture in advance.finished.values():
            self.picture, self.passes = picture, picture.forward_passes

    @torch.inference_mode()
    def view(self) -> LaneView:
        """This lane as it is now; the time for it is not on its clock."""
        if self._view is None:
            levels = () if self.picture else tuple(self.session.slots.window.inputs().levels[0, 1:].tolist())
            image = self.picture.image if self.picture else None
            total, length = len(self.engine.model.layout), int(self.session.slots.window.lengths[0])
            self._view = LaneView(
                self.config, self.seconds, self.passes, length, total, self.accepted, levels, image or self._so_far(),
                self.picture,
            )  # fmt: skip
        return self._view

    def _so_far(self) -> Image.Image:
        """Accepted tokens, and the window's guesses where they are tokens."""
        window, layout = self.session.slots.window, self.engine.model.layout
        inputs, tokens = window.inputs(), window.tokens.clone()
        drafts, positions = inputs.tokens[0, 1:].tolist(), inputs.positions[0, 1:].tolist()
        for token, position in zip(drafts, positions):
            if token >= 0 and position < len(layout):
                tokens[0, position] = token
        pixels = self.engine.model.decode_pixels(layout.image_tokens(tokens).clamp(min=0))
        return Image.fromarray(pixels[0].cpu().numpy())


class Race:
    """Lanes that take turns on one engine: whichever has used the least time of its own goes next.

    So at every moment all have had the same time, as if each had the device to itself. It runs in the engine's thread,
    in turn with whatever else that draws; `frames` is read in another thread.
    """

    def __init__(self, thread: EngineThread, prompt: str, seed: int, configs: Sequence[DecodeConfig]) -> None:
        self.thread, self.prompt, self.seed, self.configs = thread, prompt, seed, configs
        self._stopped = False
        self._posted: queue.SimpleQueue[Frame | Exception | None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Give it up; whoever watched is gone."""
        self._stopped = True

    def frames(self) -> Iterator[Frame]:
        """Run the race: frames as they come, the last one with every picture. Raises what the decode raised."""
        self.thread.run(self._task())
        while True:
            try:
                posted = self._posted.get(timeout=PATIENCE_S)
            except queue.Empty:
                if self.thread.alive:
                    continue
                raise RuntimeError("the server has stopped") from None
            if posted is None:
                return
            if isinstance(posted, Exception):
                raise posted
            yield posted

    def _task(self) -> Iterator[None]:
        try:
            yield from self._race()
        except Exception as error:
            self._posted.put(error)
        finally:
            self._posted.put(None)

    def _race(self) -> Iterator[None]:
        lanes, longest = [], 0.0
        for config in self.configs:
            lane = _Lane(self.thread.engine, config, self.thread.room)
            passes = len(self.thread.engine.model.layout) if config.decoder == "ar" else 0
            longest = max(longest, passes * lane.warm_up(self.prompt, self.seed))
            lanes.append(lane)
            yield
        slow_motion = max(1.0, SHOW_S / longest) if longest else 1.0
        for lane in lanes:
            lane.session.submit(self.prompt, self.seed, KEY)
        due = 0.0
        while racing := [lane for lane in lanes if lane.picture is None]:
            if self._stopped:
                return
            lane = min(racing, key=lambda lane: lane.seconds)
            if lane.seconds > 0 and lane.seconds >= due:  # before its first pass a lane shows what it drew last
                self._posted.put(Frame(tuple(lane.view() for lane in lanes), slow_motion))
                due = lane.seconds + FRAME_S / slow_motion
            lane.step()
            yield
        self._posted.put(Frame(tuple(lane.view() for lane in lanes), slow_motion))
