"""The engine on the bundled weights: same tokens across decoders, windows and batches; streaming; errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.errors import BackendError, CheckpointError, ConfigError, NumericalError, PromptError
from sjd2_engine.models import bundled_models, find_model

PROMPTS = [
    "a red circle left of a blue square",
    "three stars",
    "a small pink ring on a dotted black background",
]


@pytest.fixture(scope="session")
def reference(base: Engine) -> torch.Tensor:
    return base.generate(PROMPTS, decoder="ar", seed=[7, 8, 9]).tokens


@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_jacobi_gives_the_tokens_of_ar(base: Engine, reference: torch.Tensor, window: int) -> None:
    result = base.generate(PROMPTS, decoder="jacobi", seed=[7, 8, 9], window=window)
    assert torch.equal(result.tokens, reference)
    assert sum(result.stats.forward_passes) < 3 * 272


def test_what_drafts_start_as_does_not_matter(base: Engine, reference: torch.Tensor) -> None:
    plain = base.generate(PROMPTS, decoder="jacobi", seed=[7, 8, 9], window=12, repeat_distance=0)
    repeat = base.generate(PROMPTS, decoder="jacobi", seed=[7, 8, 9], window=12, repeat_distance=34)
    assert torch.equal(plain.tokens, reference) and torch.equal(repeat.tokens, reference)
    assert repeat.stats.forward_passes != plain.stats.forward_passes


@pytest.mark.parametrize(("window", "levels"), [(6, 2), (24, 4), (64, 7)])
def test_sjd2_match_gives_the_tokens_of_ar_on_the_tuned_weights(tuned: Engine, window: int, levels: int) -> None:
    expected = tuned.generate(PROMPTS[:2], decoder="ar", seed=1).tokens
    for warmup in ("tokens", "noise"):
        result = tuned.generate(
            PROMPTS[:2], decoder="sjd2", seed=1, window=window, denoise_levels=levels, warmup=warmup
        )
        assert torch.equal(result.tokens, expected)


def test_the_batch_does_not_matter(base: Engine, reference: torch.Tensor) -> None:
    for decoder in ("ar", "coupled", "sjd"):
        alone = torch.cat([
            base.generate(text, decoder=decoder, seed=seed, window=8).tokens
            for text, seed in zip(PROMPTS, [7, 8, 9], strict=True)
        ])  # fmt: skip
        together = base.generate(PROMPTS, decoder=decoder, seed=[7, 8, 9], window=8, max_batch=2).tokens
        assert torch.equal(alone, together)
        if decoder == "ar":
            assert torch.equal(alone, reference)


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("sjd", {}),
        ("coupled", {"coupling": "maximal"}),
        ("sjd2", {"verification": "ratio"}),
        ("sjd2", {"verification": "paper", "coupling": "none"}),
    ],
)
def test_every_decoder_ends_and_counts_right(tuned: Engine, decoder: str, options: dict) -> None:
    result = tuned.generate(PROMPTS[:2], decoder=decoder, seed=5, **options)
    stats = result.stats
    assert result.tokens.shape == (2, 256) and int(result.tokens.min()) >= 0 and int(result.tokens.max()) < 256
    assert sum(n * count for n, count in stats.accepted_per_step.items()) == 2 * 272
    assert sum(stats.accepted_per_step.values()) == sum(stats.forward_passes)
    assert stats.step_compression > 1.0 and stats.latency_s > 0 and stats.peak_memory_bytes > 0
    assert [image.size for image in result.images if image] == [(128, 128)] * 2


def test_ar_takes_one_forward_per_token(base: Engine) -> None:
    stats = base.generate("a ring", decoder="ar").stats
    assert stats.forward_passes == [272] and stats.step_compression == 1.0


def test_seeds_and_prompts_decide(base: Engine) -> None:
    result = base.generate(["a ring", "a ring", "a ring"], decoder="jacobi", seed=[4, 5, 4])
    assert torch.equal(result.tokens[0], result.tokens[2])
    assert not torch.equal(result.tokens[0], result.tokens[1])


def test_stream_tells_every_token_once(base: Engine) -> None:
    expected = base.generate(PROMPTS, decoder="jacobi", seed=2)
    seen: list[list[int]] = [[], [], []]
    pictures = {}
    for event in base.stream(PROMPTS, decoder="jacobi", seed=2, preview_every=20, max_batch=2):
        assert [len(row) for row in event.tokens] == event.accepted
        for index, row in zip(event.rows, event.tokens, strict=True):
            seen[index] += row
        assert (event.previews is not None) == (event.step % 20 == 0)
        pictures |= event.finished
    layout = base.model.layout
    assert torch.equal(layout.image_tokens(torch.tensor(seen)), expected.tokens)
    assert sorted(pictures) == [0, 1, 2]
    for index, image in enumerate(expected.images):
        assert np.array_equal(np.asarray(pictures[index].image), np.asarray(image))
        assert torch.equal(pictures[index].tokens, expected.tokens[index])
    assert [pictures[index].forward_passes for index in range(3)] == expected.stats.forward_passes


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, PromptError, "empty"),
        ([], {}, PromptError, "no prompt"),
        (["a ring", " "], {}, PromptError, "empty"),
        ("a rde circle", {}, PromptError, "'red'"),
        ("a ring " * 13, {}, PromptError, "at most 24"),
        ("a ring", {"negative_prompt": "zebra"}, PromptError, "zebra"),
        ("a ring", {"decoder": "jakobi"}, ConfigError, "jacobi"),
        ("a ring", {"window": 0}, ConfigError, "window"),
        ("a ring", {"window": 400}, ConfigError, "at most"),
        ("a ring", {"temperature": -1.0}, ConfigError, "temperature"),
        ("a ring", {"tempurature": 1.0}, ConfigError, "temperature"),
        ("a ring", {"seed": [1, 2]}, ConfigError, "seed"),
        ("a ring", {"decoder": "sjd2"}, CheckpointError, "sjd2 finetune"),
    ],
)
def test_bad_requests(base: Engine, prompt, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        base.generate(prompt, **options)
    with pytest.raises(error, match=words):
        list(base.stream(prompt, **options))


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("no-such-model", {}, CheckpointError, "scenes"),
        ("./nowhere", {}, CheckpointError, "nowhere"),
        ("scenes", {"dtype": "float8"}, ConfigError, "float32"),
        ("scenes", {"device": "tpu9"}, ConfigError, "cpu"),
        ("scenes", {"attention": "magic"}, ConfigError, "sdpa"),
    ],
)
def test_bad_models(name: str, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Engine.from_pretrained(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_said() -> None:
    with pytest.raises(BackendError, match="no CUDA device"):
        Engine.from_pretrained("scenes", device="cuda")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_model("scenes"), tmp_path / "copy"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "vq.safetensors"])
def test_missing_and_damaged_files_are_named(copy: Path, file: str) -> None:
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=file):
        Engine.from_pretrained(str(copy))
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        Engine.from_pretrained(str(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sjd2_family": "dreams"}, "no known family"),
        ({"words": ["a"]}, "do not fit"),
        ({"num_hidden_layers": 7}, "has no tensor"),
        ({"num_hidden_layers": 5}, "unexpected tensors"),
        ({"intermediate_size": 320}, "shape"),
    ],
)
def test_configurations_that_do_not_fit(copy: Path, change: dict, words: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words):
        Engine.from_pretrained(str(copy))


def test_broken_logits_end_one_image_and_spare_the_others(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    head = base.model.transformer.head
    expected = base.generate(PROMPTS, decoder="jacobi", seed=1)
    calls = []

    whole = head.forward

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        logits = whole(hidden)
        calls.append(logits.shape)
        if len(calls) == 10:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(head, "forward", broken)
    result = base.generate(PROMPTS, decoder="jacobi", seed=1)
    assert result.images[1] is None and [failure.image for failure in result.failures] == [1]
    assert result.failures[0].step == 9 and "position" in str(result.failures[0])
    assert torch.equal(result.tokens[[0, 2]], expected.tokens[[0, 2]])
    calls.clear()
    with pytest.raises(NumericalError, match="image 0"):
        monkeypatch.setattr(head, "forward", lambda hidden: broken(hidden) * float("nan"))
        base.generate("a ring", decoder="ar")


def test_the_bundled_models_are_there_and_small() -> None:
    models = bundled_models()
    assert set(models) == {"scenes", "scenes-sjd2"}
    size = sum(file.stat().st_size for folder in models.values() for file in folder.iterdir())
    assert size <= 24 * 2**20
