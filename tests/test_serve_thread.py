"""The engine's thread by itself: turns, room, cancellation, and what goes wrong in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="pip install 'sjd2-engine[serve]'")

from serving import PATIENCE_S, until

from sjd2_engine import Engine
from sjd2_engine.serve.engine_thread import EngineThread, Event, Failed, Finished, Order, Partial, QueueFull
from sjd2_engine.slots import Slots

PROMPT = "a red circle"


class Book:
    """Orders, and what came of them in the order in which it came."""

    def __init__(self, engine: Engine, thread: EngineThread) -> None:
        self.engine, self.thread = engine, thread
        self.ended: list[tuple[str, Event]] = []
        self.partials: list[Partial] = []

    def order(self, name: str, partials: int = 0, prompt: str = PROMPT, seed: int = 0, **options: Any) -> Order:
        def post(event: Event) -> None:
            (self.partials if isinstance(event, Partial) else self.ended).append(
                event if isinstance(event, Partial) else (name, event)  # pyright: ignore[reportArgumentType]
            )

        config = replace(self.engine.config_for(**{"decoder": "jacobi", **options}), seed=0)
        return Order(prompt, seed, config, post, partials)

    def draw(self, *orders: Order) -> dict[str, Event]:
        """Submit orders to a thread that may not run yet, and wait for them."""
        wanted = len(self.ended) + len(orders)
        self.thread.submit(orders)
        if not self.thread._thread.is_alive():
            self.thread.start()
        until(lambda: len(self.ended) >= wanted)
        return dict(self.ended)


@pytest.fixture
def book(tuned: Engine, request: pytest.FixtureRequest) -> Iterator[Book]:
    slots, sessions = getattr(request, "param", (1, 1))
    thread = EngineThread(tuned, slots, sessions, 4)
    yield Book(tuned, thread)
    if thread._thread.is_alive():
        thread.stop(PATIENCE_S)
        assert not thread.alive and not thread._thread.is_alive()


def test_no_configuration_is_shut_out(book: Book) -> None:
    """One session: who came third is drawn third, though its configuration is another."""
    names = [("one", 16), ("two", 16), ("other", 24), ("three", 16)]
    book.draw(*(book.order(name, window=window) for name, window in names))
    assert [name for name, _ in book.ended] == ["one", "two", "other", "three"]
    assert all(isinstance(event, Finished) for _, event in book.ended)


@pytest.mark.parametrize("book", [(2, 2)], indirect=True)
def test_configurations_take_turns(book: Book) -> None:
    """Two sessions: a short decode does not wait for a long one that came before."""
    book.draw(book.order("long", decoder="ar"), book.order("short"))
    assert [name for name, _ in book.ended] == ["short", "long"]


def test_the_queue_takes_all_of_a_request_or_none(book: Book) -> None:
    book.thread.submit([book.order(str(i)) for i in range(3)])
    with pytest.raises(QueueFull, match="no room for 2 more"):
        book.thread.submit([book.order("a"), book.order("b")])
    assert book.thread.waiting == 3


def test_cancelled_orders_leave_queue_and_slot(book: Book) -> None:
    long, queued = book.order("long", decoder="ar"), book.order("queued", decoder="ar")
    book.thread.submit([long, queued])
    book.thread.start()
    until(lambda: book.thread.active)
    book.thread.cancel([long, queued])
    book.draw(book.order("next"))
    assert [name for name, _ in book.ended] == ["next"] and not book.thread.active and not book.thread.waiting


def test_a_broken_step_fails_its_own_pictures_only(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda self: (_ for _ in ()).throw(RuntimeError("a broken kernel")))
    (event,) = book.draw(book.order("broken")).values()
    assert isinstance(event, Failed) and "broken kernel" in str(event.error)
    monkeypatch.setattr(Slots, "step", step)
    assert isinstance(book.draw(book.order("next"))["next"], Finished) and book.thread.alive


@pytest.mark.parametrize("book", [(2, 1)], indirect=True)
def test_out_of_memory_goes_on_in_fewer_slots(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = Slots.step, []

    def short_of_memory(slots: Slots) -> torch.Tensor:
        calls.append(slots.count)
        if slots.count > 1 and len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(slots)

    monkeypatch.setattr(Slots, "step", short_of_memory)
    events = book.draw(book.order("a", partials=1), book.order("b", seed=1))
    wanted = book.engine.generate([PROMPT] * 2, decoder="jacobi", seed=0)
    for event, tokens in zip((events["a"], events["b"]), wanted.tokens):
        assert isinstance(event, Finished) and torch.equal(event.picture.tokens, tokens)
    assert {*calls} == {1, 2} and book.thread.slots == 1 and len(book.partials) == 1


def test_a_prompt_the_model_cannot_read_is_refused_and_the_next_drawn(book: Book) -> None:
    events = book.draw(book.order("long", prompt="a red circle and " * 30 + "a ring"), book.order("next"))
    assert isinstance(events["long"], Failed) and "122 words" in str(events["long"].error)
    assert isinstance(events["next"], Finished)


def test_tasks_run_between_steps(book: Book) -> None:
    turns, over = [], threading.Event()

    def task() -> Iterator[None]:
        for turn in range(5):
            turns.append(turn)
            yield
        over.set()

    def broken() -> Iterator[None]:
        yield
        raise RuntimeError("a task's own affair")

    book.thread.run(task())
    book.thread.run(broken())
    book.draw(book.order("beside"))
    assert over.wait(PATIENCE_S) and turns == list(range(5)) and book.thread.alive


def test_what_is_left_at_the_end_is_told(book: Book) -> None:
    book.thread.submit([book.order("left", decoder="ar"), book.order("too", decoder="ar")])
    book.thread.start()
    until(lambda: book.thread.active)
    book.thread.stop(PATIENCE_S)
    assert sorted(name for name, event in book.ended if isinstance(event, Failed)) == ["left", "too"]
