"""Continuous batching: slots change hands, pictures stay the same, memory running out costs nothing that is done."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from drawing import started
from torch.utils._python_dispatch import TorchDispatchMode

from sjd2_engine import Engine
from sjd2_engine.attention import BACKENDS
from sjd2_engine.errors import BackendError, ConfigError, PromptError
from sjd2_engine.graphs import Lagged, StepGraphs
from sjd2_engine.memory import affordable_batch, decode_memory
from sjd2_engine.results import Picture
from sjd2_engine.session import Session
from sjd2_engine.slots import Slots, prompt_inputs
from sjd2_kernels import dispatch

PROMPTS = [
    "a red circle left of a blue square",
    "three stars",
    "a small pink ring on a dotted black background",
    "a ring",
    "two green stars on a plain grey background",
]


def drain(session: Session) -> dict:
    found: dict = {}
    while session.busy:
        found |= session.step().finished
    return found


@pytest.mark.parametrize("decoder", ["ar", "jacobi", "sjd", "coupled", "sjd2", "ratio"])
def test_whoever_was_in_the_slot_before_does_not_matter(tuned: Engine, decoder: str) -> None:
    options: dict = {"window": 12} if decoder != "ratio" else {"verification": "ratio", "window": 12}
    name = "sjd2" if decoder == "ratio" else decoder
    expected = [tuned.generate(text, name, seed=i, **options).tokens[0] for i, text in enumerate(PROMPTS)]
    result = tuned.generate(PROMPTS, name, seed=0, max_batch=2, **options)
    assert torch.equal(result.tokens, torch.stack(expected))
    assert result.stats.batch == 2 and result.stats.window == (1 if decoder == "ar" else 12)


def test_rows_are_replaced_at_once(base: Engine) -> None:
    lengths = base.generate(PROMPTS, "jacobi", seed=0).stats.forward_passes
    steps = base.generate(PROMPTS, "jacobi", seed=0, max_batch=2).stats.windows
    # Whoever is free takes the next prompt: the work of two workers who never wait.
    ends = [0, 0]
    for length in lengths:
        ends[ends.index(min(ends))] += length
    assert steps == {16: max(ends)}


def test_pictures_that_are_known_late_are_the_same(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a session hears of each step one step late; the CPU can pretend to."""
    expected = base.generate(PROMPTS, "jacobi", seed=3)
    monkeypatch.setattr(Session, "lag", 1)
    events = list(base.stream(PROMPTS, "jacobi", seed=3, max_batch=2))
    seen: dict[int, list[int]] = {row: [] for row in range(5)}
    pictures: dict[int, Picture] = {}
    for event in events:
        for row, tokens in zip(event.rows, event.tokens, strict=True):
            seen[row] += tokens
        pictures |= event.finished
    for row, tokens in enumerate(expected.tokens):
        assert torch.equal(pictures[row].tokens, tokens)
        assert torch.equal(base.model.layout.image_tokens(torch.tensor([seen[row]]))[0], tokens)
        assert pictures[row].forward_passes == expected.stats.forward_passes[row]


def test_a_session_takes_prompts_as_they_come(base: Engine) -> None:
    expected = base.generate(PROMPTS[:3], "jacobi", seed=[5, 6, 7]).tokens
    session = base.session("jacobi", slots=2)
    session.submit(PROMPTS[0], 5, "first")
    found: dict = {}
    for _ in range(10):
        found |= session.step().finished
    session.submit(PROMPTS[1], 6, "second")
    session.submit(PROMPTS[2], 7, "third")
    session.submit(PROMPTS[3], 8, "unwanted")
    session.step()
    assert (session.active, session.waiting) == (2, 2)
    assert session.cancel("unwanted") and not session.cancel("unwanted")
    found |= drain(session)
    assert set(found) == {"first", "second", "third"} and not session.step().finished
    assert all(torch.equal(found[key].tokens, row) for key, row in zip(("first", "second", "third"), expected))


def test_a_cancelled_picture_leaves_its_slot_clean(tuned: Engine) -> None:
    expected = tuned.generate(PROMPTS[1], "sjd2", seed=6).tokens[0]
    session = tuned.session("sjd2", slots=1)
    session.submit(PROMPTS[0], 5, 0)
    for _ in range(9):
        session.step()
    session.submit(PROMPTS[1], 6, 1)
    assert session.cancel(0) and session.active == 0
    assert torch.equal(drain(session)[1].tokens, expected)


def test_what_a_session_refuses(base: Engine) -> None:
    session = base.session("jacobi", room=8)
    with pytest.raises(PromptError, match="red"):
        session.submit("a rde ring", 0, 0)
    with pytest.raises(ConfigError, match="preview_every"):
        base.session("jacobi", preview_every=-1)
    with pytest.raises(ConfigError, match="preview_every"):
        base.session("jacobi", preview_every=True)
    roomy = base.session("jacobi")
    for slots in (roomy.slots,):
        slots.room = 5
    with pytest.raises(PromptError, match="at most 5"):
        roomy.submit(PROMPTS[2], 0, 0)


def test_slots_are_kept_for_the_next_call(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Slots.__init__

    def counted(self: Slots, *args, **kwargs) -> None:
        made.append(args)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Slots, "__init__", counted)
    base.release()
    first = base.generate(PROMPTS[:2], "jacobi", seed=1)
    again = base.generate(PROMPTS[:2], "jacobi", seed=1)
    assert len(made) == 1 and torch.equal(first.tokens, again.tokens)
    assert first.stats.forward_passes == again.stats.forward_passes
    for event in base.stream(PROMPTS[:2], "jacobi", seed=1):
        if event.step == 5:
            break  # whoever stops listening leaves the slots idle
    assert torch.equal(base.generate(PROMPTS[:2], "jacobi", seed=1).tokens, first.tokens) and len(made) == 1
    base.generate(PROMPTS[0], "jacobi", seed=1, window=5)
    assert len(made) == 2 and len(base._idle) == 1


