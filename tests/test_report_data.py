"""What the report is made of: traces of real decodes, variants of SJD2 with parts taken away, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.evaluation import traces
from sjd2_engine.evaluation.experiments import denoise_and_test, denoise_only
from sjd2_engine.evaluation.intervals import Interval, bootstrap, median, paired
from sjd2_engine.evaluation.traces import Trace, cost_map, watch

PROMPTS, SEEDS = ["a red circle left of a blue square", "three green stars"], [5, 9]


def test_a_watched_decode_is_the_engines_own(tuned: Engine) -> None:
    config = tuned.config_for("sjd2", window=24)
    watched = watch(tuned, config, PROMPTS, SEEDS)
    result = tuned.generate(PROMPTS, "sjd2", window=24, seed=SEEDS)
    assert [trace.steps for trace in watched] == result.stats.forward_passes
    for trace in watched:
        assert sum(trace.accepted) == len(tuned.model.layout)
        assert trace.lengths == [0, *np.cumsum(trace.accepted)[:-1]]
        assert trace.cost().sum() == pytest.approx(trace.steps), "every pass is charged to the tokens it won"
        assert max(levels.max() for levels in trace.levels) == config.denoise_levels - 1


def test_the_map_of_ar_is_one_pass_everywhere(base: Engine) -> None:
    watched = watch(base, base.config_for("ar"), PROMPTS[:1], SEEDS[:1])
    assert np.array_equal(cost_map(base, watched), np.ones((16, 16)))


def test_the_map_of_a_window_counts_its_passes(tuned: Engine) -> None:
    watched = watch(tuned, tuned.config_for("jacobi"), PROMPTS, SEEDS)
    found = cost_map(tuned, watched)
    assert found.shape == (16, 16) and found.max() <= 1 and found.min() >= 1 / 16
    assert found[0, 0] == np.mean([1 / trace.accepted[0] for trace in watched])


def test_states_of_a_trace_by_hand() -> None:
    trace = Trace(
        lengths=[0, 1, 3],
        tokens=[np.array([-1, -1]), np.array([7, -1]), np.array([9, 0])],
        levels=[np.array([1, 1]), np.array([-1, 0]), np.array([-1, -1])],
        accepted=[1, 2, 1],
    )
    hidden, before, new = traces.HIDDEN, traces.ACCEPTED_BEFORE, traces.NEW
    assert trace.states().tolist() == [[2, 2, hidden, hidden], [before, new, 1, hidden], [before, before, before, new]]
    kept = Trace([0, 0], [np.array([4]), np.array([4])], [np.array([-1]), np.array([-1])], [0, 2])
    assert kept.states().tolist() == [[new, hidden], [traces.KEPT, hidden]]


def test_denoise_and_test_is_the_engines_sjd2(tuned: Engine) -> None:
    options = {"window": 24, "denoise_levels": 3}
    found = denoise_and_test(tuned, tuned.config_for("sjd2", **options), PROMPTS, SEEDS)
    result = tuned.generate(PROMPTS, "sjd2", seed=SEEDS, **options)
    assert torch.equal(found.tokens, result.tokens)
    assert found.forward_passes == result.stats.forward_passes


def test_raw_noise_changes_the_drafts_and_no_token(tuned: Engine) -> None:
    config = tuned.config_for("sjd2", window=24)
    raw = denoise_and_test(tuned, config, PROMPTS, SEEDS, normalised=False)
    own = denoise_and_test(tuned, config, PROMPTS, SEEDS)
    assert torch.equal(raw.tokens, own.tokens), "match gives AR's tokens whatever the drafts"
    assert raw.forward_passes != own.forward_passes, "other drafts hold at other times"


def test_denoising_without_a_test(tuned: Engine) -> None:
    config = tuned.config_for("sjd2", window=18, denoise_levels=2)
    found = denoise_only(tuned, config, PROMPTS, SEEDS)
    assert found.forward_passes == [2 * 16] * 2 and found.tokens.shape == (2, 256)
    assert found.tokens.min() >= 0
    ar = tuned.generate(PROMPTS, "ar", seed=SEEDS).tokens
    assert torch.equal(found.tokens[:, 0], ar[:, 0]), "the first position has seen nothing but the prompt"
    assert not torch.equal(found.tokens, ar)


def test_denoising_one_position_at_a_time_is_ar(tuned: Engine) -> None:
    config = tuned.config_for("sjd2", window=2, denoise_levels=1)
    found = denoise_only(tuned, config, PROMPTS[:1], SEEDS[:1])
    assert torch.equal(found.tokens, tuned.generate(PROMPTS[:1], "ar", seed=SEEDS[:1]).tokens)


def test_intervals() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(10, 2, 400)
    found = bootstrap(values.tolist())
    reach = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.03)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.03)
    assert bootstrap([3.0]) == Interval(3.0, 3.0, 3.0)
    assert median([1, 2, 30]).value == 2
    assert paired([1, 1, 0], [1, 0, 0]).value == pytest.approx(1 / 3)
    assert Interval(4, 2, 8).inverse(8) == Interval(2, 1, 4)
    assert Interval(0.5, 0.25, 0.75).text("{:.0f} %", 100) == "50 % (25 % – 75 %)"
