"""LlamaGen on tiny checkpoints under the releases' names, against a plain model written from the published facts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("transformers")
import tiny_llamagen as tiny
import transformers

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError, PromptError
from sjd2_engine.models import describe_model, load_model
from sjd2_engine.models.llamagen_convert import convert, main
from sjd2_engine.models.llamagen_core import SIZES, parse_config
from sjd2_engine.models.llamagen_text import clean
from sjd2_engine.transformer import Transformer

CPU = torch.device("cpu")
KINDS = list(tiny.KINDS)
# Prompts of different lengths, and their classes where a model has no captions.
TEXTS = ["a red fox", "an owl at night in the fog", "owl"]
NUMBERS = ["2", "5", "0"]
N = tiny.GRID**2


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llamagen")
    return {kind: tiny.write(root / kind, kind) for kind in KINDS}


def texts_of(kind: str) -> list[str]:
    return TEXTS if kind == "t2i" else NUMBERS


def conditions(folder: Path, kind: str, text: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Prefix and mask of the prompt and of no prompt, as the published scripts make them."""
    if kind != "t2i":
        mask = torch.ones(1, dtype=torch.bool)
        given, none = (tiny.prefix_of(kind, torch.tensor([i])) for i in (int(text), tiny.CLASSES))
        return (given, mask), (none, mask)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(folder / "t5")
    padded = tokenizer(text, max_length=tiny.PREFIX, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        features = encoder(**padded).last_hidden_state[0]
    mask, length = padded.attention_mask[0].bool(), int(padded.attention_mask.sum())
    # Left padding by exchanging the two parts; the empty caption keeps all its entries, and the same mask.
    features = torch.cat([features[length:], features[:length]])
    features[: tiny.PREFIX - length] = 0
    mask = mask.flip(0)
    empty = tiny.weights(kind)["cls_embedding.uncond_embedding"]
    return (tiny.prefix_of(kind, features), mask), (tiny.prefix_of(kind, empty), mask)


@pytest.mark.parametrize(("kind", "fused"), [*((kind, False) for kind in KINDS), ("c2i", True), ("c2i-3b", True)])
def test_windows_equal_whole_padded_sequences(kind: str, fused: bool, folders: dict[str, Path]) -> None:
    """Captions of different lengths without their padding, then windows of which some entries are rolled back.

    fused: by the ops that passes run on where they are kernels; rows there begin at position 0, as classes do.
    """
    model = load_model(str(folders[kind]), CPU, torch.float32)
    core, texts = model.transformer, texts_of(kind)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(tiny.CODES, (6, N), generator=generator)
    given, expected = [], []
    for i, text in enumerate(texts):
        cond, uncond = conditions(folders[kind], kind, text)
        for row, (prefix, mask) in ((i, cond), (i + 3, uncond)):
            expected.append((row, tiny.reference_logits(kind, prefix, mask, codes[row])[len(prefix) - 1 :]))
    expected = [logits for _, logits in sorted(expected, key=lambda pair: pair[0])]
    given = [model.prompt_embeds(text) for text in texts] + [model.unconditional_embeds(text, "") for text in texts]
    bound = 1e-5 * max(float(logits.abs().max()) for logits in expected)
    assert kind != "t2i" or len({len(row) for row in given}) == 3

    offsets = [model.position_offset(len(row)) for row in given]
    cache = StaticCache(core.config, 6, 40, 0, CPU, torch.float32, offsets if any(offsets) else None)
    cache.fused = fused
    embeds = [torch.cat([row, core.embedding[codes[i]]]) for i, row in enumerate(given)]
    lengths = torch.tensor([len(row) - 1 for row in given], dtype=torch.int32)
    if int(lengths.max()):
        cache.forward(core, torch.nn.utils.rnn.pad_sequence([row[:-1] for row in given], batch_first=True))
    drawn, worst = torch.zeros(6, dtype=torch.int32), 0.0
    while int(drawn.min()) <= N:
        cache.lengths.copy_(lengths + drawn)
        good = torch.randint(1, 6, (6,), generator=generator)
        window = torch.randn(6, 5, core.config.hidden_size, generator=generator)
        for row, keep in enumerate(good.tolist()):
            start = int(cache.lengths[row])
            window[row, : len(embeds[row][start : start + keep])] = embeds[row][start : start + keep]
        logits = core.head(cache.forward(core, window))
        for row, keep in enumerate(good.tolist()):
            wanted = expected[row][int(drawn[row]) :][:keep]
            if len(wanted):
                worst = max(worst, float((logits[row, : len(wanted)] - wanted).abs().max()))
        drawn = (drawn + good.int()).clamp(max=N + 1)
    assert worst <= bound


def greedy(folder: Path, kind: str, text: str, scale: float) -> list[int]:
    """Codes of the likeliest picture by the plain model, token by token."""
    cond, uncond = conditions(folder, kind, text)
    codes: list[int] = []
    for _ in range(N):
        tokens = torch.tensor(codes, dtype=torch.int64)
        c, u = (tiny.reference_logits(kind, *given, tokens)[-1] for given in (cond, uncond))
        codes.append(int((u + (c - u) * scale).argmax()))
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_pictures_equal_a_plain_loop(kind: str, folders: dict[str, Path]) -> None:
    engine = Engine.from_pretrained(str(folders[kind]), device="cpu")
    texts = texts_of(kind)[:2]
    expected = [greedy(folders[kind], kind, text, 3.0) for text in texts]
    assert len({*expected[0]}) > 3 and expected[0] != expected[1], "a picture of one code would show nothing"
    for decoder in ("ar", "jacobi"):
        result = engine.generate(texts, decoder=decoder, temperature=0.0, guidance_scale=3.0, window=5)
        assert result.tokens.tolist() == expected


def test_negative_prompts_replace_the_learned_one(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["t2i"]), CPU, torch.float32)
    assert torch.equal(model.unconditional_embeds("a red fox", "fog"), model.prompt_embeds("fog"))
    engine = Engine(model)
    plain, other = (engine.generate("a red fox", seed=1, negative_prompt=text).tokens for text in ("", "night"))
    assert not torch.equal(plain, other)


