"""Training of the bundled model: its data, a loop that resumes, a model that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import load_model
from sjd2_engine.models.scenes import ScenesModel
from sjd2_engine.models.scenes_vq import SceneVQ
from sjd2_engine.scenes.world import WORDS
from sjd2_engine.schedule import noise_times
from sjd2_engine.training.base import image_loss, scenes_model
from sjd2_engine.training.dataset import POSITIONS, TokenData, prompt_ids, write
from sjd2_engine.training.export import save_scenes
from sjd2_engine.training.loop import Trainer
from sjd2_engine.training.store import Store


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


def test_forced_tokens_are_not_learned() -> None:
    image = torch.full((1, POSITIONS), 256)
    image[0, 5] = 7
    logits = torch.zeros(1, POSITIONS, 256)
    logits[0, 5, 7] = 50.0
    assert float(image_loss(logits, image)) < 1e-6


def test_captions_of_the_data_are_those_of_the_pictures(data: Path) -> None:
    tokens = TokenData(data, validation=100)
    batch = tokens.sample(8, torch.Generator().manual_seed(3), unconditional=0.0)
    assert (batch.image.view(8, 16, 17)[:, :, 16] == 256).all() and (batch.image.view(8, 16, 17)[:, :, :16] < 256).all()
    assert batch.prompt[0, 0] == prompt_ids("")[0] and batch.prompt[0, -1] == prompt_ids("")[-1]
    assert sum(len(b.image) for b in tokens.validation()) == 100
    assert TokenData(data).sample(2, torch.Generator().manual_seed(0), unconditional=1.1).prompt.shape == (2, 2)


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
    pytest.importorskip("accelerate")
    from sjd2_engine.training.finetune import Finetune, make_accelerator
    from sjd2_engine.training.options import Options

    base, out = tmp_path / "base", tmp_path / "tuned"
    save_scenes(untrained.transformer, untrained.vq, base)
    engine = Engine.from_pretrained(str(base), device="cpu")
    with pytest.raises(CheckpointError, match="finetune"):
        engine.generate("a ring", decoder="sjd2")
    model = load_model(str(base), torch.device("cpu"), torch.float32)
    options = Options.build("scenes", steps=2, batch=2, micro_batch=2, compiled=False, validation=20)
    run = Finetune(model, base, Store(data), out, options, make_accelerator(options, out, "cpu"))
    run.train()
    run.write()
    tuned = Engine.from_pretrained(str(out), device="cpu")
    config = tuned.config_for("sjd2")
    assert tuned.is_tuned and (config.denoise_levels, config.t_min) == (2, 0.75)
    stored = load_model(str(out), torch.device("cpu"), torch.float32).transformer
    for name, weight in run.model.transformer.named_parameters():
        # In 16 bits, as the checkpoint it came from.
        assert torch.equal(stored.get_parameter(name), weight.half().float()), name
    result = tuned.generate("a ring", decoder="sjd2", window=20)
    assert torch.equal(result.tokens, tuned.generate("a ring", decoder="ar").tokens)


def test_damaged_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dataset\.json is missing"):
        TokenData(tmp_path)
    with pytest.raises(ConfigError):
        noise_times(0)
