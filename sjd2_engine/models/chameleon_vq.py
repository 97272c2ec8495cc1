"""The picture tokenizer of Chameleon: a VQGAN's decoder and its encoder (arXiv 2012.09841, 2405.09818).

Parameters have the names of the published checkpoints, so that files fit as they are.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS, NORM_EPS = 32, 1e-6
DISTANCES = 2**26  # numbers of a table of distances: bounds memory


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of every VQGAN layer."""
    return nn.GroupNorm(NORM_GROUPS, channels, NORM_EPS)


class ResBlock(nn.Module):
    """Two 3x3 convolutions behind norm and SiLU, with a 1x1 shortcut where the channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Every cell of the grid attends to every other, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Upsample(nn.Module):
    """Each cell four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A 3x3 convolution of every other cell, with a border on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownLevel(nn.Module):
    """Residual blocks of one resolution, each with attention behind it or not, then the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, coarsest: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        self.downsample = nn.Identity() if coarsest else Downsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.downsample(x)


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> features [B, latent, H/f, W/f]; `attention`: the levels that have it, 0 the finest."""

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, latent: int, attention: Container[int] = ()
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        top = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Sequential(
            *(
                DownLevel(widths[i - 1] if i else channels, width, blocks, i in attention, i == top)
                for i, width in enumerate(widths)
            )
        )
        width = widths[top]
        self.mid = nn.ModuleDict(
            {"block_1": ResBlock(width, width), "attn_1": AttentionBlock(width), "block_2": ResBlock(width, width)}
        )
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, latent, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.down(self.conv_in(pixels))
        for part in self.mid.values():
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def nearest(features: Tensor, table: Tensor) -> Tensor:
    """Which row of `table` [V, c] is closest to each cell of features [B, c, h, w]: int64 [B, h, w]."""
    batch, _, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    # Half of the squared distance, less what all rows share.
    norms = table.square().sum(1) / 2
    parts = rows.split(max(1, DISTANCES // len(table)))
    return torch.cat([(norms - part @ table.T).argmin(1) for part in parts]).view(batch, height, width)


class Decoder(nn.Module):
    """Features [B, latent, h, w] -> pixels [B, 3, h·f, w·f]; `up` lists the levels from the finest on."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, latent: int) -> None:
        super().__init__()
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": ResBlock(width, width), "attn_1": AttentionBlock(width), "block_2": ResBlock(width, width)}
        )
        levels: list[nn.ModuleDict] = []
        for level in reversed(range(len(multipliers))):
            wide, width = width, channels * multipliers[level]
            steps = [ResBlock(wide if i == 0 else width, width) for i in range(blocks + 1)]
            parts: dict[str, nn.Module] = {"block": nn.Sequential(*steps)}
            if level:
                parts["upsample"] = Upsample(width)
            levels.insert(0, nn.ModuleDict(parts))
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for part in ("block_1", "attn_1", "block_2"):
            x = self.mid[part](x)
        for level in reversed(self.up):
            # In the order they were put in: the blocks, then the way to the next level.
            for part in level.children():
                x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ChameleonVQ(nn.Module):
    """`decode`: codes int64 [B, h, w] -> pixels float32 [B, 3, h·f, w·f], about -1 to 1.

    `config` is "vq_config" of config.json; entries left out are those of the released models.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("channel_multiplier") or [1, 1, 2, 2, 4]
        self.factor = 2 ** (len(multipliers) - 1)
        self.codes, dim = config.get("num_embeddings", 8192), config.get("embed_dim", 256)
        latent = config.get("latent_channels", 256)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(self.codes, dim)})
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.decoder = Decoder(config.get("base_channels", 128), multipliers, config.get("num_res_blocks", 2), latent)

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize["embedding"](codes).permute(0, 3, 1, 2)))


class ChameleonEncoder(nn.Module):
    """The other half: pixels float32 [B, 3, H, W], -1 to 1 -> codes int64 [B, H/f, W/f]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multipliers = config.get("channel_multiplier") or [1, 1, 2, 2, 4]
        dim, latent = config.get("embed_dim", 256), config.get("latent_channels", 256)
        resolution, attended = config.get("resolution", 512), config.get("attn_resolutions") or []
        attention = [level for level in range(len(multipliers)) if resolution // 2**level in attended]
        blocks = config.get("num_res_blocks", 2)
        self.encoder = Encoder(config.get("base_channels", 128), multipliers, blocks, latent, attention)
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.get("num_embeddings", 8192), dim)})

    def forward(self, pixels: Tensor) -> Tensor:
        return nearest(self.quant_conv(self.encoder(pixels)), cast(nn.Embedding, self.quantize["embedding"]).weight)
