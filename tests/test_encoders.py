"""Pictures to tokens: every family's encoder against transformers' classes on random weights, read from real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("transformers")
import tiny_chameleon
import tiny_emu3
import tiny_janus
import tiny_llamagen
import tiny_lumina2

from sjd2_engine.errors import CheckpointError, ConfigError
from sjd2_engine.models import ImageModel, LoadOptions, chameleon_vq, load_model
from sjd2_engine.models.chameleon_vq import ChameleonEncoder
from sjd2_engine.models.llamagen_vq import LlamaGenEncoder
from sjd2_engine.models.lumina2_vq import MoVQEncoder
from sjd2_engine.training.data import draw_pictures

CPU = torch.device("cpu")
TIE = 1e-4  # squared distance to two codes, relative: closer than this either may win
Features = Callable[[Tensor], Tensor]


def load(folder: Path, size: tuple[int, int] | None = None, core: bool = False) -> ImageModel:
    return load_model(str(folder), CPU, torch.float32, LoadOptions(size, allow_pickle=True, core=core))


def pictures(model: ImageModel, count: int = 3) -> Tensor:
    """Pixels uint8 of that model's size, smooth enough that neighbouring tokens are of different pictures."""
    height, width = model.facts.image_size
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    smooth = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    rough = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))
    return (smooth * 0.7 + rough * 0.3).mul(255).round().byte().permute(0, 2, 3, 1)


def assert_codes(model: ImageModel, features: Tensor, table: Tensor, expected: Tensor | None = None) -> None:
    """`encode_pixels` gives the nearest rows of `table` to `features` [B, c, h, w]; near ties are counted, and few."""
    ours = model.encode_pixels(pictures(model))
    assert ours.dtype == torch.int64 and ours.shape == (3, model.layout.image_count)
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.cdist(rows, table.double()).square()
    best = distances.topk(2, largest=False)
    chosen = distances.gather(1, ours.view(-1, 1))[:, 0]
    assert bool((chosen <= best.values[:, 0] * (1 + TIE)).all())
    wanted = best.indices[:, 0] if expected is None else expected.flatten()
    ties = int((best.values[:, 1] <= best.values[:, 0] * (1 + TIE)).sum())
    assert int((ours.flatten() != wanted).sum()) <= ties <= 2
    assert len(ours.unique()) >= 4, "one code for everything would show nothing"


