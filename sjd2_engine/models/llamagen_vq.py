"""The picture tokenizer of LlamaGen, whose codes have length one (arXiv 2406.06525).

Parameters have the names of the published checkpoints, so that files fit as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .chameleon_vq import AttentionBlock, Downsample, ResBlock, Upsample, group_norm, nearest


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it on the coarsest, then the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, coarsest: bool, finest: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if coarsest else 0))
        self.upsample = nn.Identity() if finest else Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(x)


class Decoder(nn.Module):
    """Features [B, latent, h, w] -> pixels [B, 3, h·f, w·f]; `conv_blocks` lists the levels from the coarsest on."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, latent: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in reversed(multipliers)]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid = nn.Sequential(
            ResBlock(widths[0], widths[0]), AttentionBlock(widths[0]), ResBlock(widths[0], widths[0])
        )
        last = len(widths) - 1
        self.conv_blocks = nn.Sequential(
            *(Level(widths[max(i - 1, 0)], width, blocks + 1, i == 0, i == last) for i, width in enumerate(widths))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


class DownLevel(nn.Module):
    """Residual blocks of one resolution, each with attention behind it on the coarsest, then the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, coarsest: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if coarsest else 0))
        self.downsample = nn.Identity() if coarsest else Downsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.downsample(x)


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> features [B, latent, H/f, W/f]; `conv_blocks` lists the levels from the finest on."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, latent: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.Sequential(
            *(DownLevel(widths[i - 1] if i else channels, width, blocks, i == last) for i, width in enumerate(widths))
        )
        self.mid = nn.Sequential(
            ResBlock(widths[last], widths[last]), AttentionBlock(widths[last]), ResBlock(widths[last], widths[last])
        )
        self.norm_out = group_norm(widths[last])
        self.conv_out = nn.Conv2d(widths[last], latent, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(pixels)))
        return self.conv_out(F.silu(self.norm_out(x)))


def nearest_direction(features: Tensor, table: Tensor) -> Tensor:
    """Which row of `table` [V, c] points where each cell of features [B, c, h, w] does: int64 [B, h, w]."""
    return nearest(F.normalize(features, dim=1), F.normalize(table, dim=-1))


class LlamaGenVQ(nn.Module):
    """`decode`: codes int64 [B, h, w] -> pixels float32 [B, 3, h·f, w·f], about -1 to 1.

    `config` is "vq" of config.json; entries left out are those of the released VQ-16.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("ch_mult", [1, 1, 2, 2, 4])
        self.factor = 2 ** (len(multipliers) - 1)
        self.codes, dim = config.get("codebook_size", 16384), config.get("codebook_embed_dim", 8)
        latent = config.get("z_channels", 256)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(self.codes, dim)})
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.decoder = Decoder(config.get("ch", 128), multipliers, config.get("num_res_blocks", 2), latent)

    def decode(self, codes: Tensor) -> Tensor:
        entries = F.normalize(self.quantize["embedding"](codes), dim=-1)
        return self.decoder(self.post_quant_conv(entries.permute(0, 3, 1, 2)))


class LlamaGenEncoder(nn.Module):
    """The other half: pixels float32 [B, 3, H, W], -1 to 1 -> codes int64 [B, H/f, W/f]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("ch_mult", [1, 1, 2, 2, 4])
        dim, latent = config.get("codebook_embed_dim", 8), config.get("z_channels", 256)
        self.encoder = Encoder(config.get("ch", 128), multipliers, config.get("num_res_blocks", 2), latent)
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.get("codebook_size", 16384), dim)})

    def forward(self, pixels: Tensor) -> Tensor:
        return nearest_direction(
            self.quant_conv(self.encoder(pixels)), cast(nn.Embedding, self.quantize["embedding"]).weight
        )
