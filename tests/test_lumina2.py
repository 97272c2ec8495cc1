"""Lumina-mGPT 2.0 on a tiny checkpoint with the released model's ids, against transformers' class and plain maths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("transformers")
import tiny_lumina2 as tiny
from parity import assert_logits_match
from tiny_lumina2 import BEGIN, BOI, CODES, EOI, EOL, FIRST, GRID, SIZE, TURN, movq_weights, vocabulary

from sjd2_engine import Engine
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import describe_model, load_model
from sjd2_engine.models.family import LoadOptions
from sjd2_engine.models.lumina2_vq import MoVQ

CPU = torch.device("cpu")
TEXT = "a red fox"


@pytest.fixture(scope="module")
def oracle() -> Any:
    return tiny.hf_model()


@pytest.fixture(scope="module")
def folder(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("lumina2"), oracle)


def load(folder: Path) -> Any:
    return load_model(str(folder), CPU, torch.float32, LoadOptions(SIZE, allow_pickle=True))


def oracle_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits over picture codes of whole sequences."""
    with torch.inference_mode():
        return F.linear(model.model(input_ids=ids).last_hidden_state, model.lm_head.weight[FIRST : FIRST + CODES])


def test_logits_of_sequences_and_windows(oracle: Any, folder: Path) -> None:
    model = load(folder)
    ids = torch.randint(FIRST + CODES, (3, 40), generator=torch.Generator().manual_seed(3))
    ids[:, 20:] = FIRST + ids[:, 20:] % CODES
    embeds = model.rows(model.token_rows(ids.flatten().tolist())).view(3, 40, -1)
    assert_logits_match(model, embeds, oracle_logits(oracle, ids))


def greedy(model: Any, text: str, scale: float) -> list[int]:
    """Codes of the likeliest picture by a plain loop, its prompt and structure written out."""
    ids = vocabulary()
    question = f"Generate an image of 64x32 according to the following prompt:\n{text}"
    uncond = [BOI, GRID[32], GRID[64]]
    cond = [BEGIN, *(ids.get(letter, ids["<unk>"]) for letter in question), TURN, *uncond]
    codes = []
    for forced in ([None] * 8 + [EOL]) * 4 + [EOI]:
        token = forced
        if forced is None:
            c, u = (oracle_logits(model, torch.tensor([row]))[0, -1] for row in (cond, uncond))
            codes.append(int((u + scale * (c - u)).argmax()))
            token = FIRST + codes[-1]
        cond, uncond = [*cond, token], [*uncond, token]
    return codes


def test_greedy_pictures_equal_a_plain_loop(oracle: Any, folder: Path) -> None:
    engine = Engine(load(folder))
    expected = greedy(oracle, TEXT, 2.0)
    assert len({*expected}) > 3, "a picture of one code would show nothing"
    result = engine.generate(TEXT, decoder="jacobi", temperature=0.0, guidance_scale=2.0, window=6)
    assert result.tokens.tolist() == [expected]