def shaken(module: Any, scale: float = 0.15) -> Any:
    """The module with noise on everything, so that no weight is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(11)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor += scale * torch.randn(tensor.shape, generator=generator)
    return module


def values(model: ImageModel) -> Tensor:
    """What the original classes take: float32 [B, 3, H, W], -1 to 1."""
    return pictures(model).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("inside", [True, False], ids=["in the weights", "file beside"])
def test_chameleon(inside: bool, tmp_path: Path) -> None:
    hf = tiny_chameleon.hf_model()
    vq = shaken(hf.model.vqmodel).eval()
    table = tiny_chameleon.decoder_weights()["quantize.embedding.weight"]
    # The tiny folders have the picture decoder's codebook.
    vq.quantize.embedding.weight.copy_(table)
    folder = tiny_chameleon.write_hf(tmp_path / "m", hf, inside)
    if not inside:
        own = {name: tensor for name, tensor in vq.state_dict().items() if not name.startswith("post_quant")}
        save_file({**tiny_chameleon.decoder_weights(), **own}, folder / "vqgan.safetensors")
    model = load(folder)
    with torch.inference_mode():
        out = vq.encode(values(model))
        features = vq.quant_conv(out.last_hidden_state)
    assert_codes(model, features, table, out.image_tokens)


@pytest.mark.parametrize("released", [False, True], ids=["transformers", "authors"])
def test_emu3(released: bool, tmp_path: Path) -> None:
    hf = tiny_emu3.hf_model(not released)
    vq = hf.model.vqmodel.eval()
    write = tiny_emu3.write_released if released else lambda f, m: tiny_emu3.write_hf(f, m, old_names=False)
    model = load(write(tmp_path / "all" / "m", hf), (24, 48))
    with torch.inference_mode():
        out = vq.encode(values(model), torch.tensor([[24, 48]] * 3))
        features = vq.quant_conv(out.last_hidden_state.permute(0, 2, 1, 3, 4))[:, :, 0]
    assert_codes(model, features, vq.quantize.embedding.weight, torch.stack(list(out.image_tokens)))


@pytest.mark.parametrize("released", [False, True], ids=["transformers", "authors"])
@pytest.mark.parametrize("unit", [True, False], ids=["codes of length one", "other codes"])
def test_janus(released: bool, unit: bool, tmp_path: Path) -> None:
    """The authors compare directions. transformers compares points, which is the same for codes of length one."""
    hf = tiny_janus.hf_model(True, 4)
    vq = hf.model.vqmodel.eval()
    table = vq.quantize.embedding.weight
    if unit:
        table.copy_(F.normalize(table, dim=1))
    folder = tmp_path / "m"
    model = load(tiny_janus.write_released(folder, hf, True, False) if released else tiny_janus.write_hf(folder, hf))
    with torch.inference_mode():
        out = vq.encode(values(model))
        features = F.normalize(vq.quant_conv(out.last_hidden_state), dim=1)
    assert_codes(model, features, F.normalize(table, dim=1), out.image_tokens if unit else None)


def test_llamagen(tmp_path: Path) -> None:
    """transformers has this tokenizer as a part of Janus, by other names."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    sizes = tiny_llamagen.VQ
    oracle = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=sizes["codebook_embed_dim"], num_embeddings=sizes["codebook_size"], base_channels=sizes["ch"],
            latent_channels=sizes["z_channels"], channel_multiplier=sizes["ch_mult"],
            num_res_blocks=sizes["num_res_blocks"], num_patches=tiny_llamagen.GRID,
        )
    ).eval()  # fmt: skip
    shaken(oracle)
    names = {
        "mid.block_1": "mid.0",
        "mid.attn_1": "mid.1",
        "mid.block_2": "mid.2",
        "encoder.down": "encoder.conv_blocks",
    }
    names |= {".block.": ".res."}
    tensors = tiny_llamagen.vq_weights()
    for name, tensor in oracle.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            for old, new in names.items():
                name = name.replace(old, new)
            tensors[name] = tensor.contiguous()
    folder = tiny_llamagen.write(tmp_path / "m", "c2i")
    save_file(tensors, folder / "vq.safetensors")
    model = load(folder)
    with torch.inference_mode():
        features = F.normalize(oracle.quant_conv(oracle.encoder(values(model))), dim=1)
    assert_codes(model, features, F.normalize(tensors["quantize.embedding.weight"], dim=1))


