"""The Janus family on tiny checkpoints in the real formats, against transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("transformers")
import tiny_janus as tiny
from parity import assert_logits_match

from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import describe_model, load_model
from sjd2_engine.models.family import LoadOptions

CPU = torch.device("cpu")
SIDE = 4 * tiny.GRID
TEXTS = ["a red fox", "an owl, 2 foxes"]
# Pro as transformers saves it and as its authors publish it, in pickled files; and the first release of all.
KINDS = ("hf", "pro", "first")
PICKLED = LoadOptions(allow_pickle=True)


@pytest.fixture(scope="session")
def oracles() -> dict[str, Any]:
    pro = tiny.hf_model(True, 4)
    return {"hf": pro, "pro": pro, "first": tiny.hf_model(False, 2)}


@pytest.fixture(scope="session")
def folders(oracles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("janus")
    return {
        "hf": tiny.write_hf(root / "hf", oracles["hf"]),
        "pro": tiny.write_released(root / "pro", oracles["pro"], pro=True, pickled=True),
        "first": tiny.write_released(root / "first", oracles["first"], pro=False, pickled=False),
    }


def engine_for(kind: str, folders: dict[str, Path]) -> Engine:
    return Engine(load_model(str(folders[kind]), CPU, torch.float32, PICKLED))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_sequences_and_windows(kind: str, oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    model, oracle = load_model(str(folders[kind]), CPU, torch.float32, PICKLED), oracles[kind]
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(len(tiny.vocabulary(kind != "first")), (3, 15), generator=generator)
    codes = torch.randint(tiny.CODES, (3, 25), generator=generator)
    with torch.inference_mode():
        embeds = [oracle.get_input_embeddings()(words), oracle.prepare_embeddings_for_image_generation(codes)]
        hidden = oracle.model.language_model(inputs_embeds=torch.cat(embeds, 1)).last_hidden_state
        expected = oracle.model.generation_head(hidden)
    ours = model.rows([*(words + tiny.CODES).flatten().tolist(), *codes.flatten().tolist()]).split([45, 75])
    assert_logits_match(model, torch.cat([part.view(3, -1, tiny.WIDTH) for part in ours], 1), expected)


def prompt_ids(kind: str, folder: Path, text: str) -> Tensor:
    """By transformers' own tokenizer, which puts its first token in front; the template is written out here."""
    from transformers import PreTrainedTokenizerFast

    user, assistant = ("User", "Assistant") if kind == "first" else ("<|User|>", "<|Assistant|>")
    question = f"{user}: {text}\n\n{assistant}:<begin_of_image>"
    return PreTrainedTokenizerFast.from_pretrained(folder)(question, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_pictures_equal_transformers_generation(
    kind: str, oracles: dict[str, Any], folders: dict[str, Path]
) -> None:
    engine, oracle = engine_for(kind, folders), oracles[kind]
    expected = []
    for text in TEXTS:
        ids = prompt_ids(kind, folders[kind], text)
        expected.append(
            oracle.generate(
                ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=5.0, do_sample=False
            )
        )
    for decoder in ("ar", "jacobi"):
        result = engine.generate(TEXTS, decoder=decoder, window=5, temperature=0.0)
        assert result.tokens.tolist() == torch.cat(expected).tolist()
    assert len(set(result.tokens[0].tolist())) > 2, "a picture of one code would show nothing"
    pixels = oracle.decode_image_tokens(expected[0])[0]
    ours = engine.model.vq.decode(result.tokens[:1])[0].permute(1, 2, 0)  # type: ignore[attr-defined]
    assert pixels.shape == (SIDE, SIDE, 3) and float(pixels.std()) > 0.1
    assert float((ours - pixels).abs().max()) <= 1e-4
    shown = np.asarray(result.images[0]).astype(float)
    wanted = ((pixels.clamp(-1, 1) + 1) * 127.5).numpy()
    assert float(np.abs(shown + 0.5 - wanted).max()) <= 0.5 + 0.02


def test_prompts_in_one_batch_as_transformers_pads_them(oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    """transformers pads the shorter prompt on the left and hides the padding; here every row has its own length."""
    rows = [prompt_ids("hf", folders["hf"], text)[0] for text in TEXTS]
    longest = max(map(len, rows))
    pad = tiny.vocabulary(True)["<｜▁pad▁｜>"]
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    assert len(rows[0]) != len(rows[1])
    expected = oracles["hf"].generate(ids, attention_mask=mask, generation_mode="image", do_sample=False)
    result = engine_for("hf", folders).generate(TEXTS, decoder="jacobi", temperature=0.0)
    assert result.tokens.tolist() == expected.tolist()


def test_layout_prompts_and_defaults(folders: dict[str, Path]) -> None:
    facts = describe_model(str(folders["hf"]))
    assert facts.layout.forced == (-1,) * tiny.GRID**2 and facts.image_size == (SIDE, SIDE)
    assert facts.defaults["guidance_scale"] == 5.0 and "top_k" not in facts.defaults
    assert facts.transformer.head_hidden == tiny.WIDTH and facts.transformer.rms_norm_eps == 1e-6
    assert describe_model(str(folders["pro"]), PICKLED) == facts
    model = engine_for("hf", folders).model
    ids = tiny.vocabulary(True)
    blank = model.unconditional_embeds("  a fox ", "")
    assert torch.equal(blank[1], model.rows([tiny.CODES + ids["<｜▁pad▁｜>"]])[0])
    assert len(blank) == len(model.prompt_embeds("a fox")) == len(prompt_ids("hf", folders["hf"], "a fox")[0])
    assert torch.equal(model.unconditional_embeds("a fox", "fog"), model.prompt_embeds("fog"))


def test_sizes_that_config_leaves_out_are_the_released_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["first"], tmp_path / "copy"))
    # As in Janus-Pro-7B's config.json.
    language = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
    _config(
        folder, language_config=language, vision_config={"params": {"image_size": 384}},
        gen_vision_config={"params": {"image_token_size": 16384, "n_embed": 8}},
        gen_aligner_config={"params": {"depth": 2, "n_embed": 4096}},
        gen_head_config={"params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096}},
    )  # fmt: skip
    facts = describe_model(str(folder))
    sizes = facts.transformer
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.intermediate_size) == (4096, 30, 11008)
    assert (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_hidden) == (32, 32, 4096)
    assert (facts.image_size, facts.layout.image_count, facts.vocabulary) == ((384, 384), 576, 16384 + 102400)


