"""The Chameleon family on tiny checkpoints in the real formats, against transformers' own classes."""

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
import tiny_chameleon as tiny

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError, PromptError
from sjd2_engine.memory import weight_bytes
from sjd2_engine.models import describe_model, load_model
from sjd2_engine.models.family import LoadOptions

CPU = torch.device("cpu")
# kind -> (HF model's arguments, picture size of the checkpoint)
KINDS: dict[str, dict[str, Any]] = {
    "chameleon": {},
    "anole": {"kv_heads": 4},
    "swin": {"swin": True},
    "lumina": {"shared_norms": 2, "kv_heads": 4},
}
IDS = tiny.vocabulary()
START, END, TURN, EOL = (IDS[n] for n in ("<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08799>"))
GRID = {32: IDS["<reserved08801>"], 64: IDS["<reserved08802>"]}
TEXT = "a red fox"


@pytest.fixture(scope="session")
def oracles() -> dict[str, Any]:
    return {kind: tiny.hf_model(**arguments) for kind, arguments in KINDS.items()}


@pytest.fixture(scope="session")
def folders(oracles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chameleon")
    return {
        kind: tiny.write_lumina(root / kind, model, 2)
        if kind == "lumina"
        else tiny.write_hf(root / kind, model, decoder_inside=kind == "anole")
        for kind, model in oracles.items()
    }


def options_for(kind: str) -> LoadOptions:
    return LoadOptions((32, 64), allow_pickle=True) if kind == "lumina" else LoadOptions()


def engine_for(kind: str, folder: Path) -> Engine:
    return Engine(load_model(str(folder), CPU, torch.float32, options_for(kind)))


def oracle_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits over image codes of whole sequences; `forward` of the class would mask just these."""
    with torch.inference_mode():
        hidden = model.model(input_ids=ids).last_hidden_state
        return model.lm_head(hidden)[..., tiny.image_ids()]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_sequences_and_windows(kind: str, oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    """Prompts of different lengths in one batch, then windows of which some entries are rolled back."""
    model = load_model(str(folders[kind]), CPU, torch.float32, options_for(kind))
    core = model.transformer
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(IDS), (3, 40), generator=generator)
    embeds = model.rows(model.token_rows(ids.flatten().tolist())).view(3, 40, -1)  # type: ignore[attr-defined]
    expected = oracle_logits(oracles[kind], ids)
    bound = 1e-5 * float(expected.abs().max())
    cache = StaticCache(core.config, 3, 48, 0, CPU, torch.float32)
    whole = core.head(cache.forward(core, embeds))
    assert float((whole - expected).abs().max()) <= bound

    lengths = torch.tensor([5, 9, 12], dtype=torch.int32)
    cache.forward(core, embeds[:, :12])
    while int(lengths.min()) < 34:
        cache.lengths.copy_(lengths)
        good = torch.randint(1, 6, (3,), generator=generator)
        places = (lengths[:, None] + torch.arange(6)).clamp(max=39)
        window = embeds.gather(1, places[..., None].expand(-1, -1, embeds.shape[2])).clone()
        for row, keep in enumerate(good.tolist()):
            window[row, keep:] = torch.randn(6 - keep, embeds.shape[2], generator=generator)
        logits = core.head(cache.forward(core, window))
        for row, (length, keep) in enumerate(zip(lengths.tolist(), good.tolist(), strict=True)):
            assert float((logits[row, :keep] - expected[row, length : length + keep]).abs().max()) <= bound
        lengths = (lengths + good.int()).clamp(max=34)


def test_half_precision_stays_near(oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    model = load_model(str(folders["chameleon"]), CPU, torch.bfloat16)
    core = model.transformer
    ids = torch.randint(len(IDS), (2, 30), generator=torch.Generator().manual_seed(4))
    rows = model.token_rows(ids.flatten().tolist())  # type: ignore[attr-defined]
    cache = StaticCache(core.config, 2, 30, 0, CPU, torch.bfloat16)
    ours = core.head(cache.forward(core, model.rows(rows).view(2, 30, -1))).float()
    expected = oracle_logits(oracles["chameleon"], ids)
    assert float((ours - expected).norm() / expected.norm()) < 0.03


def prompt_ids(kind: str, text: str) -> tuple[list[int], list[int]]:
    """Conditional and unconditional ids in front of a picture, written out for these tests."""
    if kind != "lumina":
        return [0, *(IDS[letter] for letter in text), TURN, START], [0, START]
    question = f"Generate an image of 64x32 according to the following prompt:\n{text}"
    head = [START, GRID[32], GRID[64]]
    return [0, *(IDS.get(letter, IDS["<unk>"]) for letter in question), TURN, *head], head


def greedy(model: Any, kind: str, text: str, scale: float) -> list[int]:
    """Codes of the likeliest picture, token by token over transformers' class with guidance and forced tokens."""
    cond, uncond = (list(ids) for ids in prompt_ids(kind, text))
    slots: list[int | None] = [None] * 16 + [END]
    if kind == "lumina":  # 2 rows of 4
        slots = ([None] * 4 + [EOL]) * 2 + [END, TURN]
    codes = []
    for slot in slots:
        token = slot
        if slot is None:
            c, u = (oracle_logits(model, torch.tensor([ids]))[0, -1] for ids in (cond, uncond))
            codes.append(int((u + scale * (c - u)).argmax()))
            token = tiny.image_ids()[codes[-1]]
        assert token is not None
        cond.append(token)
        uncond.append(token)
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_pictures_equal_a_plain_loop(kind: str, oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    engine = engine_for(kind, folders[kind])
    texts = [TEXT, "an owl"]
    expected = [greedy(oracles[kind], kind, text, 2.5) for text in texts]
    assert len({*expected[0]}) > 3, "a picture of one code would show nothing"
    for decoder in ("ar", "jacobi"):
        result = engine.generate(texts, decoder=decoder, temperature=0.0, guidance_scale=2.5, window=5)
        assert result.tokens.tolist() == expected


def test_negative_prompts_replace_the_unconditional_one(oracles: dict[str, Any], folders: dict[str, Path]) -> None:
    engine = engine_for("lumina", folders["lumina"])
    model = engine.model
    cond, uncond = prompt_ids("lumina", "fog")
    rows = model.token_rows  # type: ignore[attr-defined]
    assert torch.equal(model.unconditional_embeds(TEXT, ""), model.rows(rows(uncond)))
    assert torch.equal(model.unconditional_embeds(TEXT, "fog"), model.rows(rows(cond)))
    plain = engine.generate(TEXT, seed=1).tokens
    assert not torch.equal(engine.generate(TEXT, seed=1, negative_prompt="fog").tokens, plain)


def reference_pixels(codes: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """A VQGAN decoder in functional form, float64; pixels about -1 to 1 [B, 3, h, w]."""
    w = {name: tensor.double() for name, tensor in weights.items()}

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

    x = w["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    x = block(conv(conv(x, "post_quant_conv"), "decoder.conv_in"), "decoder.mid.block_1")
    y = norm(x, "decoder.mid.attn_1.norm")
    q, k, v = (conv(y, f"decoder.mid.attn_1.{part}").flatten(2) for part in "qkv")
    weight = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
    x = x + conv(torch.einsum("bij,bcj->bci", weight, v).view_as(x), "decoder.mid.attn_1.proj_out")
    x = block(x, "decoder.mid.block_2")
    for level in (4, 3, 2, 1, 0):
        for i in range(2):
            x = block(x, f"decoder.up.{level}.block.{i}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{level}.upsample.conv")
    return conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out")


@pytest.mark.parametrize("kind", ["chameleon", "anole", "lumina"])
def test_pixels_equal_an_independent_decoder(kind: str, folders: dict[str, Path]) -> None:
    model = load_model(str(folders[kind]), CPU, torch.float32, options_for(kind))
    height, width = model.facts.image_size
    tokens = torch.randint(tiny.CODES, (2, height * width // 256), generator=torch.Generator().manual_seed(1))
    codes = tokens.view(2, height // 16, width // 16)
    expected = reference_pixels(codes, tiny.decoder_weights())
    assert expected.shape == (2, 3, height, width) and float(expected.std()) > 0.1
    assert float((model.vq.decode(codes) - expected).abs().max()) <= 1e-4  # type: ignore[attr-defined]
    pixels = model.decode_pixels(tokens)
    wanted = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert pixels.dtype == torch.uint8 and pixels.shape == wanted.shape
    assert float((pixels.double() - wanted.floor()).abs().max()) <= 1
    assert float((pixels.double() == wanted.floor()).double().mean()) > 0.999


@pytest.mark.parametrize("kind", ["anole", "lumina"])
def test_every_decoder_from_text_to_png(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Random weights never saw noise: sjd2.json is a stand-in that lets sjd2 run, and `match` stays exact on them."""
    folder = Path(shutil.copytree(folders[kind], tmp_path / "tuned"))
    (folder / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.5}))
    size = ["--image-size", "32x64", "--allow-pickle"] if kind == "lumina" else []
    pictures = {}
    for decoder in DECODERS:
        out = tmp_path / decoder
        args = ["generate", TEXT, "an owl", "--model", folder, "-o", out, "--decoder", decoder, "--seed", 4, *size]
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, (result.output, result.exception)
        files = sorted(out.glob("*.png"))
        assert len(files) == 2
        pictures[decoder] = [np.asarray(Image.open(file)) for file in files]
        assert pictures[decoder][0].shape == ((32, 64, 3) if kind == "lumina" else (64, 64, 3))
    for decoder in ("jacobi", "sjd2"):
        assert all(np.array_equal(a, b) for a, b in zip(pictures["ar"], pictures[decoder], strict=True))


def test_facts_and_defaults(folders: dict[str, Path]) -> None:
    facts = describe_model(str(folders["lumina"]), options_for("lumina"))
    v = tiny.CODES
    assert facts.layout.forced == ((-1,) * 4 + (v,)) * 2 + (v + 1, v + 2)
    assert (facts.family, facts.defaults["top_k"], facts.transformer.rope_theta) == ("lumina-mgpt", 2000, 900.0)
    # Positions go on where config.json has fewer than a large picture needs.
    large = describe_model(str(folders["lumina"]), LoadOptions((64, 64), allow_pickle=True))
    assert large.transformer.max_position_embeddings == len(large.layout) + 1024
    plain = describe_model(str(folders["anole"]))
    assert plain.layout.forced == (-1,) * 16 + (v,) and plain.defaults["top_p"] == 0.9
    assert describe_model(str(folders["swin"])).transformer.post_norm


def test_the_size_is_in_the_name_of_the_release(folders: dict[str, Path], tmp_path: Path) -> None:
    release = tmp_path / "models--Alpha-VLLM--Lumina-mGPT-7B-64" / "snapshots" / "0a1b"
    shutil.copytree(folders["lumina"], release)
    assert describe_model(str(release), LoadOptions(allow_pickle=True)).image_size == (64, 64)
    with pytest.raises(ConfigError, match=r"\(768, 768\)"):  # the tiny vocabulary has no tokens for that
        describe_model(str(folders["lumina"]), LoadOptions(allow_pickle=True))


def test_memory_by_formula_is_what_the_weights_take(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["anole"]), CPU, torch.bfloat16)
    tensors = [*model.transformer.state_dict().values(), model.transformer.cos, model.transformer.sin]
    real = sum(tensor.nbytes for tensor in [*tensors, *model.vq.state_dict().values()])  # type: ignore[attr-defined]
    assert weight_bytes(describe_model(str(folders["anole"])), torch.bfloat16) == real


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def _weights(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).clone()
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.2.self_attn.k_norm.bias"


@pytest.mark.parametrize(
    ("damage", "options", "error", "words"),
    [
        (lambda f: (f / "vqgan.ckpt").unlink(), {}, CheckpointError, "no picture decoder.*vqgan.safetensors"),
        (lambda f: None, {"allow_pickle": False}, CheckpointError, "vqgan.ckpt is a pickled file"),
        (lambda f: (f / "vqgan.ckpt").write_bytes(b"PK"), {}, CheckpointError, "vqgan.ckpt is damaged"),
        (lambda f: torch.save({"a": torch.ones(1)}, f / "vqgan.ckpt"), {}, CheckpointError, "vqgan.ckpt has no tensor"),
        (lambda f: (f / "tokenizer.json").unlink(), {}, CheckpointError, "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), {}, CheckpointError, "tokenizer.json cannot be read"),
        (lambda f: _config(f, vocabulary_map={**IDS, "IMGIMGJJZ": 50}), {}, CheckpointError, "33 image tokens"),
        (lambda f: _config(f, vocab_size=20), {}, CheckpointError, "vocabulary of 20"),
        (lambda f: _config(f, vq_config={**tiny.VQ, "num_embeddings": 64}), {}, CheckpointError, "codebook of 64"),
        (lambda f: _config(f, num_hidden_layers=2), {}, CheckpointError, "unexpected tensors: model.layers.2"),
        (lambda f: _config(f, hidden_act="gelu"), {}, CheckpointError, "gelu"),
        (lambda f: _weights(f, NORM, lambda t: t[:1].expand(3, -1)), {}, CheckpointError, "k_norm.bias' has 3 rows"),
        (
            lambda f: _weights(f, NORM, lambda t: t[:, :8]),
            {},
            CheckpointError,
            r"k_norm.bias has shape \(4, 8\), .* \(4, 16\)",
        ),
        (lambda f: None, {"image_size": 48}, ConfigError, "multiples of 32"),
        (lambda f: None, {"image_size": (32, 160)}, ConfigError, "no tokens for sides"),
    ],
)
def test_what_is_wrong_is_said(
    folders: dict[str, Path], tmp_path: Path, damage: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    folder = Path(shutil.copytree(folders["lumina"], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(error, match=words):
        Engine.from_pretrained(str(folder), device="cpu", **{"image_size": 64, "allow_pickle": True, **options})


def test_other_sizes_and_long_prompts_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="64x64"):
        Engine.from_pretrained(str(folders["anole"]), device="cpu", image_size=128)
    engine = engine_for("anole", folders["anole"])
    with pytest.raises(PromptError, match="shorten"):
        engine.generate("a" * 5000)