def test_lumina2(tmp_path: Path) -> None:
    """MoVQGAN's encoder is an ordinary VQGAN's, as Chameleon's is, with attention on the coarsest level."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    sizes = tiny_lumina2.VQ
    oracle = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=sizes["embed_dim"], num_embeddings=sizes["n_embed"], base_channels=sizes["ch"],
            latent_channels=sizes["z_channels"], channel_multiplier=sizes["ch_mult"], resolution=64,
            num_res_blocks=sizes["num_res_blocks"], attn_resolutions=[8],
        )
    ).eval()  # fmt: skip
    shaken(oracle)
    own = {name: tensor for name, tensor in oracle.state_dict().items() if not name.startswith(("post", "quantize"))}
    weights = {**tiny_lumina2.movq_weights(), **own}
    folder = tiny_lumina2.write(tmp_path / "m", tiny_lumina2.hf_model())
    torch.save(weights, folder / "movqgan_270M.ckpt")
    model = load(folder, tiny_lumina2.SIZE)
    with torch.inference_mode():
        features = oracle.quant_conv(oracle.encoder(values(model)))
    assert_codes(model, features, weights["quantize.embedding.weight"])


def test_scenes() -> None:
    model = load_model("scenes", CPU, torch.float32)
    pixels = torch.from_numpy(draw_pictures(4, seed=5))
    tokens = model.encode_pixels(pixels)
    assert tokens.shape == (4, 256) and tokens.dtype == torch.int64
    values = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    features = model.vq.encoder(values).permute(0, 2, 3, 1).reshape(4, 256, -1)
    cells = torch.cdist(features, model.vq.cells.expand(4, -1, -1)).argmin(2)
    # Codes that were joined are equal, and the first of them stands for all.
    first = [next(i for i, row in enumerate(model.codebook) if torch.equal(row, code)) for code in model.codebook]
    assert len({*first}) < 256 and torch.equal(tokens, torch.tensor(first)[cells])
    error = (model.decode_pixels(tokens).double() - pixels.double()).square().mean()
    assert float(10 * (255**2 / error).log10()) > 20  # dB


def test_released_encoders_have_the_published_shape() -> None:
    """Parameters of a plain VQGAN encoder with 1, 1, 2, 2, 4 times 128 channels and with 1, 2, 2, 4 times 256."""
    with torch.device("meta"):
        sizes = {kind: kind({}) for kind in (ChameleonEncoder, LlamaGenEncoder, MoVQEncoder)}
    shapes = {
        kind: {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for kind, module in sizes.items()
    }
    assert shapes[ChameleonEncoder]["encoder.down.4.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert "encoder.down.4.attn.0.q.weight" not in shapes[ChameleonEncoder]
    assert shapes[LlamaGenEncoder]["encoder.conv_blocks.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes[LlamaGenEncoder]["encoder.conv_blocks.3.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes[MoVQEncoder]["encoder.down.3.attn.1.q.weight"] == (1024, 1024, 1, 1)
    assert shapes[MoVQEncoder]["encoder.conv_out.weight"] == (4, 1024, 3, 3)


def test_without_the_core_nothing_but_drawing_is_missing(tmp_path: Path) -> None:
    folder = tiny_llamagen.write(tmp_path / "m", "t2i")
    whole, light = load(folder, core=True), load(folder)
    assert all(parameter.is_meta for parameter in light.transformer.parameters())
    assert light.encode_prompt("a red fox") == whole.encode_prompt("a red fox")
    assert light.encoder.encoder is None  # type: ignore[attr-defined]
    tokens = torch.randint(tiny_llamagen.CODES, (2, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(light.decode_pixels(tokens), whole.decode_pixels(tokens))


def test_decoding_keeps_no_encoder(tmp_path: Path) -> None:
    folder = tiny_chameleon.write_hf(tmp_path / "m", tiny_chameleon.hf_model(), True)
    model = load(folder, core=True)
    model.decode_pixels(torch.zeros(1, model.layout.image_count, dtype=torch.int64))
    held = sum(tensor.numel() for tensor in model.vq.state_dict().values())
    assert held == model.facts.pixel_parameters and "_encoder" not in vars(model)
    model.encode_pixels(pictures(model))
    assert "_encoder" in vars(model)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    folder = tiny_chameleon.write_hf(tmp_path / "m", tiny_chameleon.hf_model(), False)
    model = load(folder)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight.*not the other way"):
        model.encode_pixels(pictures(model))
    for wrong in (pictures(model)[:, :-1], pictures(model).float(), pictures(model)[..., :1]):
        with pytest.raises(ConfigError, match="expected uint8"):
            model.encode_pixels(wrong)


def test_distances_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    features, table = torch.randn(2, 5, 3, 7, generator=generator), torch.randn(11, 5, generator=generator)
    expected = torch.cdist(features.permute(0, 2, 3, 1).reshape(1, -1, 5), table[None])[0].argmin(1).view(2, 3, 7)
    for room in (1, 40, 2**26):
        monkeypatch.setattr(chameleon_vq, "DISTANCES", room)
        assert torch.equal(chameleon_vq.nearest(features, table), expected)
