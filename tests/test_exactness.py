"""The training-free decoders write what plain autoregressive decoding would: by law, or token for token.

The law of a toy picture is known by enumeration. Total variation between 200,000 decoded pictures and that
law must be what a perfect sampler shows, and decoders broken on purpose must stand out. The laws are measured on the
backend that runs by default; the others must write the same tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import PrefixModel, decode, law_distance

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_kernels import backend, reference, rng
from sjd2_kernels.reference import decoding

PERFECT = 1.1  # times the mean distance of a perfect sampler; with these law sizes 2.5 standard deviations


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    return PrefixModel(TokenLayout([-1, -1, 4, -1, -1]), vocab=4)


@pytest.fixture(scope="module")
def long_model() -> PrefixModel:
    """Two image ids, seven image positions: drafts live long enough to be kept and redrawn many times."""
    return PrefixModel(TokenLayout([-1, -1, -1, 2, -1, -1, -1, -1]), vocab=2, seed=1)


@pytest.fixture(scope="module")
def uncond(model: PrefixModel) -> PrefixModel:
    return model.unconditional()


CASES = [
    {"decoder": "ar"},
    {"decoder": "jacobi", "window": 3},
    {"decoder": "sjd", "window": 1},
    {"decoder": "sjd", "window": 2},
    {"decoder": "sjd", "window": 3},
    {"decoder": "sjd", "window": 6},
    {"decoder": "coupled", "coupling": "maximal", "window": 2},
    {"decoder": "coupled", "coupling": "maximal", "window": 4},
    {"decoder": "coupled", "coupling": "maximal", "window": 6},
    {"decoder": "coupled", "coupling": "gumbel", "window": 2},
    {"decoder": "coupled", "coupling": "gumbel", "window": 4},
    {"decoder": "coupled", "coupling": "gumbel", "window": 6},
    {"decoder": "jacobi", "window": 4, "repeat_distance": 1},
    {"decoder": "sjd", "window": 4, "repeat_distance": 1},
    {"decoder": "coupled", "coupling": "maximal", "window": 4, "repeat_distance": 1},
    {"decoder": "coupled", "coupling": "gumbel", "window": 4, "repeat_distance": 2},
]


def name(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_law(model: PrefixModel, case: dict) -> None:
    assert law_distance(model, DecodeConfig(**case)) <= PERFECT


@pytest.mark.parametrize("case", CASES, ids=name)
def test_backends_write_the_same_tokens(model: PrefixModel, uncond: PrefixModel, case: dict) -> None:
    prompt = torch.arange(4096) % 2
    config = DecodeConfig(**case, guidance_scale=2.5, temperature=1.6, top_k=3, top_p=0.9)
    usual = decode(model, config, prompt, range(4096), uncond)
    with backend("reference"):
        expected = decode(model, config, prompt, range(4096), uncond)
    assert torch.equal(usual.tokens, expected.tokens) and torch.equal(usual.histogram, expected.histogram)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_law_of_longer_pictures(long_model: PrefixModel, coupling: str) -> None:
    config = DecodeConfig(decoder="coupled", coupling=coupling, window=4)
    assert law_distance(long_model, config) <= PERFECT


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7], CASES[10]], ids=name)
def test_law_with_guidance_and_truncation(model: PrefixModel, uncond: PrefixModel, case: dict) -> None:
    options = {"guidance_scale": 2.5, "temperature": 1.6, "top_k": 3, "top_p": 0.9}
    assert law_distance(model, DecodeConfig(**case, **options), uncond=uncond) <= PERFECT


@pytest.mark.usefixtures("each_backend")
def test_greedy_is_one_picture(model: PrefixModel) -> None:
    prompt = torch.arange(6) % 2
    for case in CASES:
        tokens = decode(model, DecodeConfig(**case, temperature=0.0), prompt, range(6)).tokens
        for number in range(2):
            law = model.joint(number, DecodeConfig(temperature=0.0))
            image = model.layout.image_tokens(tokens[prompt == number])
            index = (image * 4 ** torch.arange(image.shape[1]).flip(0)).sum(1)
            assert bool((law[index] == 1.0).all())


# -------------------------------------------------------------------- token for token


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8])
def test_jacobi_writes_the_tokens_of_ar(model: PrefixModel, uncond: PrefixModel, window: int) -> None:
    prompt = torch.arange(4096) % 2
    options = {"guidance_scale": 1.7, "top_k": 3, "temperature": 1.3}
    expected = decode(model, DecodeConfig(**options), prompt, range(4096), uncond)
    got = decode(model, DecodeConfig(decoder="jacobi", window=window, **options), prompt, range(4096), uncond)
    assert torch.equal(got.tokens, expected.tokens)
    assert bool((got.steps <= expected.steps).all())
    if window > 1:
        assert float(got.steps.float().mean()) < 4.5


@pytest.mark.parametrize("case", CASES, ids=name)
def test_rows_do_not_depend_on_the_batch(model: PrefixModel, case: dict) -> None:
    config = DecodeConfig(**case)
    prompt = torch.tensor([0, 1, 1, 0, 1])
    together = decode(model, config, prompt, [7, 8, 9, 2**40, 7]).tokens
    for row, seed in enumerate([7, 8, 9, 2**40, 7]):
        alone = decode(model, config, prompt[row : row + 1], [seed]).tokens
        assert torch.equal(alone[0], together[row])


# -------------------------------------------------------------------- broken on purpose


class StaleQ(JacobiWindow):
    """Keeps the old q of drafts that survived the coupled redraw."""

    def step(self, logits: Tensor):
        mine = self._drafts
        drafts, status, q = mine.tokens.clone(), mine.status.clone(), mine.q.clone()
        result = super().step(logits)
        source = result.accepted[:, None] + torch.arange(drafts.shape[1])
        inside = source < drafts.shape[1]
        source = source.clamp(max=drafts.shape[1] - 1).long()
        kept = inside & (drafts.gather(1, source) == mine.tokens) & (status.gather(1, source) == reference.TRACKED)
        old = q.gather(1, source[..., None].expand_as(q))
        mine.q.copy_(torch.where(kept[..., None], old, mine.q))
        return result


def test_stale_q_is_seen(model: PrefixModel) -> None:
    config = DecodeConfig(decoder="coupled", coupling="maximal", window=4)
    assert law_distance(model, config, window_class=StaleQ) > 1.5


@pytest.mark.usefixtures("on_reference")
def test_residual_sharing_the_drafts_noise_is_seen(model: PrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(seeds: Tensor, positions: Tensor, iteration: Tensor, count: int) -> tuple[Tensor, Tensor]:
        u, _ = honest(seeds, positions, iteration, count)
        return u, rng.gumbel(seeds, positions, 0, rng.SAMPLE, count)

    honest = rng.acceptance_draws
    monkeypatch.setattr(rng, "acceptance_draws", shared)
    config = DecodeConfig(decoder="coupled", coupling="gumbel", window=4)
    assert law_distance(model, config) > 1.5


@pytest.mark.usefixtures("on_reference")
def test_noise_shared_by_positions_is_seen(model: PrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rng.gumbel
    monkeypatch.setattr(rng, "gumbel", lambda seeds, positions, *rest: honest(seeds, positions * 0, *rest))
    assert law_distance(model, DecodeConfig(decoder="jacobi", window=3)) > 1.5
    assert law_distance(model, DecodeConfig(decoder="sjd", window=3)) > 1.5


@pytest.mark.usefixtures("on_reference")
def test_acceptance_numbers_used_twice_are_seen(long_model: PrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rng.acceptance_draws
    monkeypatch.setattr(rng, "acceptance_draws", lambda s, p, iteration, n: honest(s, p, iteration * 0, n))
    config = DecodeConfig(decoder="coupled", coupling="maximal", window=4)
    assert law_distance(long_model, config) > 1.5


@pytest.mark.usefixtures("on_reference")
def test_rejections_drawn_from_p_are_seen(model: PrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = decoding._ratio_scan

    def without_residual(decided: Tensor, open_: Tensor, p: Tensor, drafts: Tensor, q: Tensor, *rest: Any):
        _, run = honest(decided, open_, p, drafts, q, *rest)
        passed = torch.arange(drafts.shape[1]) < run[:, None]
        return torch.cat((torch.where(passed, drafts, decided[:, :-1]), decided[:, -1:]), 1), run

    monkeypatch.setattr(decoding, "_ratio_scan", without_residual)
    assert law_distance(model, DecodeConfig(decoder="sjd", window=3)) > 1.5
