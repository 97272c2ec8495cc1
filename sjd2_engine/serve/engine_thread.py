"""The one thread that owns an engine: orders come in from anywhere, pictures go out by callbacks."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from PIL import Image

from ..config import DecodeConfig
from ..engine import Engine
from ..memory import is_out_of_memory
from ..results import Picture
from ..session import Progress, Session

logger = logging.getLogger(__name__)
_numbers = count(1)


@dataclass(frozen=True)
class Partial:
    """What there is of a picture: the index-th preview, from 0."""

    index: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """A picture, or the NumericalError inside it."""

    picture: Picture


@dataclass(frozen=True)
class Failed:
    """Why there will be no picture."""

    error: Exception


Event = Partial | Finished | Failed


@dataclass(eq=False)
class Order:
    """A picture that somebody waits for.

    config: with seed 0; orders of equal configurations are drawn together. partials: previews wanted on the way.
    post: takes the events, from the engine's thread, and must return at once; the last one is Finished or Failed.
    """

    prompt: str
    seed: int
    config: DecodeConfig
    post: Callable[[Event], None]
    partials: int = 0
    sent: int = 0
    number: int = field(default_factory=lambda: next(_numbers))


class QueueFull(Exception):
    """More pictures are waiting than the server allows."""


@dataclass(eq=False)
class _Group:
    """An open session and the orders in it."""

    session: Session
    orders: dict[int, Order] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)  # of orders with previews

    @property
    def free(self) -> bool:
        return len(self.orders) < self.session.slots.count


class EngineThread:
    """Draws orders, `slots` at a time per configuration, with at most `sessions` configurations open.

    Open configurations take turns, one forward pass each. An order whose configuration cannot be opened yet keeps
    later orders waiting, so that a steady stream of one configuration never shuts out another. `room` is passed on to
    `Engine.session`. Everything public may be called from any thread.
    """

    def __init__(self, engine: Engine, slots: int, sessions: int, queue: int, room: int | None = None) -> None:
        self.engine, self.slots, self.sessions, self.queue, self.room = engine, slots, sessions, queue, room
        self._changed = threading.Condition()
        self._queues: dict[DecodeConfig, deque[Order]] = {}
        self._cancelled: set[int] = set()
        self._tasks: deque[Iterator[None]] = deque()
        self._groups: OrderedDict[DecodeConfig, _Group] = OrderedDict()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="sjd2-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End after the forward pass under way; orders that are left fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Orders without a slot."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @property
    def active(self) -> int:
        """Orders in slots."""
        return sum(len(group.orders) for group in list(self._groups.values()))

    def submit(self, orders: Iterable[Order]) -> None:
        """Queue all of them or none. Raises QueueFull."""
        orders = list(orders)
        with self._changed:
            if sum(map(len, self._queues.values())) + len(orders) > self.queue:
                raise QueueFull(f"{self.queue} pictures may wait, and there is no room for {len(orders)} more")
            for order in orders:
                self._queues.setdefault(order.config, deque()).append(order)
            self._changed.notify()

    def cancel(self, orders: Iterable[Order]) -> None:
        """Give orders up, wherever they are; those that are over already do not mind."""
        with self._changed:
            self._cancelled |= {order.number for order in orders}
            self._changed.notify()

    def run(self, task: Iterator[None]) -> None:
        """Let something else use the engine: one `next` at a time, in turn with the sessions. It handles its errors."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    # ------------------------------------------------------------------ in the thread

    def _loop(self) -> None:
        while self._has_work():
            self._drop_cancelled()
            while (order := self._next_order()) is not None:
                self._admit(order)
            self._turn()
        left = [*(order for queue in self._queues.values() for order in queue)]
        left += [order for group in self._groups.values() for order in group.orders.values()]
        for order in left:
            self._post(order, Failed(RuntimeError("the server has stopped")))
        self._groups.clear()

    def _has_work(self) -> bool:
        """Wait until there is something to do; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping
                    or self._queues
                    or self._cancelled
                    or self._tasks
                    or any(group.orders for group in self._groups.values())
                )
            )
            return not self._stopping

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                kept = {
                    config: deque(order for order in queue if order.number not in cancelled)
                    for config, queue in self._queues.items()
                }
                self._queues = {config: queue for config, queue in kept.items() if queue}
        for group in self._groups.values():
            for number in cancelled & group.orders.keys():
                group.session.cancel(number)
                self._forget(group, number)

    def _next_order(self) -> Order | None:
        """The order that has waited longest among those that can begin now."""
        with self._changed:
            for config in sorted(self._queues, key=lambda config: self._queues[config][0].number):
                group = self._groups.get(config)
                if group is None and len(self._groups) >= self.sessions and not self._idle():
                    return None  # what is busy runs empty first
                if group is None or group.free:
                    order = self._queues[config].popleft()
                    if not self._queues[config]:
                        del self._queues[config]
                    return order
        return None

    def _idle(self) -> list[DecodeConfig]:
        return [config for config, group in self._groups.items() if not group.orders]

    def _admit(self, order: Order) -> None:
        """Put an order into a slot of its configuration's session, opening one if need be."""
        try:
            group = self._groups.get(order.config)
            if group is None:
                while len(self._groups) >= self.sessions:
                    del self._groups[self._idle()[0]]
                config = order.config
                options = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "seed"}
                group = _Group(self.engine.session(slots=self.slots, room=self.room, **options))
                self._groups[config] = group
            group.session.submit(order.prompt, order.seed, order.number)
        except Exception as error:
            self._post(order, Failed(error))
            return
        group.orders[order.number] = order
        if order.partials:
            group.tokens[order.number] = []

    def _turn(self) -> None:
        """One forward pass of the session whose turn it is, and one part of a task."""
        busy = next((config for config, group in self._groups.items() if group.orders), None)
        if busy is not None:
            self._groups.move_to_end(busy)
            self._step(busy, self._groups[busy])
        with self._changed:
            task = self._tasks.popleft() if self._tasks else None
        if task is not None:
            try:
                next(task)
            except StopIteration:
                return
            except Exception:
                logger.exception("a task in the engine's thread failed")
                return
            with self._changed:
                self._tasks.append(task)

    def _step(self, config: DecodeConfig, group: _Group) -> None:
        try:
            advance = group.session.step()
            for progress in advance.progress:
                self._show(group, progress)
        except Exception as error:
            self._give_up(config, group, error)
            return
        for key, picture in advance.finished.items():
            order = self._forget(group, int(str(key)))
            if order is not None:
                self._post(order, Finished(picture))

    def _show(self, group: _Group, progress: Progress) -> None:
        """Post a preview each time another equal part of the picture is there."""
        number = int(str(progress.key))
        if number not in group.tokens:
            return
        order, tokens = group.orders[number], group.tokens[number]
        tokens += progress.tokens
        total = len(self.engine.model.layout)
        due = len(tokens) * (order.partials + 1) // total
        if len(tokens) >= total or order.sent >= min(due, order.partials):
            return
        self._post(order, Partial(order.sent, preview(self.engine, tokens)))
        order.sent += 1

    def _give_up(self, config: DecodeConfig, group: _Group, error: Exception) -> None:
        """A session broke: its orders fail, or begin again in fewer slots where memory ran out."""
        del self._groups[config]
        self.engine.release()
        slots = group.session.slots.count
        if slots > 1 and isinstance(error, RuntimeError) and is_out_of_memory(error):
            self.slots = max(1, slots // 2)
            logger.warning("out of memory: %d picture(s) begin again, %d at a time", len(group.orders), self.slots)
            with self._changed:
                self._queues.setdefault(config, deque()).extendleft(reversed(group.orders.values()))
            return
        logger.error("a decode failed; its %d picture(s) are given up", len(group.orders), exc_info=error)
        for order in group.orders.values():
            self._post(order, Failed(error))

    def _forget(self, group: _Group, number: int) -> Order | None:
        group.tokens.pop(number, None)
        return group.orders.pop(number, None)

    def _post(self, order: Order, event: Event) -> None:
        try:
            order.post(event)
        except Exception:
            # Whoever waited is gone; that must not hurt the others.
            logger.exception("nobody takes the event of order %d", order.number)


@torch.inference_mode()
def preview(engine: Engine, tokens: list[int]) -> Image.Image:
    """The picture so far, from accepted local ids; what is missing shows image token 0."""
    layout = engine.model.layout
    padded = torch.zeros(1, len(layout), dtype=torch.int64)
    padded[0, : len(tokens)] = torch.tensor(tokens[: len(layout)], dtype=torch.int64)
    pixels = engine.model.decode_pixels(layout.image_tokens(padded).to(engine.device))
    return Image.fromarray(pixels[0].cpu().numpy())
