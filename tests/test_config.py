"""DecodeConfig, TokenLayout, schedule: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from sjd2_engine import DecodeConfig, TokenLayout, errors
from sjd2_engine.config import DECODERS
from sjd2_engine.decoders import PLANS, make_plan
from sjd2_engine.errors import ConfigError
from sjd2_engine.schedule import embedding_statistics, noise_times, refine_ratios, timestep_encodings

BAD = [
    {"decoder": "sdj2"},
    {"decoder": None},
    {"verification": "exact"},
    {"coupling": "gumbe"},
    {"warmup": ""},
    {"window": 0},
    {"window": 4.0},
    {"window": "32"},
    {"window": True},
    {"denoise_levels": 0},
    {"t_min": 0.0},
    {"t_min": 1.0},
    {"guidance_scale": math.nan},
    {"guidance_scale": "3"},
    {"temperature": -0.1},
    {"temperature": math.inf},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_p": True},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": 1.5},
    {"seed": ()},
    {"seed": (1, "2")},
    {"seed": "12"},
    {"negative_prompt": None},
    {"max_batch": 0},
    {"decoder": "sjd2", "verification": "paper", "coupling": "maximal"},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_options_are_named(options: dict) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1].replace("_", ".")):
        DecodeConfig(**options)


def test_unknown_option_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="'windw'; did you mean 'window'"):
        DecodeConfig.build({}, windw=3)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        DecodeConfig.build({"temperatur": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'coupled'"):
        DecodeConfig(decoder="couple")


def test_build_merges_defaults() -> None:
    defaults = {
        "window": 16,
        "top_k": 50,
        "sjd2": {"window": 64, "denoise_levels": 3},
        "sjd": {"top_k": None},
    }
    assert DecodeConfig.build(defaults).window == 16
    assert DecodeConfig.build(defaults, decoder="sjd2").window == 64
    assert DecodeConfig.build(defaults, decoder="sjd2", window=8, top_k=None) == DecodeConfig(
        decoder="sjd2", window=8, top_k=50, denoise_levels=3
    )
    assert DecodeConfig.build({"decoder": "sjd2", **defaults}).denoise_levels == 3
    assert DecodeConfig.build(defaults, decoder="sjd").top_k == 0
    assert DecodeConfig.build(None, seed=None) == DecodeConfig()
    with pytest.raises(ConfigError, match="decoder='nope'"):
        DecodeConfig.build(defaults, decoder="nope")


def test_config_is_frozen_and_normalised() -> None:
    config = DecodeConfig(seed=[np.int64(3), 4], temperature=1, window=np.int32(8))  # type: ignore[arg-type]
    assert config.seed == (3, 4) and isinstance(config.temperature, float) and type(config.window) is int
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3  # type: ignore[misc]


def test_seeds_per_image() -> None:
    assert DecodeConfig(seed=7).seeds(3) == [7, 8, 9]
    assert DecodeConfig(seed=2**63 - 1).seeds(2) == [2**63 - 1, 0]
    assert DecodeConfig(seed=(5, 1)).seeds(2) == [5, 1]
    with pytest.raises(ConfigError, match="2 entries for 3"):
        DecodeConfig(seed=(5, 1)).seeds(3)


def test_derived_properties() -> None:
    assert DecodeConfig(decoder="ar", window=9).width == 1 and DecodeConfig(decoder="sjd", window=9).width == 9
    assert DecodeConfig(decoder="sjd2").exact and DecodeConfig(decoder="sjd2").uses_noise
    assert not DecodeConfig(decoder="sjd2", verification="paper").exact
    assert DecodeConfig(decoder="jacobi", verification="paper").exact
    assert not DecodeConfig(decoder="jacobi").uses_noise


def test_registry_holds_every_decoder() -> None:
    assert tuple(PLANS) == DECODERS
    for decoder in DECODERS:
        assert make_plan(DecodeConfig(decoder=decoder)).noisy == (decoder == "sjd2")


def test_errors_have_one_base_and_the_promised_kinds() -> None:
    for kind in ("ConfigError", "PromptError", "CheckpointError", "BackendError", "NumericalError"):
        assert issubclass(getattr(errors, kind), errors.Sjd2Error)
    assert issubclass(errors.ConfigError, ValueError) and issubclass(errors.PromptError, ValueError)
    error = errors.NumericalError("NaN", image=1, step=2, position=3)
    assert (error.image, error.step, error.position) == (1, 2, 3)


# -------------------------------------------------------------------- layout


def test_raster_layout() -> None:
    layout = TokenLayout.raster(2, 3, image_vocab=8, prefix=[9], suffix=[10])
    assert layout.forced == (9, -1, -1, -1, 8, -1, -1, -1, 8, 10)
    assert len(layout) == 10 and layout.image_count == 6 and layout.smallest_forced == 8
    assert TokenLayout.raster(2, 2, image_vocab=8, eol=False).forced == (-1,) * 4
    assert TokenLayout.raster(1, 2, image_vocab=8, eol=11).forced == (-1, -1, 11)


def test_stripping_forced_tokens_and_back() -> None:
    layout = TokenLayout.raster(2, 2, image_vocab=8)
    tokens = torch.tensor([[1, 2, 8, 3, 4, 8]])
    assert layout.image_tokens(tokens).tolist() == [[1, 2, 3, 4]]
    assert torch.equal(layout.all_tokens(layout.image_tokens(tokens)), tokens)
    with pytest.raises(ConfigError, match=r"expected \[B, 6\]"):
        layout.image_tokens(tokens[:, :5])
    with pytest.raises(ConfigError, match=r"expected \[B, 4\]"):
        layout.all_tokens(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"forced": []},
        {"forced": [5, 5]},
        {"forced": [-1, -2]},
        {"forced": [-1, 0.5]},
        {"forced": [-1, 0]},
        {"forced": [-1, 3], "image_vocab": 4},
        {"forced": [-1], "image_vocab": 0},
        {"forced": [-1], "image_vocab": "4"},
        {"forced": [-1], "image_vocab": 4, "legal": (2, 2)},
        {"forced": [-1], "image_vocab": 4, "legal": (0, 5)},
        {"forced": [-1], "image_vocab": 4, "legal": (0,)},
    ],
    ids=str,
)
def test_bad_layouts(options: dict) -> None:
    with pytest.raises(ConfigError):
        TokenLayout(**options)


@pytest.mark.parametrize("size", [(0, 2), (2, 0), (2, 1.0), (True, 2)])
def test_bad_rasters(size: tuple) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        TokenLayout.raster(*size, image_vocab=8)


# -------------------------------------------------------------------- schedule


def test_karras_times() -> None:
    times = noise_times(25, t_min=0.02)
    assert times[0] == pytest.approx(0.02) and times[-1] == 1.0 and bool((times.diff() > 0).all())
    roots = times.double() ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[:1].expand(24), atol=1e-5)
    assert noise_times(1).tolist() == [1.0]
    for bad in (
        {"levels": 0},
        {"levels": 2, "t_min": 0.0},
        {"levels": 2, "t_min": 1.0},
        {"levels": 2, "rho": 0.0},
    ):
        with pytest.raises(ConfigError):
            noise_times(**bad)


def test_ratio_form_is_equation_three() -> None:
    """e' = (σ'/σ) e + α (α'/α − σ'/σ) ê0 with α = 1 − t, σ = t, wherever it does not divide by zero."""
    times = noise_times(6, 0.1).double()
    ratios = refine_ratios(times)
    assert ratios[0] == 0.0
    for level in range(1, 5):
        t, lower = times[level], times[level - 1]
        published = (1 - t) * ((1 - lower) / (1 - t) - lower / t)
        assert ratios[level] == pytest.approx(float(lower / t))
        assert 1 - ratios[level] == pytest.approx(float(published))


def test_statistics_leave_structure_rows_out() -> None:
    rows = torch.randn(11, 4)
    rows[:, 2] = 3.0
    mean, std = embedding_statistics(torch.cat((rows, torch.full((2, 4), 100.0))).bfloat16(), 11)
    assert torch.allclose(mean, rows.bfloat16().float().mean(0)) and mean.dtype == torch.float32
    assert torch.allclose(std[:2], rows.bfloat16().float()[:, :2].std(0, correction=0))
    assert std[2] == pytest.approx(1e-6)
    for bad in (1, 14):
        with pytest.raises(ConfigError, match="image_vocab"):
            embedding_statistics(torch.zeros(13, 4), bad)


@pytest.mark.parametrize("dim", [6, 7])
def test_timestep_encodings_have_the_embeddings_scale(dim: int) -> None:
    mean, std = torch.randn(dim), torch.rand(dim) + 0.5
    code = timestep_encodings(noise_times(5), mean, std)
    assert code.shape == (5, dim) and code.dtype == torch.float32
    plain = (code - mean) / std
    assert torch.allclose(plain.mean(1), torch.zeros(5), atol=1e-5)
    assert torch.allclose(plain.std(1, correction=0), torch.ones(5), atol=1e-4)
    assert len(code.unique(dim=0)) == 5