def test_every_decoder_from_text_to_png(folders: dict[str, Path], tmp_path: Path) -> None:
    """Random weights never saw noise: sjd2.json is a stand-in that lets sjd2 run, and `match` stays exact on them."""
    folder = Path(shutil.copytree(folders["hf"], tmp_path / "tuned"))
    (folder / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.5}))
    pictures = {}
    for decoder in DECODERS:
        out = tmp_path / decoder
        args = ["generate", *TEXTS, "--model", folder, "-o", out, "--decoder", decoder, "--seed", 4]
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, (result.output, result.exception)
        pictures[decoder] = [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]
        assert [picture.shape for picture in pictures[decoder]] == [(SIDE, SIDE, 3)] * 2
    for decoder in ("jacobi", "sjd2"):
        assert all(np.array_equal(a, b) for a, b in zip(pictures["ar"], pictures[decoder], strict=True))


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).clone()
    save_file(tensors, folder / "model.safetensors")


def _without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


ALIGNER, CONV = "gen_aligner.layers.2.weight", "gen_vision_model.decoder.conv_in.weight"
WORDS = "language_model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: _without(f, ALIGNER), CheckpointError, "no tensor 'model.generation_aligner.hidden_layers.0.weight"),
        (lambda f: _weights(f, ALIGNER, lambda t: t[:5]), CheckpointError, r"has shape \(5, 64\).*asks for \(64, 64\)"),
        (lambda f: _weights(f, "gen_head.vision_head.bias", lambda t: t[:-1]), CheckpointError, r"shape \(31,\)"),
        (lambda f: _weights(f, WORDS, lambda t: t[:-1]), CheckpointError, "embed_tokens.weight has shape"),
        (lambda f: _weights(f, CONV, lambda t: t[:, :4]), CheckpointError, "decoder.conv_in.weight has shape"),
        (lambda f: _weights(f, CONV, lambda t: t.to(torch.int32)), CheckpointError, "conv_in.weight' holds I32"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{}"), CheckpointError, "model.safetensors is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "tokenizer.json is missing"),
        (lambda f: _config(f, gen_head_config={"params": {"image_token_embed": "x"}}), CheckpointError, "expected int"),
        (lambda f: _config(f, gen_aligner_config=None), CheckpointError, "projection_dim|has shape"),
        (lambda f: _config(f, language_config={"vocab_size": 20}), CheckpointError, "no tensor|has shape"),
        (lambda f: _config(f, architectures=["Janus"], model_type="dreams"), CheckpointError, "no known family"),
    ],
)
def test_what_is_wrong_is_said(
    folders: dict[str, Path], tmp_path: Path, damage: Any, error: type[Exception], words: str
) -> None:
    folder = Path(shutil.copytree(folders["first"], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(error, match=words):
        Engine.from_pretrained(str(folder), device="cpu")


def test_what_cannot_be_drawn_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="12x12"):
        Engine.from_pretrained(str(folders["hf"]), device="cpu", image_size=24)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickled file"):
        Engine.from_pretrained(str(folders["pro"]), device="cpu")
    flow = Path(shutil.copytree(folders["first"], tmp_path / "flow"))
    config = json.loads((flow / "config.json").read_text())
    del config["gen_aligner_config"]
    (flow / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="JanusFlow"):
        Engine.from_pretrained(str(flow), device="cpu")
