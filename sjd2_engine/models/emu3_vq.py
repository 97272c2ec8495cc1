"""Emu3's picture tokenizer: transformers' own for videos, of which a picture needs one frame."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from .chameleon_vq import nearest
from .releases import Renamed, sizes_of
from .weights import Checkpoint, load_module, read_json, require_encoder

# Where the released language model, which comes alone, may have it: in its own folder, or beside it.
INSIDE, BESIDE = "vision_tokenizer", "Emu3-VisionTokenizer"
RELEASED: dict[str, Any] = {
    "codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "out_channels": 3, "temporal_downsample_factor": 4,
    "base_channels": 256, "channel_multiplier": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [3],
}  # fmt: skip
# What the authors' release calls them in config.json.
SIZES = {"z_channels": "latent_channels", "ch": "base_channels", "ch_mult": "channel_multiplier"}
# And its tensors; the patterns leave transformers' names as they are.
TENSORS = (
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"(?<!_block)\.(up|down)\.", r".\1_block.\1."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.proj_out\.", ".out_proj."),
)


class _Standalone(Renamed):
    """The tokenizer's own release; its attention has 1x1 convolutions where transformers has matrices."""

    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        super().__init__(folder, _renamed, allow_pickle)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return shape[:2] if name.endswith("_proj.weight") and shape[2:] == (1, 1) else shape

    def read(self, name: str) -> Tensor:
        return super().read(name).view(self.shape(name))


def _renamed(name: str) -> str:
    for pattern, new in TENSORS:
        name = re.sub(pattern, new, name)
    return name


@dataclass(frozen=True)
class VQPlace:
    """The checkpoint that holds the picture decoder, what its names begin with, and its sizes."""

    checkpoint: Checkpoint
    prefix: str
    sizes: dict[str, Any]

    @property
    def codes(self) -> int:
        return self.sizes["codebook_size"]

    @property
    def factor(self) -> int:
        """Pixels along the side of a token."""
        return 2 ** (len(self.sizes["channel_multiplier"]) - 1)

    @property
    def parameters(self) -> int:
        """Numbers that decoding needs."""
        return sum(self.checkpoint.size(self.prefix + part) for part in ("decoder.", "post_quant_conv.", "quantize."))


def find_vq(folder: Path, checkpoint: Checkpoint, config: dict[str, Any], allow_pickle: bool) -> VQPlace:
    """Look for the picture tokenizer in the model's own checkpoint, then in a folder of its own."""
    for prefix in ("model.vqmodel.", "vqmodel."):
        if prefix + "quantize.embedding.weight" in checkpoint:
            return VQPlace(checkpoint, prefix, _sizes(config.get("vq_config") or {}, folder))
    places = (folder / INSIDE, folder.resolve().parent / BESIDE)
    for place in places:
        if (place / "config.json").is_file():
            config = read_json(place / "config.json")
            return VQPlace(_Standalone(place, allow_pickle), "", _sizes(config, place))
    raise CheckpointError(
        f"{folder} has no picture tokenizer: the weights hold none (model.vqmodel.…), and neither {places[0]} nor "
        f"{places[1]} is there. Download BAAI/Emu3-VisionTokenizer to one of these folders"
    )


def _sizes(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    given = {SIZES.get(name, name): value for name, value in config.items()}
    sizes = sizes_of(given, RELEASED, folder / "config.json")
    sizes["hidden_size"] = sizes["base_channels"] * sizes["channel_multiplier"][-1]
    return sizes


DECODING, ENCODING = ("decoder", "post_quant_conv"), ("encoder", "quant_conv")


def load_vq(place: VQPlace, device: torch.device) -> Any:
    """transformers' Emu3VQVAE without its encoder, in float32; raises CheckpointError."""
    return _load(place, device, without=ENCODING)


def load_encoder(place: VQPlace, device: torch.device) -> Any:
    """transformers' Emu3VQVAE without its decoder, in float32; raises CheckpointError."""
    require_encoder(place.checkpoint, place.prefix)
    return _load(place, device, without=DECODING)


def _load(place: VQPlace, device: torch.device, without: tuple[str, ...]) -> Any:
    try:
        from transformers import Emu3VQVAE, Emu3VQVAEConfig
    except ImportError:
        raise CheckpointError("Emu3's picture tokenizer needs: pip install 'sjd2-engine[hf]'") from None

    def build() -> Any:
        try:
            vq = Emu3VQVAE(Emu3VQVAEConfig(**place.sizes))
        except Exception as error:  # the checks of transformers and of its modules raise many kinds
            raise CheckpointError(
                f"{place.checkpoint.path}/config.json describes no picture tokenizer ({error})"
            ) from error
        for part in without:
            delattr(vq, part)
        return vq

    return load_module(build, place.checkpoint, place.prefix, device)


def decode_picture(vq: Any, codes: Tensor) -> Tensor:
    """Pixels float32 [B, 3, h·f, w·f], about -1 to 1, of codes int64 [B, h, w].

    The module's own `decode` draws a clip of four frames. Its convolutions look back in time only, so that the
    first frame, which is the picture, can be had without the others: a quarter of the time and memory.
    """
    decoder = vq.decoder
    quantised = vq.quantize.embedding(codes).permute(0, 3, 1, 2)[:, :, None]
    x = torch.cat([vq.post_quant_conv(quantised), quantised])
    for layer in decoder.time_res_stack:
        x = layer(x)
    for layer in decoder.time_conv:
        x = F.silu(layer(x)[:, :, :1])
    x, quantised = x[:, :, 0].chunk(2)
    x = decoder.up_block(decoder.middle_block(decoder.conv_in(x), quantised), quantised)
    return decoder.conv_out(F.silu(decoder.norm_out(x, quantised)))


def encode_picture(vq: Any, pixels: Tensor) -> Tensor:
    """Codes int64 [B, h, w] of pixels float32 [B, 3, h·f, w·f], -1 to 1.

    The module's own `encode` reads a clip that repeats the picture: up to where its frames are mixed one is enough.
    """
    encoder = vq.encoder
    x = encoder.middle_block(encoder.down_block(encoder.conv_in(pixels)))
    x = encoder.conv_out(F.silu(encoder.norm_out(x)))
    x = x[:, :, None].expand(-1, -1, vq.config.temporal_downsample_factor, -1, -1)
    for layer in encoder.time_conv:
        x = F.silu(layer(x))
    for layer in encoder.time_res_stack:
        x = layer(x)
    return nearest(vq.quant_conv(x)[:, :, 0], vq.quantize.embedding.weight)