def test_out_of_memory_loses_nothing(base: Engine, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    expected = base.generate(PROMPTS, "jacobi", seed=4)
    base.release()
    plain, steps = Slots.step, []

    def limited(self: Slots) -> torch.Tensor:
        steps.append(self.count)
        if self.count > 1 and len(steps) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self)

    monkeypatch.setattr(Slots, "step", limited)
    with caplog.at_level(logging.WARNING):
        pictures: dict[int, Picture] = {}
        for event in base.stream(PROMPTS, "jacobi", seed=4, max_batch=4):
            assert not pictures.keys() & event.finished.keys()
            pictures |= event.finished
    assert sorted({*steps}) == [1, 2, 4] and "begun again" in caplog.text
    assert all(torch.equal(pictures[i].tokens, row) for i, row in enumerate(expected.tokens))

    def never(self: Slots) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(Slots, "step", never)
    with pytest.raises(BackendError, match="smaller window"):
        base.generate(PROMPTS, "jacobi")
    monkeypatch.setattr(Slots, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base.generate(PROMPTS, "jacobi")


def test_the_estimate_bounds_the_batch(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, config = base.model.facts, base.config_for("jacobi")
    need = decode_memory(facts, config, torch.float32, 4, "cpu")
    monkeypatch.setattr("sjd2_engine.memory.available_bytes", lambda device: need.total - need.weights)
    device = torch.device("cpu")
    assert [affordable_batch(facts, config, torch.float32, n, device) for n in (1, 4, 5, 16)] == [1, 4, 2, 4]
    assert base.generate(PROMPTS, "jacobi", max_batch=5).stats.batch == 2


def test_previews_by_share_of_the_time(base: Engine) -> None:
    events = list(base.stream(PROMPTS[:2], "ar", seed=1, preview_every="auto"))
    shown = [event for event in events if event.previews]
    assert 2 <= len(shown) < len(events) / 4
    assert all(len(event.previews or []) == len(event.rows) for event in shown)
    assert np.asarray(shown[-1].previews[0]).shape == (128, 128, 3)  # pyright: ignore[reportOptionalSubscript]


class Strict(TorchDispatchMode):
    """Refuses what would make a captured step wait for the device, or depend on its data."""

    BANNED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.BANNED, f"{name} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder", ["ar", "jacobi", "sjd", "coupled", "sjd2"])
def test_nothing_in_a_step_waits_for_the_device(tuned: Engine, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuned.config_for(decoder)
    slots = started(tuned.model, config, PROMPTS[:2], [1, 2])
    slots.step()
    # As on CUDA: the fused forward pass with our attention; the reference stands for the kernels.
    monkeypatch.setattr(slots.cache, "fused", True)
    monkeypatch.setattr(slots.cache, "backend", BACKENDS["triton"])
    with dispatch.backend("reference"):
        with Strict():
            slots.step()
        with pytest.raises(AssertionError, match="in a step"), Strict():
            bool(slots.window.rows_done.all())


def addresses(slots: Slots) -> set[int]:
    window = slots.window
    held = [*vars(window).values(), *(t for drafts in window._widths.values() for t in vars(drafts).values())]
    held += [*slots._reports.values(), slots.cache.keys, slots.cache.values, slots.cache.lengths]
    return {thing.data_ptr() for thing in held if isinstance(thing, torch.Tensor)}


@pytest.mark.parametrize("decoder", ["ar", "jacobi", "sjd", "sjd2"])
def test_a_captured_step_would_find_its_tensors_again(tuned: Engine, decoder: str) -> None:
    slots = started(tuned.model, tuned.config_for(decoder), PROMPTS[:2], [1, 2])
    widths = [slots.window.max_width] if decoder == "ar" else [slots.window.max_width, 5, 11]
    for width in widths:
        slots.resize(width)
        slots.step()
    before = addresses(slots)
    for width in reversed(widths):
        slots.resize(width)
        slots.step()
        slots.stop(1)
        slots.start(1, prompt_inputs(tuned.model, slots.config, PROMPTS[3]), 9)
        slots.step()
    assert addresses(slots) == before


class PretendGraphs(StepGraphs):
    """The bookkeeping without a device: a capture records, a replay runs."""

    log: list[str]

    def _warm_up(self, step) -> None:
        self.log.append("eager")
        step()

    def _capture(self, step):
        self.log.append("capture")
        return lambda: (self.log.append("replay"), step())


def test_a_step_runs_once_whether_eager_captured_or_replayed() -> None:
    graphs = PretendGraphs(torch.device("cuda"), limit=2)
    graphs.log, done = [], []
    for key in (1, 1, 1, 2, 1, 2, 3, 3, 2, 1):
        graphs.run(key, lambda key=key: done.append(key))
    assert done == [1, 1, 1, 2, 1, 2, 3, 3, 2, 1]
    assert graphs.log == [
        "eager", "capture", "replay", "replay", "eager", "replay", "capture", "replay",
        "eager", "capture", "replay", "replay", "capture", "replay",
    ]  # fmt: skip
    graphs.clear()
    graphs.run(3, lambda: done.append(3))
    assert graphs.log[-1] == "eager" and done[-1] == 3


def test_lagged_copies_do_not_change_afterwards() -> None:
    lagged, value = Lagged(), torch.tensor([1, 2])
    assert not lagged.ready
    lagged.push(value)
    value += 1
    lagged.push(value)
    assert len(lagged) == 2 and lagged.ready
    assert lagged.pop().tolist() == [1, 2] and lagged.pop().tolist() == [2, 3]
