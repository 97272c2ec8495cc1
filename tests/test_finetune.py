"""Noise training: staircases, batches, the objective against its dense definition, options, errors, the estimate."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import finetuning

from sjd2_engine.errors import CheckpointError, ConfigError, NumericalError, PromptError
from sjd2_engine.layout import TokenLayout
from sjd2_engine.models import ModelFacts
from sjd2_engine.schedule import CLEAN, embedding_statistics, noise_times, timestep_encodings
from sjd2_engine.training.batches import Feed
from sjd2_engine.training.estimate import estimate
from sjd2_engine.training.noise import draw_levels, mixed, saw_tooth
from sjd2_engine.training.objective import Objective, recompute_activations
from sjd2_engine.training.optimise import rate_at
from sjd2_engine.training.options import NoiseRecipe, Options
from sjd2_engine.transformer import TransformerConfig

LAYOUT = TokenLayout.raster(4, 4, image_vocab=32)


# Levels.


@pytest.mark.parametrize("levels", [1, 3, 25])
@pytest.mark.parametrize("reset", [0.0, 0.02])
def test_levels_rise_one_by_one_and_fall_back_to_clean(levels: int, reset: float) -> None:
    recipe = NoiseRecipe(levels=(levels,), segment=(2, 5), clean_run=(0, 9), reset=reset)
    row = saw_tooth(3000, levels, recipe, torch.Generator().manual_seed(0))
    values, lengths = torch.unique_consecutive(row, return_counts=True)
    assert set(values.tolist()) == {CLEAN, *range(levels)}
    for before, after in zip(values.tolist(), values.tolist()[1:]):
        # Up by one, or down: to clean or straight into the next staircase, from the top or, with resets, from anywhere.
        assert after == before + 1 or (after in (CLEAN, 0) and (reset or before == levels - 1))
    noisy = values[:-1] != CLEAN
    if levels > 1 and not reset:
        assert int(lengths[:-1][noisy].min()) >= 2 and int(lengths[:-1][noisy].max()) <= 5
    assert int(lengths[:-1][~noisy].max()) <= 9


def test_the_share_of_clean_pictures_is_exact_and_other_counts_have_their_own_times() -> None:
    recipe = NoiseRecipe(levels=(3, 2), t_min=0.5, clean_share=0.25, other_counts=0.5)
    times = recipe.times()
    assert torch.equal(times, torch.cat([noise_times(3, 0.5), noise_times(2, 0.5)]))
    rows = [draw_levels(400, n, recipe, torch.Generator().manual_seed(mixed(n))) for n in range(200)]
    assert sum(bool((row == CLEAN).all()) for row in rows) == 50
    kinds = {tuple(row[row != CLEAN].unique().tolist()) for row in rows} - {()}
    assert kinds == {(0, 1, 2), (3, 4)}
    assert 40 < sum(int(row.max()) > 2 for row in rows) < 110


# Batches.


def feed(seed: int = 0, count: int = 20) -> Feed:
    class Numbered:
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> tuple[Tensor, str]:
            return torch.full((16,), index), f"picture {index}"

    return Feed(Numbered(), LAYOUT, 32, NoiseRecipe(levels=(3,), t_min=0.5, clean_run=(0, 3)), seed, 4)


def test_a_picture_of_the_run_is_the_same_in_any_batch() -> None:
    together = feed().training(range(40))
    for number in (0, 7, 16, 39):
        alone = feed().training([number])
        assert torch.equal(alone.tokens[0], together.tokens[number])
        assert torch.equal(alone.levels[0], together.levels[number])
        assert alone.seeds[0] == together.seeds[number] and alone.captions[0] == together.captions[number]
    assert len({*together.seeds.tolist()}) == 40
    assert not torch.equal(feed(1).training(range(40)).tokens, together.tokens)


def test_every_epoch_has_every_training_picture_once_and_none_kept_apart() -> None:
    tokens = feed().training(range(48)).tokens[:, 0].view(3, 16)
    assert all(sorted(epoch.tolist()) == list(range(16)) for epoch in tokens)
    assert not torch.equal(tokens[0], tokens[1])
    kept = [feed().validation(3, which) for which in range(feed().validation_batches(3))]
    assert [batch.tokens[:, 0].tolist() for batch in kept] == [[16, 17, 18], [19]]
    assert not any(dropped for batch in kept for dropped in batch.dropped)


def test_forced_tokens_are_never_noised() -> None:
    batch = feed().training(range(64))
    forced = torch.tensor(LAYOUT.forced[:-1]) >= 0
    assert (batch.levels[:, forced] == CLEAN).all() and (batch.levels[:, ~forced] != CLEAN).any()
    assert (batch.tokens[:, :-1][:, forced] == 32).all()


def test_too_few_pictures_and_foreign_tokens_are_errors() -> None:
    with pytest.raises(ConfigError, match="20 pictures: 4 are kept apart and one step takes 17"):
        feed().require(17, 4)
    with pytest.raises(CheckpointError, match=r"tokens from 3[23] to 3[23], the model knows 0 to 31"):
        feed(count=40).training(range(36))


# The objective.


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "llamagen-t2i"])
def test_the_objective_is_its_dense_definition(kind: str, tmp_path: Path) -> None:
    """Losses and gradients of padded batches against one picture at a time under a dense mask, in float64."""
    folder = finetuning.write_checkpoint(kind, tmp_path / "base")
    model = finetuning.load(kind, folder)
    core = model.transformer.double().requires_grad_(True)
    core.set_rope(core.cos.float(), core.sin.float())
    recipe = NoiseRecipe(levels=(3, 2), t_min=0.5, segment=(1, 3), clean_run=(0, 3), unconditional=0.4)
    pictures = finetuning.Random(model, finetuning.texts_of(kind))
    batch = Feed(pictures, model.layout, core.image_vocabulary, recipe, 3, 2).training(range(6))
    assert len({*map(len, map(model.prompt_embeds, batch.captions))}) > 1 and any(batch.dropped)
    objective = Objective(model, recipe.times())
    losses = objective(batch)
    wanted = torch.stack([dense_loss(model, batch, row, recipe.times()) for row in range(6)])
    torch.testing.assert_close(losses.mean, wanted.mean(), atol=1e-5, rtol=1e-5)
    assert losses.counts.sum() == 6 * model.layout.image_count
    torch.testing.assert_close(losses.sums.sum() / losses.counts.sum(), losses.mean.detach().float())
    weights = [weight for weight in core.parameters() if weight.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(losses.mean, weights), torch.autograd.grad(wanted.mean(), weights)):
        torch.testing.assert_close(mine, theirs, atol=2e-6 * float(theirs.abs().max()) + 1e-9, rtol=1e-4)
    # Recomputed activations change nothing.
    recompute_activations(core.blocks)
    again = torch.autograd.grad(objective(batch).mean, weights)
    assert all(torch.equal(a, b) for a, b in zip(again, torch.autograd.grad(objective(batch).mean, weights)))


def dense_loss(model, batch, row: int, times: Tensor) -> Tensor:
    core, layout = model.transformer, model.layout
    text = batch.captions[row]
    prompt = (model.unconditional_embeds(text, "") if batch.dropped[row] else model.prompt_embeds(text)).detach()
    mean, std = embedding_statistics(core.embedding.detach(), core.image_vocabulary)
    tokens, levels = batch.tokens[row], batch.levels[row]
    place = torch.arange(len(tokens) - 1)[None]
    noisy = torch.ops.sjd2.perturb(
        core.embedding[tokens[:-1]][None], levels[None].int(), place, batch.seeds[row, None], mean, std, times, 0, True
    )[0]
    count, length = len(times), len(prompt) + len(noisy)
    embeds = torch.cat([timestep_encodings(times, mean, std).to(noisy.dtype), prompt.to(noisy.dtype), noisy])
    tail = torch.arange(length) + model.position_offset(len(prompt))
    positions = torch.cat([torch.zeros(count, dtype=torch.int64), tail])
    inner = F.pad(levels, (len(prompt), 0), value=CLEAN)
    seen = torch.zeros(count + length, count + length, dtype=torch.bool)
    seen[:count, :count] = torch.eye(count, dtype=torch.bool)
    seen[count:, :count] = inner[:, None] == torch.arange(count)
    seen[count:, count:] = torch.ones(length, length, dtype=torch.bool).tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)

    hidden = core(embeds[None], positions, attend)[0, count + len(prompt) - 1 :]
    free = torch.tensor(layout.forced) < 0
    return F.cross_entropy(core.head(hidden)[free].float(), tokens[free])


def test_captions_that_are_too_long_are_named(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-t2i", tmp_path / "base")
    run = finetuning.make_run("llamagen-t2i", folder, tmp_path / "out")
    batch = replace(run.feed.training([0]), captions=["a red fox in the fog " * 9], dropped=[False])
    with pytest.raises(PromptError, match="shorten"):
        run.objective(batch)


# The run.


def weights_after(run: finetuning.Finetune) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in run.model.transformer.named_parameters()}


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"optimiser": "muon"}, {"lora": 2, "schedule": "constant"}])
def test_a_stopped_run_goes_on_bit_for_bit(changes: dict, tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    changes = {"steps": 6, "save_every": 2, **changes}
    straight = finetuning.make_run("llamagen-c2i", folder, tmp_path / "a", **changes)
    straight.train()
    finetuning.make_run("llamagen-c2i", folder, tmp_path / "b", **changes).train(stop_at=3)
    resumed = finetuning.make_run("llamagen-c2i", folder, tmp_path / "b", **changes)
    assert resumed.step == 3 and [p.name for p in (tmp_path / "b" / "run").glob("step-*")] == ["step-00000003"]
    resumed.train()
    expected = weights_after(straight)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_after(resumed).items())
    straight.write()
    resumed.write()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    base, tuned = (finetuning.load("llamagen-c2i", path).transformer for path in (folder, tmp_path / "a"))
    changed = {n for n, weight in tuned.named_parameters() if not torch.equal(weight, base.get_parameter(n))}
    assert changed and ("lora" not in changes or changed == {n for n in changed if "blocks." in n and "norm" not in n})


def test_small_passes_add_up_to_the_same_step(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    found = []
    for size in (4, 2, 1):
        run = finetuning.make_run("llamagen-c2i", folder, tmp_path / str(size), steps=3, micro_batch=size)
        run.train()
        found.append(weights_after(run))
    for other in found[1:]:
        for name, weight in other.items():
            torch.testing.assert_close(weight, found[0][name], atol=2e-5, rtol=1e-4)


def test_another_request_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=4).train(stop_at=1)
    with pytest.raises(ConfigError, match=r"begun with rate=0.002, now it is 0.1"):
        finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=4, rate=0.1)
    # What does not decide the result may change.
    assert finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=4, micro_batch=2).step == 1


def test_a_run_that_diverges_stops_and_keeps_its_last_sound_checkpoint(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    changes = {"steps": 8, "save_every": 1, "log_every": 1}
    run = finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", **changes)
    run.train(stop_at=2)
    with torch.no_grad():
        run.model.transformer.norm.fill_(float("inf"))
    with pytest.raises(NumericalError, match="loss is nan"):
        run.train()
    assert finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", **changes).step == 2


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    run = finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=2, save_every=1)
    run.train(stop_at=1)
    with no_room_beyond(20_000), pytest.raises(ConfigError, match="goes on from step-00000001"):
        run.train()
    assert [p.name for p in (tmp_path / "out" / "run").glob("step-????????")] == ["step-00000001"]
    run = finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=2, save_every=1)
    assert run.step == 1
    run.train()
    with no_room_beyond(20_000), pytest.raises(ConfigError, match="only the writing is repeated"):
        run.write()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        finetuning.load("llamagen-c2i", tmp_path / "out")
    finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=2, save_every=1).write()
    assert finetuning.load("llamagen-c2i", tmp_path / "out").noise is not None


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=2).train(stop_at=1)
    for file in (tmp_path / "out" / "run" / "step-00000001").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read .*delete it"):
        finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=2)


def test_the_log_tells_speed_and_losses_by_level(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    run = finetuning.make_run("llamagen-c2i", folder, tmp_path / "out", steps=4, log_every=2, validate_every=2)
    run.train()
    run.write()
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 2, 4, 4]
    names = {"clean", "t=0.500", "t=1.000"}
    assert {f"loss/{name}" for name in names} <= set(lines[1]) and lines[1]["tokens_per_second_per_device"] > 0
    assert all({"validation_loss", "validation_loss_noisy/clean inputs"} <= set(lines[i]) for i in (0, 2, 4))
    report = json.loads((tmp_path / "out" / "run" / "report.json").read_text())
    assert report["steps"] == 4 and report["validation_loss"] > 0
    noise = json.loads((tmp_path / "out" / "sjd2.json").read_text())
    mean, std = embedding_statistics(run.model.transformer.embedding, run.model.transformer.image_vocabulary)
    torch.testing.assert_close(torch.tensor(noise["embedding_mean"]), mean.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(noise["embedding_std"]), std.detach(), atol=1e-5, rtol=1e-5)
    assert (noise["levels"], noise["t_min"], len(noise["times"])) == (3, 0.5, 3)


# Options.


def test_rates() -> None:
    options = Options.build("", warmup=10, rate=1.0, final_share=0.1)
    rates = [rate_at(step, 100, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and max(rates) <= 1.0 and 0.1 <= rates[-1] < 0.11
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rate_at(99, 100, replace(options, schedule="constant")) == 1.0


def test_defaults_of_the_publication_and_of_the_bundled_model() -> None:
    options = Options.build("chameleon")
    assert (options.rate, options.batch, options.epochs, options.optimiser) == (2e-5, 64, 6.0, "adamw")
    assert options.noise.levels == (25,) and options.steps_for(80_000) == 7500
    scenes = Options.build("scenes", levels=(5,))
    assert (scenes.noise.levels, scenes.noise.t_min, scenes.optimiser) == ((5,), 0.75, "muon")
    assert options.accumulation(8) == 8


def test_epochs_win_over_the_usual_steps() -> None:
    assert Options.build("scenes").steps_for(64) == 1300
    assert Options.build("scenes", epochs=3.0).steps_for(64) == 6
    assert Options.build("scenes", epochs=3.0, steps=5).steps_for(64) == 5


@pytest.mark.parametrize(
    "given, words",
    [
        ({"levels": (0,)}, "levels=0"),
        ({"levels": ()}, "levels is empty"),
        ({"t_min": 1.0}, "t_min=1.0"),
        ({"segment": (0, 3)}, "segment=0,3"),
        ({"clean_share": 1.0}, "clean_share=1.0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"shard": True, "lora": 4}, "shard works with"),
        ({"levles": (3,)}, "did you mean 'levels'"),
    ],
)
def test_bad_options_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Options.build("chameleon", **given)


def test_uneven_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch=64 is no multiple of micro_batch=3 times 8"):
        Options.build("chameleon", micro_batch=3).accumulation(8)


# The estimate.

SEVEN_B = ModelFacts(
    "lumina-mgpt",
    TransformerConfig(4096, 32, 32, 32, 128, 11008, 1e-5, 10_000.0, 10_240, qk_norm="layer", post_norm=True),
    65_536, 8192, (768, 768), TokenLayout.raster(48, 48, image_vocab=8192), {}, 96, 41_000_000,
)  # fmt: skip
GPU = int(80e9)


def test_7b_at_768_fits_eight_gpus_of_80_gb_and_not_one() -> None:
    options = Options.build("lumina-mgpt", shard=True)
    found = estimate(SEVEN_B, options, 8, 80_000, "NVIDIA H100 80GB HBM3")
    assert 6.7e9 < found.parameters < 7.2e9
    # Float32 weights, gradients and two moments, split in eight.
    states = found.footprint.weights + found.footprint.gradients + found.footprint.optimiser
    assert states == pytest.approx(16 * found.parameters / 8, rel=1e-6)
    assert found.fits(GPU) and found.footprint.total < 40e9
    assert not estimate(SEVEN_B, options, 1, 80_000).fits(GPU)
    assert not estimate(SEVEN_B, Options.build("lumina-mgpt"), 8, 80_000).fits(GPU)
    # Without recomputation the activations of 32 layers are kept.
    kept = estimate(SEVEN_B, replace(options, checkpointing=False, micro_batch=8), 8, 80_000)
    assert kept.footprint.activations > 20 * found.footprint.activations and not kept.fits(GPU)
    assert found.hours is not None and 5 < found.hours < 200 and found.steps == 7500
    assert estimate(SEVEN_B, options, 8, 80_000, "unheard of").hours is None


def test_adapters_fit_one_gpu() -> None:
    found = estimate(SEVEN_B, Options.build("lumina-mgpt", lora=32), 1, 80_000)
    assert found.trained < 0.02 * found.parameters and found.fits(int(40e9))


def test_the_estimate_counts_what_a_run_holds(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("llamagen-c2i", tmp_path / "base")
    for changes in ({"ema": 0.5}, {"lora": 2}):
        run = finetuning.make_run("llamagen-c2i", folder, tmp_path / next(iter(changes)), steps=1, **changes)
        run.train()
        found = estimate(run.model.facts, run.options, 1, 8)
        # Normalisers and adapters' scales are all that peft adds beside the adapters.
        live = sum(weight.nbytes for weight in run.objective.parameters())
        assert found.footprint.weights == live
        moments = sum(
            value.nbytes
            for o in run.optimisers
            for state in o.state.values()
            for value in state.values()
            if value.dim()
        )
        moments += sum(value.nbytes for value in run.average.weights.values()) if run.average else 0
        assert found.footprint.optimiser == moments
