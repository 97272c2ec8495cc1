"""JacobiWindow: its contract with whoever embeds it, its errors, and rows that fail while others go on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from toy import PrefixModel, decode

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_engine.errors import ConfigError
from sjd2_engine.schedule import noise_times
from sjd2_kernels import rng

LAYOUT = TokenLayout([-1, -1, 4, -1, -1])
ALL = [
    {"decoder": "ar"},
    {"decoder": "jacobi"},
    {"decoder": "sjd"},
    {"decoder": "coupled", "coupling": "maximal"},
    {"decoder": "coupled", "coupling": "gumbel"},
    {"decoder": "sjd2"},
    {"decoder": "sjd2", "warmup": "noise", "denoise_levels": 2},
    {"decoder": "sjd2", "verification": "ratio", "coupling": "maximal"},
    {"decoder": "sjd2", "verification": "paper", "coupling": "none"},
]
every_decoder = pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case.values())))


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    return PrefixModel(LAYOUT, vocab=4)


def test_ten_lines_drive_it() -> None:
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    window = JacobiWindow(DecodeConfig(decoder="jacobi", window=3), TokenLayout([-1] * 9), seeds=[0, 1])
    steps = 0
    while not window.done:
        inputs = window.inputs()
        assert inputs.embeds is None
        window.step(weights[inputs.tokens])  # a bigram model: the last row of `weights` starts a picture
        steps += 1
    assert window.tokens.shape == (2, 9) and window.tokens.min() >= 0 and steps <= 9
    assert window.image_vocab == 4


@every_decoder
def test_contract(model: PrefixModel, case: dict) -> None:
    config = DecodeConfig(window=3, **case)
    prompt = torch.tensor([0, 1, 0])
    kv_lengths = torch.tensor([9, 8, 7, 3, 3, 3], dtype=torch.int32)
    window = JacobiWindow(config, LAYOUT, model.embedding, model.starts[prompt], seeds=[1, 2, 3], kv_lengths=kv_lengths)
    model.begin(prompt, window.width)
    slots = torch.arange(config.width)
    while not window.done:
        inputs = window.inputs()
        assert inputs.embeds is not None and inputs.embeds.shape == (3, config.width, 6)
        assert inputs.tokens.dtype == inputs.positions.dtype == torch.int64
        assert inputs.levels.dtype == torch.int32
        assert torch.equal(inputs.positions, window.lengths[:, None] - 1 + slots)
        assert bool(inputs.embeds.isfinite().all()) and bool((inputs.levels[:, 0] == -1).all())
        noisy = inputs.levels >= 0
        assert torch.equal(inputs.tokens == -1, noisy | (inputs.positions == -1))
        forced = torch.tensor([*LAYOUT.forced, *[0] * config.width, -1])[inputs.positions]
        assert not bool((noisy & (forced >= 0)).any())
        assert bool((inputs.tokens == forced)[(forced >= 0) & (slots > 0)].all())
        for levels, known in zip(inputs.levels, forced):
            assert bool((levels[known < 0].diff() >= 0).all())  # a staircase, but for forced tokens
        accepted = window.step(model(inputs.embeds, inputs.positions, inputs.levels)).accepted
        assert accepted.dtype == torch.int32
    assert torch.equal(kv_lengths, torch.tensor([14, 13, 12, 8, 8, 8], dtype=torch.int32))
    assert window.tokens.dtype == torch.int64 and bool((window.tokens[:, 2] == 4).all())
    image = LAYOUT.image_tokens(window.tokens)
    assert bool(((image >= 0) & (image < 4)).all())
    assert torch.equal(window.histogram.sum(1), window.steps.long())
    assert torch.equal((window.histogram * torch.arange(config.width + 1)).sum(1), torch.full((3,), 5))


@every_decoder
def test_done_rows_do_nothing_for_ever(model: PrefixModel, case: dict) -> None:
    window = decode(model, DecodeConfig(window=3, **case), torch.tensor([0, 1]), [5, 6])
    before = [value.clone() for value in (window.tokens, window.lengths, window.steps, window.histogram)]
    for value in (0.0, torch.nan):
        inputs = window.inputs()
        assert inputs.embeds is not None and bool(inputs.embeds.isfinite().all())
        step = window.step(torch.full((2, window.width, 4), value))
        assert step.accepted.tolist() == [0, 0]
    after = (window.tokens, window.lengths, window.steps, window.histogram)
    assert all(torch.equal(old, new) for old, new in zip(before, after))
    assert window.failed.tolist() == [-1, -1] and window.done


@every_decoder
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_failed_row_ends_and_the_others_go_on(model: PrefixModel, case: dict, value: float) -> None:
    config = DecodeConfig(window=3, **case)
    prompt = torch.tensor([0, 1, 0])
    good = decode(model, config, prompt, [1, 2, 3])
    window = JacobiWindow(config, LAYOUT, model.embedding, model.starts[prompt], seeds=[1, 2, 3])
    model.begin(prompt, window.width)
    broken_at = None
    for step in range(50):
        if window.done:
            break
        inputs = window.inputs()
        assert inputs.embeds is not None and bool(inputs.embeds.isfinite().all())
        logits = model(inputs.embeds, inputs.positions, inputs.levels)
        if step >= 1 and broken_at is None:
            broken_at = int(window.lengths[1])
            broken_at += broken_at == 2  # a forced position does not look at its logits
            logits[1, broken_at - int(window.lengths[1]), 2] = value
            kept = window.tokens[1].clone()
        window.step(logits)
    assert window.done and broken_at is not None
    assert window.failed.tolist() == [-1, broken_at, -1] and window.failed_step.tolist() == [-1, 1, -1]
    assert torch.equal(window.tokens[[0, 2]], good.tokens[[0, 2]])
    assert torch.equal(window.tokens[1], kept) and window.steps[1] == 2
    assert window.rows_done.tolist() == [1, 1, 1]


def test_first_window_of_sjd2(model: PrefixModel) -> None:
    start, options = model.starts[:1], {"decoder": "sjd2", "window": 5, "denoise_levels": 3}
    window = JacobiWindow(DecodeConfig(**options, warmup="noise"), LAYOUT, model.embedding, start, seeds=[4])
    inputs = window.inputs()
    assert inputs.levels.tolist() == [[-1, 2, 2, -1, 2]] and inputs.tokens.tolist() == [[-1, -1, -1, 4, -1]]
    image = model.embedding[:4]
    noise = rng.normals(torch.tensor([4]), torch.arange(4)[None], 0, 6)[0]
    expected = noise * image.std(0, correction=0) + image.mean(0)
    assert inputs.embeds is not None
    assert torch.allclose(inputs.embeds[0, [1, 2, 4]], expected[[0, 1, 3]], atol=1e-6)
    window = JacobiWindow(DecodeConfig(**options), LAYOUT, model.embedding, start, seeds=[4])
    assert (window.inputs().levels == -1).all()


def test_denoising_follows_the_predictions(model: PrefixModel) -> None:
    """With logits that never let a draft pass, one position goes level by level to its predicted token."""
    options = {"decoder": "sjd2", "window": 3, "denoise_levels": 3, "warmup": "noise", "temperature": 0.0}
    layout = TokenLayout([-1] * 8, image_vocab=4)
    window = JacobiWindow(DecodeConfig(**options), layout, model.embedding, model.starts[:1], seeds=[4])
    image = model.embedding[:4]
    mean, std = image.mean(0), image.std(0, correction=0)
    logits = torch.eye(4)[[1, 2, 3]][None]
    first = window.inputs().embeds
    window.step(logits)
    second = window.inputs()
    assert first is not None and second.embeds is not None
    times = noise_times(3)
    ratio = times[1] / times[2]
    old, target = (first[0, 2] - mean) / std, (image[2] - mean) / std
    assert second.levels.tolist() == [[-1, 1, 2]]
    expected = (ratio * old + (1 - ratio) * target) * std + mean
    assert torch.allclose(second.embeds[0, 1], expected, atol=1e-5)


@pytest.mark.parametrize("trial", range(12))
def test_any_layout_and_window(trial: int) -> None:
    """Random layouts, windows, levels and options: `jacobi` and `sjd2` write the tokens of `ar`."""
    pick = random.Random(trial)
    vocab, forced = pick.choice([2, 5]), pick.randrange(1, 3)
    length = pick.randrange(2, 8 if vocab == 2 else 5)
    entries = [-1, *(pick.choice([-1, -1, *range(vocab, vocab + forced)]) for _ in range(length - 1))]
    model = PrefixModel(TokenLayout(entries, image_vocab=vocab), vocab, seed=trial)
    options = {
        "top_k": pick.choice([0, 2]),
        "temperature": pick.choice([0.0, 0.7, 1.0]),
        "denoise_levels": 1 + trial % 3,
    }
    prompt, seeds = torch.arange(64) % 2, range(trial, trial + 64)
    expected = decode(model, DecodeConfig(**options), prompt, seeds).tokens
    for decoder in ("jacobi", "sjd2"):
        width, warmup = pick.randrange(1, length + 3), pick.choice(["tokens", "noise"])
        config = DecodeConfig(decoder=decoder, window=width, warmup=warmup, **options)
        assert torch.equal(decode(model, config, prompt, seeds).tokens, expected)


def test_half_precision_embeddings(model: PrefixModel) -> None:
    table = model.embedding.bfloat16()
    for case in ALL:
        window = JacobiWindow(DecodeConfig(window=3, **case), LAYOUT, table, model.starts[:2].bfloat16(), seeds=[0, 1])
        while not window.done:
            inputs = window.inputs()
            assert inputs.embeds is not None and inputs.embeds.dtype == torch.bfloat16
            window.step(torch.zeros(2, 2, window.width, 4, dtype=torch.bfloat16))
        assert bool((window.tokens[:, 2] == 4).all())


def test_legal_range(model: PrefixModel) -> None:
    layout = TokenLayout(LAYOUT.forced, image_vocab=4, legal=(1, 3))
    for case in ALL:
        window = JacobiWindow(DecodeConfig(window=4, **case), layout, model.embedding, model.starts[:2], seeds=[0, 1])
        while not window.done:
            window.inputs()
            window.step(torch.zeros(2, window.width, 4))
        image = layout.image_tokens(window.tokens)
        assert bool(((image >= 1) & (image < 3)).all())


def test_seeds_come_from_the_config(model: PrefixModel) -> None:
    start = model.starts[:2]
    assert JacobiWindow(DecodeConfig(seed=7), LAYOUT, model.embedding, start).seeds.tolist() == [7, 8]
    assert JacobiWindow(DecodeConfig(seed=(3, 1)), LAYOUT).seeds.tolist() == [3, 1]
    assert JacobiWindow(DecodeConfig(seed=3), LAYOUT).batch == 1


def test_noise_too_large_for_a_table_is_drawn_in_every_step(
    model: PrefixModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in ALL:
        config = DecodeConfig(window=3, **case)
        expected = decode(model, config, torch.tensor([0, 1]), [5, 6]).tokens
        with monkeypatch.context() as patch:
            patch.setattr("sjd2_engine.window.NOISE_TABLE_LIMIT", 0)
            assert torch.equal(decode(model, config, torch.tensor([0, 1]), [5, 6]).tokens, expected)


def test_constructor_errors(model: PrefixModel) -> None:
    table, start, sjd2 = model.embedding, model.starts[:1], DecodeConfig(decoder="sjd2")

    def refuses(match: str, config: DecodeConfig, *args: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            JacobiWindow(config, LAYOUT, *args, **options)

    refuses("decoder='sjd2' denoises embeddings", sjd2, seeds=[0])
    refuses("embedding has 4 rows", DecodeConfig(), table[:4], start, seeds=[0])
    refuses(r"expected floats \[V\+F, D\]", DecodeConfig(), table[0], start, seeds=[0])
    refuses(r"expected floats \[V\+F, D\]", DecodeConfig(), table.long(), start, seeds=[0])
    refuses("start_embeds have shape None", DecodeConfig(), table, seeds=[0])
    refuses(r"start_embeds have shape \(1, 6\): expected \(2, 6\)", DecodeConfig(), table, start, seeds=[0, 1])
    refuses("without an embedding", DecodeConfig(), None, start, seeds=[0])
    refuses("seeds=", DecodeConfig(), seeds=[])
    refuses("seeds=", DecodeConfig(), seeds=[-1])
    refuses("1 images", DecodeConfig(seed=(1, 2)), table, start)
    refuses("kv_lengths", DecodeConfig(), seeds=[0, 1], kv_lengths=torch.zeros(3, dtype=torch.int32))
    refuses("kv_lengths", DecodeConfig(), seeds=[0], kv_lengths=torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 4), (1, 3, 4), (3, 2, 3, 4), (2, 3), (1, 2, 3, 4)])
def test_wrong_logits(shape: tuple[int, ...]) -> None:
    window = JacobiWindow(DecodeConfig(decoder="jacobi", window=3), LAYOUT, seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"expected \[2, 3, 4\]"):
        window.step(torch.zeros(shape))
    with pytest.raises(ConfigError, match="floating-point"):
        window.step(torch.zeros(2, 3, 4, dtype=torch.int64))
    assert window.lengths.tolist() == [0, 0]


def test_embedding_the_window_loads_no_model_code() -> None:
    code = (
        "import sys, sjd2_engine; assert 'torch' not in sys.modules; from sjd2_engine import JacobiWindow; "
        "bad = [m for m in sys.modules if m.startswith(('sjd2_engine.models', 'sjd2_engine.transformer', "
        "'sjd2_engine.engine', 'PIL', 'transformers'))]; assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    with pytest.raises(AttributeError, match="Enginee"):
        import sjd2_engine

        _ = sjd2_engine.Enginee  # type: ignore[attr-defined]
