"""SJD2 on a model that reacts wildly to noisy inputs and their levels: "match" and "ratio" do not mind."""

from __future__ import annotations

import pytest
import torch
from toy import PrefixModel, assert_cache_clean, decode, law_distance

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_kernels import backend

PERFECT = 1.1


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    return PrefixModel(TokenLayout([-1, -1, 4, -1, -1]), vocab=4)


@pytest.fixture(scope="module")
def long_model() -> PrefixModel:
    return PrefixModel(TokenLayout([-1, -1, -1, 2, -1, -1, -1, -1]), vocab=2, seed=1)


def test_the_toy_reacts_to_noise(model: PrefixModel) -> None:
    """Noise in a slot must change what later slots see, else the tests below would prove nothing."""
    prompt = torch.zeros(512, dtype=torch.int64)
    config = DecodeConfig(decoder="sjd2", window=4, denoise_levels=2, warmup="noise")
    window = JacobiWindow(config, model.layout, model.embedding, model.starts[prompt], seeds=range(512))
    model.begin(prompt, window.width)
    inputs = window.inputs()
    assert inputs.embeds is not None and bool((inputs.levels[:, 1:3] == 1).all())
    logits = model(inputs.embeds, inputs.positions, inputs.levels)
    assert len(logits[:, 1].unique(dim=0)) > 1  # one prompt, one prefix: only the noise differs
    other = model(
        inputs.embeds,
        inputs.positions,
        (inputs.levels - 1).clamp(min=-1).where(inputs.levels > 0, inputs.levels),
    )
    assert not torch.equal(logits[:, 1], other[:, 1])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("warmup", ["tokens", "noise"])
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_match_writes_the_tokens_of_ar(long_model: PrefixModel, window: int, levels: int, warmup: str) -> None:
    prompt = torch.arange(2048) % 2
    expected = decode(long_model, DecodeConfig(), prompt, range(2048))
    config = DecodeConfig(decoder="sjd2", window=window, denoise_levels=levels, warmup=warmup)
    got = decode(long_model, config, prompt, range(2048))
    assert torch.equal(got.tokens, expected.tokens)


CASES = [
    {"window": 3, "denoise_levels": 1, "warmup": "noise"},
    {"window": 5, "denoise_levels": 1, "warmup": "tokens"},
    {"window": 4, "denoise_levels": 2, "warmup": "noise"},
]


@pytest.mark.parametrize("coupling", ["none", "gumbel", "maximal"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_law_of_ratio(model: PrefixModel, case: dict, coupling: str) -> None:
    config = DecodeConfig(decoder="sjd2", verification="ratio", coupling=coupling, **case)
    assert law_distance(model, config) <= PERFECT


RULES = ["match-none", "ratio-none", "ratio-gumbel", "ratio-maximal", "paper-none", "paper-gumbel"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_backends_write_the_same_tokens(model: PrefixModel, case: dict, rule: str) -> None:
    prompt = torch.arange(2048) % 2
    verification, coupling = rule.split("-")
    config = DecodeConfig(decoder="sjd2", verification=verification, coupling=coupling, **case)
    usual = decode(model, config, prompt, range(2048))
    with backend("reference"):
        expected = decode(model, config, prompt, range(2048))
    assert torch.equal(usual.tokens, expected.tokens) and torch.equal(usual.histogram, expected.histogram)


@pytest.mark.parametrize("coupling", ["none", "gumbel", "maximal"])
def test_law_of_ratio_on_longer_pictures(long_model: PrefixModel, coupling: str) -> None:
    config = DecodeConfig(decoder="sjd2", verification="ratio", coupling=coupling, window=5, denoise_levels=2)
    assert law_distance(long_model, config) <= PERFECT


def test_ratio_with_truncation(model: PrefixModel) -> None:
    config = DecodeConfig(
        decoder="sjd2", verification="ratio", window=4, denoise_levels=1, top_k=3, top_p=0.95, temperature=0.8
    )
    assert law_distance(model, config) <= PERFECT


# -------------------------------------------------------------------- as published


@pytest.mark.parametrize("coupling", ["none", "gumbel"])
@pytest.mark.parametrize("window, levels", [(2, 1), (4, 2), (8, 3), (1, 4)])
def test_paper_keeps_the_cache_clean(long_model: PrefixModel, window: int, levels: int, coupling: str) -> None:
    """`decode` checks after every step that kept entries were fed clean: also those accepted while noisy."""
    prompt = torch.arange(2048) % 2
    config = DecodeConfig(
        decoder="sjd2",
        verification="paper",
        coupling=coupling,
        window=window,
        denoise_levels=levels,
        warmup="noise",
    )
    assert not config.exact
    window_ = decode(long_model, config, prompt, range(2048))
    assert_cache_clean(long_model, window_)
    assert bool((window_.tokens[:, 3] == 2).all())


def test_paper_accepts_noisy_drafts(long_model: PrefixModel) -> None:
    """Exact modes wait until a draft is clean; as published it may pass before."""
    prompt = torch.zeros(2048, dtype=torch.int64)
    options = {"decoder": "sjd2", "window": 8, "denoise_levels": 8, "warmup": "noise"}
    paper = decode(long_model, DecodeConfig(verification="paper", **options), prompt, range(2048))
    ratio = decode(long_model, DecodeConfig(verification="ratio", **options), prompt, range(2048))
    assert float(paper.steps.float().mean()) < float(ratio.steps.float().mean())


def test_paper_is_not_exact(long_model: PrefixModel) -> None:
    """The distance that the exactness tests must be able to see."""
    config = DecodeConfig(decoder="sjd2", verification="paper", window=5, denoise_levels=2, warmup="noise")
    assert law_distance(long_model, config) > 1.5
