"""window="auto": the tuner on made-up machines, the law of what it draws, the engine on the bundled model."""

from __future__ import annotations

import pytest
import torch

from sjd2_engine import DecodeConfig, Engine, JacobiWindow, TokenLayout
from sjd2_engine.errors import ConfigError
from sjd2_engine.tuning import WIDTHS, WindowTuner


def run(tuner: WindowTuner, seconds, accepted, passes: int = 3000) -> list[int]:
    """Widths chosen on a machine where a pass of W takes seconds(W) and accepts accepted(W) tokens."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for _ in range(passes):
        width = tuner.width
        noise = 0.7 + 0.6 * float(torch.rand((), generator=generator))
        tuner.observe(width, seconds(width), noise * accepted(width))
        chosen.append(width)
    return chosen


MACHINES = {
    "flat": lambda w: 1.0,
    "cpu": lambda w: 1.0 + 0.06 * w,
    "steep": lambda w: 0.2 + 0.2 * w,
    "stairs": lambda w: 1.0 + 0.5 * (w > 16) + 1.5 * (w > 48),
}
MODELS = {
    "early": lambda w: 4.0 * w / (w + 4),
    "late": lambda w: 12.0 * w / (w + 30),
    "wall": lambda w: min(0.3 * w, 5.0),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_it_settles_near_the_best_width(machine: str, model: str) -> None:
    seconds, accepted = MACHINES[machine], MODELS[model]
    best = max(accepted(width) / seconds(width) for width in WIDTHS)
    chosen = run(WindowTuner(16), seconds, accepted)
    for passes, share in ((chosen, 0.9), (chosen[-500:], 0.93)):
        assert sum(map(accepted, passes)) / sum(map(seconds, passes)) > share * best


def test_a_change_of_the_machine_is_noticed() -> None:
    tuner = WindowTuner(16)
    run(tuner, MACHINES["flat"], MODELS["late"], 1500)
    assert tuner.width >= 64
    run(tuner, MACHINES["steep"], MODELS["late"], 3000)
    assert tuner.width <= 24


def test_wide_windows_that_cannot_win_are_not_tried() -> None:
    chosen = run(WindowTuner(16), lambda w: 1.0 + 0.3 * w, MODELS["early"])
    assert max(chosen) < max(WIDTHS)
    assert max(run(WindowTuner(16), MACHINES["flat"], MODELS["early"])) == max(WIDTHS)


def test_only_widths_there_is_room_for() -> None:
    tuner = WindowTuner(9, (8, 12))
    assert set(run(tuner, MACHINES["flat"], MODELS["late"], 400)) <= {8, 9, 12}


@pytest.mark.parametrize("decoder", ["jacobi", "sjd2"])
def test_auto_draws_the_tokens_of_ar(tuned: Engine, decoder: str) -> None:
    prompts = ["a ring", "three stars", "a red circle left of a blue square", "two rings"]
    expected = tuned.generate(prompts, "ar", seed=3).tokens
    result = tuned.generate(prompts, decoder, seed=3, window="auto", max_batch=2)
    assert torch.equal(result.tokens, expected)
    assert len(result.stats.windows) >= 3 and result.stats.window in result.stats.windows
    assert sum(n * times for n, times in result.stats.accepted_per_step.items()) == 4 * 272


def test_auto_goes_on_where_the_last_call_ended(base: Engine) -> None:
    first = base.generate("a ring", "jacobi", window="auto", temperature=0.8)
    again = base.generate("a ring", "jacobi", window="auto", temperature=0.8)
    usual = base.config_for("jacobi").width
    timed = set(first.stats.windows)
    assert {width for width in WIDTHS if width <= usual} < timed <= set(WIDTHS), "the narrow ones and some wider ones"
    assert len(again.stats.windows) < len(timed)


def test_auto_is_the_engines() -> None:
    with pytest.raises(ConfigError, match="a number"):
        JacobiWindow(DecodeConfig("jacobi", window="auto"), TokenLayout([-1] * 4, 3))
    with pytest.raises(ConfigError, match="window"):
        DecodeConfig("jacobi", window="wide")  # pyright: ignore[reportArgumentType]


def test_ar_has_no_window_to_choose(base: Engine) -> None:
    assert base.generate("a ring", "ar", window="auto").stats.windows == {1: 272}