def reference_pixels(codes: Tensor) -> Tensor:
    """The published decoder in functional form, float64: codes [B, h, w] -> about -1 to 1 [B, 3, 4h, 4w]."""
    w = {name: tensor.double() for name, tensor in tiny.vq_weights().items()}

    def conv(x: Tensor, name: str) -> Tensor:
        kernel = w[name + ".weight"]
        return F.conv2d(x, kernel, w[name + ".bias"], padding=kernel.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        y = ((groups - mean) / (variance + 1e-6).sqrt()).view_as(x)
        return y * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def block(x: Tensor, name: str) -> Tensor:
        y = conv(swish(norm(x, name + ".norm1")), name + ".conv1")
        y = conv(swish(norm(y, name + ".norm2")), name + ".conv2")
        return (conv(x, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in w else x) + y

    def attention(x: Tensor, name: str) -> Tensor:
        y = norm(x, name + ".norm")
        q, k, v = (conv(y, f"{name}.{part}").flatten(2) for part in "qkv")
        weight = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + conv(torch.einsum("bij,bcj->bci", weight, v).view_as(x), name + ".proj_out")

    table = w["quantize.embedding.weight"]
    x = (table / table.norm(dim=1, keepdim=True))[codes].permute(0, 3, 1, 2)
    x = block(conv(conv(x, "post_quant_conv"), "decoder.conv_in"), "decoder.mid.0")
    x = block(attention(x, "decoder.mid.1"), "decoder.mid.2")
    for level in range(3):
        for i in range(2):
            x = block(x, f"decoder.conv_blocks.{level}.res.{i}")
            if level == 0:
                x = attention(x, f"decoder.conv_blocks.0.attn.{i}")
        if level < 2:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.conv_blocks.{level}.upsample.conv")
    return conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out")


def test_pixels_equal_an_independent_decoder(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["c2i"]), CPU, torch.float32)
    tokens = torch.randint(tiny.CODES, (2, N), generator=torch.Generator().manual_seed(1))
    codes = tokens.view(2, tiny.GRID, tiny.GRID)
    expected = reference_pixels(codes)
    assert expected.shape == (2, 3, 16, 16) and float(expected.std()) > 0.1
    assert float((model.vq.decode(codes) - expected).abs().max()) <= 1e-4  # type: ignore[attr-defined]
    pixels = model.decode_pixels(tokens)
    wanted = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert pixels.dtype == torch.uint8 and pixels.shape == wanted.shape
    assert float((pixels.double() - wanted).abs().max()) <= 0.51


@pytest.mark.parametrize("kind", ["t2i", "c2i"])
def test_every_decoder_from_text_to_png(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Random weights never saw noise: sjd2.json is a stand-in that lets sjd2 run, and `match` stays exact on them."""
    folder = Path(shutil.copytree(folders[kind], tmp_path / "tuned"))
    (folder / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.5}))
    pictures = {}
    for decoder in DECODERS:
        out = tmp_path / decoder
        args = ["generate", *texts_of(kind)[:2], "--model", folder, "-o", out, "--decoder", decoder, "--seed", 4]
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, (result.output, result.exception)
        pictures[decoder] = [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]
        assert [picture.shape for picture in pictures[decoder]] == [(16, 16, 3)] * 2
    for decoder in ("jacobi", "sjd2"):
        assert all(np.array_equal(a, b) for a, b in zip(pictures["ar"], pictures[decoder], strict=True))


def test_released_files_are_converted_or_read_if_allowed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, vq = tiny.write_release(tmp_path / "release", "c2i")
    numbers = tiny.config("c2i")
    monkeypatch.setitem(SIZES, "GPT-B", (numbers["n_layer"], numbers["n_head"], numbers["dim"]))
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight"):  # 16384 codes where these files have 40
        convert(weights, vq, tmp_path / "wrong", "GPT-B", "c2i", 256)
    assert not (tmp_path / "wrong").exists()

    parse = parse_config
    monkeypatch.setattr(
        "sjd2_engine.models.llamagen_convert.parse_config", lambda facts, out: parse({**numbers, **facts}, out)
    )
    converted = tmp_path / "converted"
    arguments = [weights, vq, converted, "--model", "GPT-B", "--type", "c2i", "--image-size", 256]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    main()
    written = json.loads((converted / "config.json").read_text())
    assert written == {"sjd2_family": "llamagen", "gpt_model": "GPT-B", "gpt_type": "c2i", "image_size": 256}
    (converted / "config.json").write_text(json.dumps(numbers))

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for source, name in ((weights, "model.pt"), (vq, "vq.pt"), (folders["c2i"] / "config.json", "config.json")):
        shutil.copy(source, pickled / name)
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickled file"):
        Engine.from_pretrained(str(pickled), device="cpu")
    expected = Engine.from_pretrained(str(folders["c2i"]), device="cpu").generate("3", seed=5)
    for folder, allowed in ((converted, False), (pickled, True)):
        result = Engine.from_pretrained(str(folder), device="cpu", allow_pickle=allowed).generate("3", seed=5)
        assert torch.equal(result.tokens, expected.tokens)
        assert np.array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))


def test_released_sizes_have_the_published_numbers_of_parameters() -> None:
    published = {"GPT-B": 111e6, "GPT-L": 343e6, "GPT-XL": 775e6, "GPT-XXL": 1.4e9, "GPT-3B": 3.1e9}
    for name, expected in published.items():
        config = parse_config({"gpt_model": name, "gpt_type": "c2i", "image_size": 384}, Path("released"))
        outline = Transformer.outline(config.sizes, config.rows, config.codes)
        assert sum(tensor.numel() for tensor in outline.parameters()) == pytest.approx(expected, rel=0.02)
        assert (config.grid, config.sizes.head_dim) == (24, 100 if name == "GPT-3B" else 64)


def test_facts_count_the_text_encoder(folders: dict[str, Path]) -> None:
    captions, classes = (describe_model(str(folders[kind])) for kind in ("t2i", "c2i"))
    assert (captions.family, captions.defaults["guidance_scale"], captions.defaults["top_k"]) == ("llamagen", 7.5, 1000)
    assert classes.defaults["guidance_scale"] == 4.0 and classes.vocabulary == tiny.CODES + tiny.CLASSES + 1
    assert captions.layout.forced == (-1,) * N and captions.image_size == (16, 16)
    encoder = transformers.T5EncoderModel.from_pretrained(folders["t2i"] / "t5")
    stored = {name: tensor for name, tensor in tiny.weights("t2i").items() if name.startswith("cls_embedding")}
    picture = {
        name: tensor for name, tensor in tiny.vq_weights().items() if name.startswith(("dec", "post", "quantize.e"))
    }
    beside = sum(tensor.numel() for tensor in (*encoder.parameters(), *stored.values(), *picture.values()))
    assert captions.pixel_parameters == beside


def test_captions_are_cleaned() -> None:
    assert clean("A  Red\nFox,and “an owl”…") == 'a red fox, and "an owl"…'
    assert clean("see https://example.com: (two) *cats* &amp; @dogs #12") == "see: two cats"
    assert clean("a high-res, ultra-wide, well-lit 1920x1080 close-up") == "a high res, ultra wide, well lit close up"
    assert clean("it's a well-known place.") == "it's a well-known place."


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("t2i", {"gpt_type": "i2i"}, "gpt_type='i2i'"),
        ("t2i", {"gpt_model": "GPT-9", "dim": None}, "no usable configuration"),
        ("t2i", {"image_size": 18}, "multiple of 4"),
        ("t2i", {"n_head": "many"}, "no usable configuration"),
        ("t2i", {"n_layer": 2}, "unexpected tensors: layers.2"),
        ("t2i", {"n_layer": 4}, "layers.3.attention_norm.weight"),
        ("t2i", {"vocab_size": 41}, "tok_embeddings.weight has shape"),
        ("t2i", {"caption_dim": 16}, "uncond_embedding has shape"),
        ("c2i", {"num_classes": 7}, "embedding_table.weight has shape"),
        ("c2i", {"id2label": {"0": 3}}, "no usable configuration"),
    ],
)
def test_what_is_wrong_is_said(
    kind: str, changes: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    (folder / "config.json").write_text(json.dumps(tiny.config(kind) | changes))
    with pytest.raises(CheckpointError, match=words):
        Engine.from_pretrained(str(folder), device="cpu")


def test_missing_parts_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["t2i"], tmp_path / "copy"))
    with pytest.raises(ConfigError, match="16x16"):
        Engine.from_pretrained(str(folder), device="cpu", image_size=32)
    (folder / "t5" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"text encoder .*t5 cannot be read"):
        Engine.from_pretrained(str(folder), device="cpu")
    (folder / "t5" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"t5/config\.json is missing"):
        describe_model(str(folder))
    (folder / "vq.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vq\.safetensors is missing.*llamagen_convert"):
        describe_model(str(folder))


def test_prompts_that_cannot_be_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=f"13 tokens.*at most {tiny.PREFIX}"):
        Engine.from_pretrained(str(folders["t2i"]), device="cpu").generate("fog " * 12)
    folder = Path(shutil.copytree(folders["c2i"], tmp_path / "copy"))
    (folder / "config.json").write_text(json.dumps(tiny.config("c2i") | {"id2label": {"4": "goldfish, Carassius"}}))
    engine = Engine.from_pretrained(str(folder), device="cpu")
    assert torch.equal(engine.generate("Carassius", seed=2).tokens, engine.generate("4", seed=2).tokens)
    for text in ("6", "-1", "a red fox"):
        with pytest.raises(PromptError, match="from 0 to 5 or a name"):
            engine.generate(text)
