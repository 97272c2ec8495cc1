"""The engine on a GPU: graphs, batches, previews and a loop that never waits. Everything here needs a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

# Before the first matrix product: with these workspaces the library's sums repeat.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
import triton_mode  # noqa: F401  (where kernels run is settled before triton is loaded)
from toy import perfect_variation

from benchmarks.gpu.bundled import NAME, PROMPTS, drained_without_waiting, no_waiting, without_graphs
from benchmarks.gpu.geometry import GEOMETRIES, random_transformer, tiny
from sjd2_engine import DecodeConfig, Engine, JacobiWindow, TokenLayout
from sjd2_engine.cache import StaticCache
from sjd2_engine.graphs import MAX_GRAPHS, StepGraphs
from sjd2_engine.results import Picture
from sjd2_engine.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DECODERS = ("ar", "jacobi", "sjd", "coupled", "sjd2", "ratio")
FIVE = list(PROMPTS[:5])


def options(decoder: str) -> dict:
    """Of `generate`; "ratio" is sjd2 by its other exact rule."""
    return {"decoder": "sjd2", "verification": "ratio"} if decoder == "ratio" else {"decoder": decoder}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """In float32, with products and sums that repeat."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield Engine.from_pretrained(NAME, device="cuda", dtype="float32")
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("decoder", DECODERS)
def test_graphs_draw_what_eager_steps_draw(engine: Engine, decoder: str) -> None:
    engine.release()
    captured = engine.generate(FIVE, max_batch=3, seed=7, **options(decoder))
    replayed = engine.generate(FIVE, max_batch=3, seed=7, **options(decoder))
    with without_graphs(engine):
        eager = engine.generate(FIVE, max_batch=3, seed=7, **options(decoder))
    assert torch.equal(captured.tokens, eager.tokens) and torch.equal(replayed.tokens, eager.tokens)
    assert captured.stats.forward_passes == eager.stats.forward_passes == replayed.stats.forward_passes
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(captured.images, replayed.images)] == [
        True
    ] * 5
    assert [result.stats.graphs.graphs for result in (captured, replayed, eager)] == [1, 0, 0]
    assert captured.stats.graphs.seconds > 0 and 0 < captured.stats.graphs.bytes < 2**30


def state_after(engine: Engine, steps: int, decoder: str) -> dict[str, torch.Tensor]:
    """Everything that steps write, after so many of two pictures in slots of their own."""
    engine.release()
    session = engine.session(slots=2, **options(decoder))
    for key, prompt in enumerate(PROMPTS[:2]):
        session.submit(prompt, key, key)
    for _ in range(steps):
        session.step()
    cache, window = session.slots.cache, session.slots.window
    found = {"keys": cache.keys, "values": cache.values, "entries": cache.lengths, "tokens": window.tokens}
    found |= {"lengths": window.lengths, "steps": window.steps, "histogram": window.histogram}
    embeds = window.inputs().embeds
    assert embeds is not None and window.lengths.min() > steps // 2
    return {name: value.clone() for name, value in {**found, "embeds": embeds}.items()}


@pytest.mark.parametrize("decoder", DECODERS)
def test_replayed_steps_are_eager_ones_bit_by_bit(engine: Engine, decoder: str) -> None:
    """Keys, values and the next inputs too, which tokens alone would not show."""
    replayed = state_after(engine, 9, decoder)
    with without_graphs(engine):
        eager = state_after(engine, 9, decoder)
    for name, value in eager.items():
        assert torch.equal(replayed[name], value), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_picture_does_not_depend_on_its_batch(engine: Engine, decoder: str) -> None:
    """Slots change hands on the way, and pictures come in the order asked."""
    together = engine.generate(list(PROMPTS), max_batch=8, seed=20, **options(decoder))
    in_turn = engine.generate(list(PROMPTS), max_batch=3, seed=20, **options(decoder))
    alone = [engine.generate(p, seed=20 + i, **options(decoder)).tokens[0] for i, p in enumerate(PROMPTS)]
    assert torch.equal(together.tokens, torch.stack(alone)) and torch.equal(in_turn.tokens, torch.stack(alone))


def test_both_devices_draw_the_same_picture(engine: Engine) -> None:
    on_host = Engine.from_pretrained(NAME, device="cpu", dtype="float32")
    for decoder in ("ar", "jacobi", "sjd2"):
        got, expected = (one.generate(FIVE[:2], decoder, seed=5).tokens for one in (engine, on_host))
        assert torch.equal(got, expected), decoder


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loop_never_waits(engine: Engine, decoder: str) -> None:
    """From behind the warm-up to the last picture, previews included; only who comes into a slot may wait."""
    session = engine.session(slots=2, preview_every=16, **options(decoder))
    assert drained_without_waiting(session, engine.device, 0) is None
    assert not session.busy