def reference_pixels(codes: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """MoVQGAN's decoder in functional form, float64: codes [B, h, w] -> about -1 to 1 [B, 3, 8h, 8w]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    entries = w["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)

    def conv(x: Tensor, name: str) -> Tensor:
        kernel = w[name + ".weight"]
        return F.conv2d(x, kernel, w[name + ".bias"], padding=kernel.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        y = ((groups - mean) / (variance + 1e-6).sqrt()).view_as(x)
        y = y * w[name + ".norm_layer.weight"][:, None, None] + w[name + ".norm_layer.bias"][:, None, None]
        times = x.shape[-1] // entries.shape[-1]
        cells = entries.repeat_interleave(times, 2).repeat_interleave(times, 3)
        return y * conv(cells, name + ".conv_y") + conv(cells, name + ".conv_b")

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

    x = block(conv(conv(entries, "post_quant_conv"), "decoder.conv_in"), "decoder.mid.block_1")
    x = block(attention(x, "decoder.mid.attn_1"), "decoder.mid.block_2")
    for level in (3, 2, 1, 0):
        for i in range(2):
            x = block(x, f"decoder.up.{level}.block.{i}")
            if level == 3:
                x = attention(x, f"decoder.up.3.attn.{i}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{level}.upsample.conv")
    return conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out")


def test_pixels_equal_an_independent_decoder(folder: Path) -> None:
    model = load(folder)
    tokens = torch.randint(CODES, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = reference_pixels(tokens.view(2, 4, 8), movq_weights())
    assert expected.shape == (2, 3, *SIZE) and float(expected.std()) > 0.1
    assert float((model.vq.decode(tokens.view(2, 4, 8)) - expected).abs().max()) <= 1e-4
    pixels = model.decode_pixels(tokens)
    wanted = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert pixels.dtype == torch.uint8 and pixels.shape == wanted.shape
    assert float((pixels.double() - wanted).abs().max()) <= 0.51


def test_the_released_picture_decoder_has_the_published_shape() -> None:
    """A factor of 8; the decoder, codebook and convolution of the 270M that its authors count with the encoder."""
    with torch.device("meta"):
        vq = MoVQ({})
    shapes = {name: tuple(tensor.shape) for name, tensor in vq.named_parameters()}
    assert vq.factor == 8 and shapes["quantize.embedding.weight"] == (16384, 4)
    assert shapes["decoder.up.3.attn.2.norm.conv_y.weight"] == (1024, 4, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert 1.5e8 < sum(tensor.numel() for tensor in vq.parameters()) < 2.7e8


def test_every_decoder_from_text_to_png(folder: Path, tmp_path: Path) -> None:
    """Random weights never saw noise: sjd2.json is a stand-in that lets sjd2 run, and `match` stays exact on them."""
    tuned = Path(shutil.copytree(folder, tmp_path / "tuned"))
    (tuned / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.5}))
    pictures = {}
    for decoder in DECODERS:
        out = tmp_path / decoder
        args = ["generate", TEXT, "--model", tuned, "-o", out, "--decoder", decoder, "--seed", 4]
        args += ["--image-size", "32x64", "--allow-pickle"]
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, (result.output, result.exception)
        (file,) = out.glob("*.png")
        pictures[decoder] = np.asarray(Image.open(file))
        assert pictures[decoder].shape == (*SIZE, 3)
    assert np.array_equal(pictures["ar"], pictures["jacobi"]) and np.array_equal(pictures["ar"], pictures["sjd2"])


def test_facts_and_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    facts = describe_model(str(folder), LoadOptions(SIZE, allow_pickle=True))
    assert facts.layout.forced == ((-1,) * 8 + (CODES,)) * 4 + (CODES + 1,)
    assert (facts.family, facts.defaults["guidance_scale"], facts.defaults["top_k"]) == ("lumina-mgpt-2", 4.0, 4096)
    assert facts.transformer.max_position_embeddings == len(facts.layout) + 1024

    def refuse(words: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
        with pytest.raises(error, match=words):
            Engine.from_pretrained(str(copy), device="cpu", **{"image_size": SIZE, "allow_pickle": True, **options})

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    refuse("multiples of 32", ConfigError, image_size=48)
    refuse("no tokens for sides", ConfigError, image_size=96)
    refuse(r"movqgan_270M\.ckpt is a pickled file", allow_pickle=False)
    (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<end>"}}))
    refuse("bos_token, or else eos_token, is '<end>'")
    shutil.copy(folder / "tokenizer_config.json", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": FIRST + 5}))
    refuse(f"vocabulary of {FIRST + 5}")
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_norm.bias"]
    save_file(tensors, copy / "model.safetensors")
    refuse(r"has no tensor 'model\.layers\.1\.self_attn\.k_norm\.bias'")
    (copy / "movqgan_270M.ckpt").unlink()
    refuse("movqgan_270M.ckpt is missing, which turns tokens into pictures")
