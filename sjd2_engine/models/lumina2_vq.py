"""The picture tokenizer of Lumina-mGPT 2.0: MoVQGAN, its decoder's norms modulated by the codes (arXiv 2209.09002).

Parameters have the names of the published checkpoints, so that files fit as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .chameleon_vq import Encoder, Upsample, group_norm, nearest


class SpatialNorm(nn.Module):
    """Normalised features [B, C, H, W], scaled and shifted cell by cell by what the codes say [B, c, h, w]."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y, self.conv_b = nn.Conv2d(dim, channels, 1), nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        codes = F.interpolate(codes, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(codes) + self.conv_b(codes)


class ResBlock(nn.Module):
    """Two 3x3 convolutions behind norm and SiLU, with a 1x1 shortcut where the channels change."""

    def __init__(self, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.norm1 = SpatialNorm(inputs, dim)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = SpatialNorm(outputs, dim)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x, codes)))
        y = self.conv2(F.silu(self.norm2(y, codes)))
        return y + self.nin_shortcut(x)


class AttentionBlock(nn.Module):
    """Every cell of the grid attends to every other, with one head."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = SpatialNorm(channels, dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        y = self.norm(x, codes)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it on the coarsest, then the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, dim: int, coarsest: bool, finest: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs, dim) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, dim) for _ in range(blocks if coarsest else 0))
        self.upsample = nn.Identity() if finest else Upsample(outputs)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, codes)
            if len(self.attn):
                x = self.attn[i](x, codes)
        return self.upsample(x)


class Decoder(nn.Module):
    """Features [B, latent, h, w] and codes [B, c, h, w] -> pixels [B, 3, h·f, w·f]; `up` begins with the finest."""

    def __init__(self, channels: int, multipliers: list[int], blocks: int, latent: int, dim: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        top = len(widths) - 1
        self.conv_in = nn.Conv2d(latent, widths[top], 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": ResBlock(widths[top], widths[top], dim),
                "attn_1": AttentionBlock(widths[top], dim),
                "block_2": ResBlock(widths[top], widths[top], dim),
            }
        )
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, top)], width, blocks + 1, dim, i == top, i == 0) for i, width in enumerate(widths)
        )
        self.norm_out = SpatialNorm(widths[0], dim)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:
        x = self.conv_in(z)
        for part in (*self.mid.values(), *reversed(self.up)):
            x = part(x, codes)
        return self.conv_out(F.silu(self.norm_out(x, codes)))


class MoVQ(nn.Module):
    """`decode`: codes int64 [B, h, w] -> pixels float32 [B, 3, h·f, w·f], about -1 to 1.

    `config` is "movq_config" of config.json; entries left out are those of the released 270M.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("ch_mult", [1, 2, 2, 4])
        self.factor = 2 ** (len(multipliers) - 1)
        self.codes, dim, latent = config.get("n_embed", 16384), config.get("embed_dim", 4), config.get("z_channels", 4)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(self.codes, dim)})
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.decoder = Decoder(config.get("ch", 256), multipliers, config.get("num_res_blocks", 2), latent, dim)

    def decode(self, codes: Tensor) -> Tensor:
        entries = self.quantize["embedding"](codes).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(entries), entries)


class MoVQEncoder(nn.Module):
    """The other half, a VQGAN's: pixels float32 [B, 3, H, W], -1 to 1 -> codes int64 [B, H/f, W/f]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("ch_mult", [1, 2, 2, 4])
        dim, latent, blocks = config.get("embed_dim", 4), config.get("z_channels", 4), config.get("num_res_blocks", 2)
        coarsest = [len(multipliers) - 1]
        self.encoder = Encoder(config.get("ch", 256), multipliers, blocks, latent, coarsest)
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.get("n_embed", 16384), dim)})

    def forward(self, pixels: Tensor) -> Tensor:
        return nearest(self.quant_conv(self.encoder(pixels)), cast(nn.Embedding, self.quantize["embedding"]).weight)