def test_waiting_would_be_noticed(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(engine.device):
        engine.model.transformer.norm.sum().item()


def test_previews_beside_the_loop(engine: Engine) -> None:
    expected = engine.generate(FIVE, "jacobi", seed=9, max_batch=2)
    shown, pictures = 0, {}
    for event in engine.stream(FIVE, "jacobi", seed=9, max_batch=2, preview_every=4):
        for preview in event.previews or []:
            assert preview is None or preview.size == (128, 128)
            shown += preview is not None
        pictures |= event.finished
    assert shown >= 10
    for index, image in enumerate(expected.images):
        picture: Picture = pictures[index]
        assert torch.equal(picture.tokens, expected.tokens[index])
        assert np.array_equal(np.asarray(picture.image), np.asarray(image))


def test_a_slot_is_free_for_the_next_prompt(engine: Engine) -> None:
    """What is cancelled half-way leaves nothing behind, on graphs that were captured with it."""
    expected = engine.generate(FIVE[1], "coupled", seed=6).tokens[0]
    session = engine.session("coupled", slots=1)
    session.submit(FIVE[0], 5, "unwanted")
    for _ in range(9):
        session.step()
    assert session.cancel("unwanted")
    session.submit(FIVE[1], 6, "wanted")
    found: dict = {}
    while session.busy:
        found |= session.step().finished
    assert torch.equal(found["wanted"].tokens, expected)


def test_widths_that_change_on_the_way(engine: Engine) -> None:
    """jacobi draws AR's tokens at any width, so window="auto" may not change them."""
    expected = engine.generate(FIVE[:2], "jacobi", seed=3).tokens
    result = engine.generate(FIVE[:2], "jacobi", window="auto", seed=3)
    assert torch.equal(result.tokens, expected)
    assert len(result.stats.windows) > 1 and result.stats.graphs.graphs <= len(result.stats.windows)


def test_graphs_are_bounded_and_so_is_their_memory(engine: Engine) -> None:
    session = engine.session("jacobi", slots=2, window=32)
    for key, prompt in enumerate(PROMPTS[:2]):
        session.submit(prompt, key, key)
    widths = range(8, 8 + 2 * (MAX_GRAPHS + 2), 2)
    reserved = []
    for _ in range(3):
        for width in widths:
            session.slots.resize(width)
            for _ in range(2):
                session.slots.step()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    graphs = session.slots.graphs
    assert len(graphs._graphs) == MAX_GRAPHS and graphs.report().graphs > MAX_GRAPHS
    assert reserved[2] - reserved[1] < 2**26


@pytest.mark.parametrize("limit", [1, 2])
def test_dropped_graphs_are_captured_again(limit: int) -> None:
    """With a library call in each, whose workspace outlives the graph; `clear` drops all of them."""
    device = torch.device("cuda")
    graphs = StepGraphs(device, limit)
    total, factor = torch.zeros(64, 64, device=device), torch.eye(64, device=device)
    done = 0

    def step(key: int) -> None:
        total.add_((factor * key) @ factor)

    for round in range(2):
        for key in (1, 1, 1, 2, 2, 1, 3, 3, 2, 2, 1, 1):
            graphs.run(key, lambda key=key: step(key))
            done += key
        assert torch.equal(total, done * torch.eye(64, device=device)), round
        graphs.clear()
    assert graphs.report().graphs > 2 * limit


# ---------------------------------------------------------------- bfloat16, by distribution


def law_of(model: Transformer, start: torch.Tensor, vocab: int) -> torch.Tensor:
    """Joint law of two tokens, f64 [V, V], read from the model one token at a time."""
    device, core = start.device, model.config
    cache = StaticCache(core, vocab, 4, 0, device, start.dtype)
    first = model.head(cache.forward(model, start.expand(vocab, 1, -1).contiguous()))[0, -1]
    cache.lengths.fill_(1)
    second = model.head(cache.forward(model, model.embedding[:vocab, None].contiguous()))[:, -1]
    return first.double().softmax(-1)[:, None] * second.double().softmax(-1)


def drawn(
    model: Transformer, start: torch.Tensor, config: DecodeConfig, layout: TokenLayout, rows: int
) -> torch.Tensor:
    """Tokens i64 [rows, 2] of as many seeds, in one batch."""
    cache = StaticCache(model.config, rows, 2 + config.width, 0, start.device, start.dtype)
    starts = start.expand(rows, -1).contiguous()
    window = JacobiWindow(config, layout, model.embedding, starts, range(rows), kv_lengths=cache.lengths)
    for _ in range(len(layout)):
        inputs = window.inputs()
        assert inputs.embeds is not None
        window.step(model.head(cache.forward(model, inputs.embeds)))
    assert bool(window.rows_done.all())
    return window.tokens


@pytest.mark.parametrize("decoder", ["ar", "jacobi", "sjd", "coupled"])
def test_bfloat16_follows_the_law(decoder: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    vocab, rows = 8, 4096
    layout = TokenLayout([-1, -1], image_vocab=vocab)
    geometry = replace(tiny(GEOMETRIES["emu3-8b"]), vocabulary=vocab, image_vocabulary=vocab, layout=layout)
    model = random_transformer(geometry, torch.device(device), dtype, seed=3)
    with torch.inference_mode():
        model.embedding.mul_(50)  # different tokens make different sequels,
        model.head.weight.mul_(8)  # pyright: ignore  # and not all of them are alike
        law = law_of(model, model.embedding[:1], vocab).cpu()
        tokens = drawn(model, model.embedding[0], DecodeConfig(decoder, window=3), layout, rows).cpu()
    counts = torch.bincount(tokens[:, 0] * vocab + tokens[:, 1], minlength=vocab * vocab)
    distance = float((counts / rows - law.flatten()).abs().sum() / 2)
    assert float((law.sum(1)[:, None] * law.sum(0) - law).abs().sum()) > 0.1  # the second depends on the first
    assert distance < 1.5 * perfect_variation(law.flatten(), rows)
