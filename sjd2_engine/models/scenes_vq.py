"""The picture tokenizer of the bundled model: a small convolutional VQ autoencoder, 128x128 pixels to 16x16 codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 16  # tokens per side
CODES = 256
CODE_DIM = 16


class _ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class SceneVQ(nn.Module):
    """VQ autoencoder with most of its work on the token grid; the decoder sees neighbouring codes.

    `encode`: float [B, 3, 128, 128] in [-1, 1] -> int64 [B, 256], raster order.
    `decode`: int64 [B, 256] -> float [B, 3, 128, 128] in [-1, 1].
    """

    codebook: Tensor
    cells: Tensor  # the codebook before codes of equal meaning were joined; zero where none were

    def __init__(self, width: int = 96, half: int = 32, fine: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, half, 3, padding=1),
            _ResBlock(half),
            nn.Conv2d(half, width, 4, stride=2, padding=1),
            _ResBlock(width),
            _ResBlock(width),
            nn.Conv2d(width, CODE_DIM, 1),
        )
        self.register_buffer("codebook", torch.zeros(CODES, CODE_DIM))
        self.register_buffer("cells", torch.zeros(CODES, CODE_DIM))
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_DIM, width, 3, padding=1),
            _ResBlock(width),
            _ResBlock(width),
            nn.Conv2d(width, 4 * half, 3, padding=1),
            nn.PixelShuffle(2),
            _ResBlock(half),
            nn.Conv2d(half, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            _ResBlock(fine),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def nearest(self, z: Tensor, centres: Tensor | None = None) -> Tensor:
        """Index of the closest code (or row of `centres`) for each vector; z [M, 16] -> int64 [M]."""
        centres = self.codebook if centres is None else centres
        # Distances of neighbours differ by less than bfloat16 can tell.
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            return (centres.square().sum(1) - 2 * z @ centres.T).argmin(1)

    def encode(self, pixels: Tensor) -> Tensor:
        z = self.encoder(pixels).permute(0, 2, 3, 1)
        flat = z.reshape(-1, CODE_DIM)
        if not self.cells.any():
            return self.nearest(flat).view(z.shape[0], -1)
        # Joined codes moved to their centroid, but each still stands for what was closest to one of them before.
        first = (self.codebook[:, None] == self.codebook).all(2).int().argmax(1)
        return first[self.nearest(flat, self.cells)].view(z.shape[0], -1)

    def decode(self, codes: Tensor) -> Tensor:
        z = self.codebook[codes].view(-1, GRID, GRID, CODE_DIM).permute(0, 3, 1, 2)
        return self.decoder(z).clamp(-1.0, 1.0)
