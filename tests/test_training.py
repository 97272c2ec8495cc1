"""Training: levels as published, noise that leaves clean tokens alone, a loop that resumes, a model that loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import load_model
from sjd2_engine.models.scenes import ScenesModel
from sjd2_engine.models.scenes_vq import SceneVQ
from sjd2_engine.scenes.world import WORDS
from sjd2_engine.schedule import noise_times
from sjd2_engine.training.base import clean_logits, image_loss, scenes_model
from sjd2_engine.training.dataset import POSITIONS, TokenData, encode_pictures, prompt_ids, write
from sjd2_engine.training.export import save_scenes
from sjd2_engine.training.loop import Trainer
from sjd2_engine.training.noise import CLEAN_SHARE, finetune, noisy_batch, noisy_logits, saw_tooth


@pytest.fixture(scope="module")
def untrained() -> ScenesModel:
    torch.manual_seed(0)
    vq = SceneVQ().eval().requires_grad_(False)
    vq.codebook.normal_()
    return ScenesModel("untrained", scenes_model(0).requires_grad_(False), vq, list(WORDS), None)


@pytest.fixture(scope="module")
def data(untrained: ScenesModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(untrained.vq, folder, 1000, seed=0)
    return folder


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_levels_rise_one_by_one_and_fall_back_to_clean(levels: int) -> None:
    rows = saw_tooth(64, levels, torch.Generator().manual_seed(0))
    assert rows.shape == (64, POSITIONS) and int(rows.min()) == -1 and int(rows.max()) == levels - 1
    assert (rows == -1).all(1).sum() >= round(CLEAN_SHARE * 64)
    steps = rows.diff(dim=1)[rows.diff(dim=1) != 0]
    before = rows[:, :-1][rows.diff(dim=1) != 0]
    # Up by one, or from the last level back to clean (-1) or straight into the next staircase (0).
    assert ((steps == 1) | (before == levels - 1)).all()


def test_noise_leaves_clean_inputs_alone_and_destroys_at_the_last_level(data: Path) -> None:
    model = scenes_model(1).requires_grad_(False)
    batch = TokenData(data, validation=50).sample(4, torch.Generator().manual_seed(0))
    levels = torch.full((4, POSITIONS), -1)
    times = noise_times(3, 0.5)
    clean = noisy_batch(model, batch, levels, times, torch.Generator().manual_seed(1))
    expected = model.embedding[torch.cat([batch.prompt, batch.image[:, :-1]], 1)]
    assert torch.equal(clean.embeds[:, 3:], expected)
    logits = noisy_logits(model, clean.embeds, clean.positions, clean.mask)
    torch.testing.assert_close(logits, clean_logits(model, batch), atol=1e-4, rtol=1e-4)
    noisy = noisy_batch(model, batch, levels + 3, times, torch.Generator().manual_seed(1))
    pictures = noisy.embeds[:, 3 + batch.prompt.shape[1] :]
    forced = batch.image[:, :-1] >= 256
    given = model.embedding[batch.image[:, :-1]]
    assert torch.equal(pictures[forced], given[forced])
    together = torch.stack([pictures[~forced].flatten(), given[~forced].flatten()])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.1


def test_forced_tokens_are_not_learned() -> None:
    image = torch.full((1, POSITIONS), 256)
    image[0, 5] = 7
    logits = torch.zeros(1, POSITIONS, 256)
    logits[0, 5, 7] = 50.0
    assert float(image_loss(logits, image)) < 1e-6


def test_captions_of_the_data_are_those_of_the_pictures(data: Path, untrained: ScenesModel) -> None:
    tokens = TokenData(data, validation=100)
    batch = tokens.sample(8, torch.Generator().manual_seed(3), unconditional=0.0)
    assert (batch.image.view(8, 16, 17)[:, :, 16] == 256).all() and (batch.image.view(8, 16, 17)[:, :, :16] < 256).all()
    assert batch.prompt[0, 0] == prompt_ids("")[0] and batch.prompt[0, -1] == prompt_ids("")[-1]
    assert sum(len(b.image) for b in tokens.validation()) == 100
    assert TokenData(data).sample(2, torch.Generator().manual_seed(0), unconditional=1.1).prompt.shape == (2, 2)
    with pytest.raises(RuntimeError):
        encode_pictures(untrained.vq, np.zeros((1, 128, 128, 4), dtype=np.uint8))


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def make() -> Trainer:
        torch.manual_seed(0)
        return Trainer(scenes_model(0), tmp_path, minutes=1e-9, rate=1e-3, weight_decay=0.1, seed=0)

    def loss_of(generator: torch.Generator):
        weight = trainer.model.get_parameter("head.weight")
        loss = (weight * torch.randn(weight.shape, generator=generator)).sum()
        return loss, {"loss": float(loss.detach())}

    trainer = make()
    trainer.seconds = 1e9
    straight = []
    for steps in (2, 4):
        while trainer.step < steps:
            trainer.advance(loss_of)
        if steps == 2:
            trainer.save()
    straight = trainer.model.get_parameter("head.weight").clone()
    trainer = make()
    trainer.resume()
    trainer.seconds = 1e9
    assert trainer.step == 2
    while trainer.step < 4:
        trainer.advance(loss_of)
    # The rate follows the clock, which is a hair later: equal up to that.
    torch.testing.assert_close(trainer.model.get_parameter("head.weight"), straight, atol=1e-6, rtol=1e-4)


def test_finetune_makes_a_model_that_sjd2_accepts(untrained: ScenesModel, data: Path, tmp_path: Path) -> None:
    save_scenes(untrained.transformer, untrained.vq, tmp_path / "base")
    engine = Engine.from_pretrained(str(tmp_path / "base"), device="cpu")
    with pytest.raises(CheckpointError, match="finetune"):
        engine.generate("a ring", decoder="sjd2")
    model = load_model(str(tmp_path / "base"), torch.device("cpu"), torch.float32)
    assert isinstance(model, ScenesModel)
    finetune(model, data, tmp_path / "tuned", 1e-4, [3, 2], 0.6, batch=2, compiled=False)
    tuned = Engine.from_pretrained(str(tmp_path / "tuned"), device="cpu")
    config = tuned.config_for("sjd2")
    assert tuned.is_tuned and (config.denoise_levels, config.t_min) == (2, 0.6)
    report = json.loads((tmp_path / "tuned" / "run" / "report.json").read_text())
    assert report["steps"] >= 1 and set(report["validation_loss_by_level"]) == {"clean", "level0", "level1", "level2"}
    result = tuned.generate("a ring", decoder="sjd2", window=20)
    assert torch.equal(result.tokens, tuned.generate("a ring", decoder="ar").tokens)


def test_damaged_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match=r"tokens\.safetensors"):
        TokenData(tmp_path)
    with pytest.raises(ConfigError):
        noise_times(0)
