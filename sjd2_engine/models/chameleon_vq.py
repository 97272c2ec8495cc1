"""The picture decoder of Chameleon: codes to pixels, by a VQGAN decoder (arXiv 2012.09841, 2405.09818).

Parameters have the names of the published checkpoints, so that files fit as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS, NORM_EPS = 32, 1e-6


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
