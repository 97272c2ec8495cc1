"""The Emu3 family on tiny checkpoints in the real formats, against transformers' own classes."""

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
import tiny_emu3 as tiny
from parity import assert_logits_match

from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import describe_model, load_model
from sjd2_engine.models.emu3 import NEGATIVE
from sjd2_engine.models.emu3_tokenizer import PIECES, released_tokenizer
from sjd2_engine.models.emu3_vq import decode_picture
from sjd2_engine.models.family import LoadOptions

CPU = torch.device("cpu")
KINDS = ("hf", "hf-old", "released")
SIZE = (24, 48)  # 3 rows of 6 tokens
TEXT = "a red fox"
GOOD = " masterpiece, film grained, best quality."


@pytest.fixture(scope="session")
def oracles() -> dict[str, Any]:
    hf = tiny.hf_model(True)
    return {"hf": hf, "hf-old": hf, "released": tiny.hf_model(False)}


@pytest.fixture(scope="session")
def folders(oracles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("emu3")
    return {
        "hf": tiny.write_hf(root / "hf", oracles["hf"], old_names=False),
        "hf-old": tiny.write_hf(root / "hf-old", oracles["hf"], old_names=True),
        "released": tiny.write_released(root / "Emu3-Gen", oracles["released"]),
    }


def ids_for(kind: str) -> dict[str, int]:
    return tiny.text_vocabulary(kind != "released")


def visual(kind: str) -> list[int]:
    """Ids of the picture codes 0, 1, …"""
    return [ids_for(kind)[f"<|visual token {code:06d}|>"] for code in range(tiny.CODES)]


def engine_for(kind: str, folders: dict[str, Path], size: tuple[int, int] = SIZE) -> Engine:
    return Engine(load_model(str(folders[kind]), CPU, torch.float32, LoadOptions(size)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_sequences_and_windows(kind: str, oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    model = load_model(str(folders[kind]), CPU, torch.float32)
    oracle = oracles[kind]
    ids = torch.randint(len(ids_for(kind)), (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = oracle(input_ids=ids).logits[..., visual(kind)]
    rows = model.token_rows(ids.flatten().tolist())  # type: ignore[attr-defined]
    assert_logits_match(model, model.rows(rows).view(3, 40, -1), expected)
    facts = model.facts.transformer
    assert (facts.num_attention_heads, facts.num_key_value_heads, facts.rope_theta) == (4, 2, 1e6)


def transformers_ids(folder: Path, text: str) -> Tensor:
    """Prompt ids by transformers' own processor, for a picture of SIZE."""
    from transformers import Emu3ImageProcessor, Emu3Processor, PreTrainedTokenizerFast

    processor = Emu3Processor(Emu3ImageProcessor(), PreTrainedTokenizerFast.from_pretrained(folder))
    made = processor(text=text, return_for_image_generation=True, ratio="2:1", image_area=24 * 48, return_tensors="pt")
    assert torch.as_tensor(made["image_sizes"]).tolist() == [[3, 6]]
    return made["input_ids"]


def released_ids(text: str) -> Tensor:
    """The same with the authors' tokenizer, by a byte-pair encoder written out here."""
    ids = ids_for("released")
    header = [ids["<|image start|>"], *plain_bpe("3*6"), ids["<|image token|>"]]
    return torch.tensor([[ids["<|extra_203|>"], *plain_bpe(text), *header]])


def plain_bpe(text: str) -> list[int]:
    """tiktoken's rule: a piece that is a token stays whole, else the pair of lowest rank is joined until none is."""
    regex = pytest.importorskip("regex")
    ranks = {bytes([i]): i for i in range(256)} | {pair.encode(): 256 + i for i, pair in enumerate(tiny.PAIRS)}
    ids = []
    for piece in regex.findall(PIECES, text):
        parts = [piece.encode()] if piece.encode() in ranks else [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
            rank, at = min(joined, default=(len(ranks), 0))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_released_tokenizer_joins_bytes_as_tiktoken_does(folders: dict[str, Path]) -> None:
    tokenizer = released_tokenizer(folders["released"])
    for text in (TEXT, "the thing's nig night\n\n  2048 pär 東京 — !?  ", "therethe  ing\tInG fox foxes", "nig", ""):
        assert tokenizer.encode(text, add_special_tokens=False).ids == plain_bpe(text)
    # Composed and decomposed letters are one text.
    assert tokenizer.encode("pa\u0308r").ids == plain_bpe("pär")
    vocabulary, ids = tokenizer.get_vocab(), ids_for("released")
    assert {name: vocabulary[name] for name in tiny.SPECIAL} == {name: ids[name] for name in tiny.SPECIAL}
    assert tokenizer.encode("<|extra_200|>").ids == [ids["<|extra_200|>"]]


def generated(oracle: Any, kind: str, prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Greedy tokens of transformers' own generation, everything after the prompt."""
    ids = ids_for(kind)
    height, width = 3, 6
    tail = {1: "<|extra_201|>", 2: "<|image end|>", 3: "<|extra_204|>"}
    start = ids["<|image token|>"]

    def allowed(batch: int, sent: Tensor) -> list[int]:
        offset = len(sent) - int((sent == start).nonzero()[0])
        if offset > (width + 1) * height:
            return [ids[tail[offset - (width + 1) * height]]]
        return [ids["<|extra_200|>"]] if offset % (width + 1) == 0 else visual(kind)

    made = oracle.generate(
        prompt, negative_prompt_ids=negative, guidance_scale=scale, prefix_allowed_tokens_fn=allowed,
        max_new_tokens=height * (width + 1) + 3, do_sample=False,
    )  # fmt: skip
    return made[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", ["hf", "released"])
def test_greedy_pictures_equal_transformers_generation(
    kind: str, oracles: dict[str, Any], folders: dict[str, Path]
) -> None:
    engine, oracle = engine_for(kind, folders), oracles[kind]
    texts, negative = [TEXT, "an owl, 2 foxes"], "blurry"
    encode = released_ids if kind == "released" else lambda text: transformers_ids(folders[kind], text)
    options: dict[str, Any] = {"temperature": 0.0, "guidance_scale": 2.5, "negative_prompt": negative}
    expected = [generated(oracle, kind, encode(text + GOOD), encode(negative), 2.5) for text in texts]
    codes = {i: code for code, i in enumerate(visual(kind))}
    for decoder in ("ar", "jacobi"):
        result = engine.generate(texts, decoder=decoder, window=5, **options)
        assert result.tokens.tolist() == [[codes[i] for i in made[0].tolist() if i in codes] for made in expected]
    assert len(set(result.tokens[0].tolist())) > 3, "a picture of one code would show nothing"
    # The picture, from the sequence with all its forced tokens.
    pixels = oracle.decode_image_tokens(image_tokens=expected[0], height=3, width=6)
    ours = decode_picture(engine.model.vq, result.tokens[:1].view(1, 3, 6))  # type: ignore[attr-defined]
    assert pixels.shape == (1, 3, *SIZE) and float(pixels.std()) > 0.1
    assert float((ours - pixels).abs().max()) <= 1e-4
    shown = np.asarray(result.images[0]).astype(float)
    wanted = ((pixels[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert shown.shape == (*SIZE, 3) and float(np.abs(shown + 0.5 - wanted).max()) <= 0.5 + 0.02


def test_layout_prompts_and_defaults(folders: dict[str, Path]) -> None:
    facts = describe_model(str(folders["hf"]), LoadOptions((24, 16)))
    v = tiny.CODES
    assert facts.layout.forced == ((-1,) * 2 + (v,)) * 3 + (v + 1, v + 2, v + 3)
    assert (facts.defaults["guidance_scale"], facts.defaults["top_k"], facts.image_vocabulary) == (3.0, 2048, v)
    default = describe_model(str(folders["released"]))
    assert default.image_size == (720, 720) and len(default.layout) == 8193
    # Positions go on where config.json has fewer than a large picture needs.
    assert default.transformer.max_position_embeddings == 8193 + 1024
    model = engine_for("hf", folders).model
    assert not torch.equal(model.unconditional_embeds(TEXT, ""), model.unconditional_embeds(TEXT, NEGATIVE))
    assert len(model.unconditional_embeds(TEXT, "")) == 6  # begin, start of image, "3*6", image token


def test_sizes_that_config_leaves_out_are_the_released_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["hf"], tmp_path / "copy"))
    _config(folder, text_config={"model_type": "emu3_text_model", "vocab_size": 400})
    sizes = describe_model(str(folder)).transformer
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.intermediate_size) == (4096, 32, 14336)
    assert (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim) == (32, 8, 128)
    assert (sizes.rope_theta, sizes.rms_norm_eps) == (1e6, 1e-5)


@pytest.mark.parametrize("kind", ["hf", "released"])
def test_every_decoder_from_text_to_png(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Random weights never saw noise: sjd2.json is a stand-in that lets sjd2 run, and `match` stays exact on them."""
    shutil.copytree(folders["released"].parent / "Emu3-VisionTokenizer", tmp_path / "Emu3-VisionTokenizer")
    folder = Path(shutil.copytree(folders[kind], tmp_path / "tuned"))
    (folder / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.5}))
    pictures = {}
    for decoder in DECODERS:
        out = tmp_path / decoder
        args = ["generate", TEXT, "an owl", "--model", folder, "-o", out, "--decoder", decoder, "--seed", 4]
        result = CliRunner().invoke(app, [str(arg) for arg in [*args, "--image-size", "24x48"]])
        assert result.exit_code == 0, (result.output, result.exception)
        pictures[decoder] = [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]
        assert [picture.shape for picture in pictures[decoder]] == [(24, 48, 3)] * 2
    for decoder in ("jacobi", "sjd2"):
        assert all(np.array_equal(a, b) for a, b in zip(pictures["ar"], pictures[decoder], strict=True))


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder: Path, name: str, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).clone()
    save_file(tensors, file)


VISION = "../Emu3-VisionTokenizer"
ATTENTION = "decoder.mid.attn_1.q.weight"


@pytest.mark.parametrize(
    ("damage", "options", "error", "words"),
    [
        (
            lambda f: shutil.rmtree(f / VISION),
            {},
            CheckpointError,
            "no picture tokenizer.*vision_tokenizer nor",
        ),
        (
            lambda f: (f / VISION / "model.safetensors").unlink(),
            {},
            CheckpointError,
            "Emu3-Vis.*safetensors is missing",
        ),
        (
            lambda f: _weights(f / VISION, ATTENTION, lambda t: t[:8]),
            {},
            CheckpointError,
            r"Emu3-V.*has shape \(8, 64\)",
        ),
        (lambda f: _config(f / VISION, ch_mult=[1, 1, 2, 1]), {}, CheckpointError, "config.json asks for"),
        (lambda f: _config(f / VISION, ch="wide"), {}, CheckpointError, "base_channels is 'wide', expected int"),
        (lambda f: _config(f / VISION, ch=33), {}, CheckpointError, "describes no picture tokenizer"),
        (lambda f: _config(f / VISION, codebook_size=64), {}, CheckpointError, "32 image tokens and .*codebook of 64"),
        (lambda f: (f / "emu3.tiktoken").unlink(), {}, CheckpointError, "tokenizer.json is missing"),
        (lambda f: (f / "emu3.tiktoken").write_text("?? 1"), {}, CheckpointError, "emu3.tiktoken cannot be read"),
        (lambda f: (f / "emu3_vision_tokens.txt").unlink(), {}, CheckpointError, "vision_tokens.txt is missing"),
        (lambda f: (f / "emu3_vision_tokens.txt").write_text(""), {}, CheckpointError, "no token '<|image start|>'"),
        (lambda f: _config(f, vocab_size=300), {}, CheckpointError, "vocabulary of 300"),
        (lambda f: _config(f, num_hidden_layers=2), {}, CheckpointError, "unexpected tensors: model.layers.2"),
        (lambda f: _weights(f, "lm_head.weight", lambda t: t[:-9]), {}, CheckpointError, "lm_head.weight' has"),
        (lambda f: None, {"image_size": 20}, ConfigError, "multiples of 8"),
    ],
)
def test_what_is_wrong_is_said(
    folders: dict[str, Path], tmp_path: Path, damage: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    root = Path(shutil.copytree(folders["released"].parent, tmp_path / "copy"))
    damage(root / "Emu3-Gen")
    with pytest.raises(error, match=words.replace("|", r"\|")):
        Engine.from_pretrained(str(root / "Emu3-Gen"), device="cpu", **{"image_size": 24, **options})
