"""Noise levels of SJD2 and everything that follows from the embedding table: pure functions.

Flow matching in the normalised embedding space: e_t = (1 − t)·e + t·noise. Level k of K has time t[k],
rising with k; t[K−1] = 1 is pure noise, and below level 0 a draft is clean (level −1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ConfigError

CLEAN = -1  # the level of a token without noise


def noise_times(levels: int, t_min: float = 0.05, rho: float = 7.0) -> Tensor:
    """Karras-spaced times t f32 [levels], rising from `t_min` to 1 (Karras et al. 2022, Eq. 5)."""
    if levels < 1 or not 0.0 < t_min < 1.0 or rho <= 0.0:
        raise ConfigError(f"levels={levels}, t_min={t_min}, rho={rho}: expected levels >= 1, 0 < t_min < 1 and rho > 0")
    if levels == 1:
        return torch.ones(1)
    ramp = torch.linspace(0.0, 1.0, levels, dtype=torch.float64)
    low = t_min ** (1.0 / rho)
    times = (low + ramp * (1.0 - low)) ** rho
    times[-1] = 1.0
    return times.float()


def refine_ratios(times: Tensor) -> Tensor:
    """r[k] = t[k−1] / t[k] f32 [K]: how much of a draft stays when it goes one level down; r[0] = 0."""
    return torch.cat((times.new_zeros(1), times[:-1] / times[1:]))


def embedding_statistics(embedding: Tensor, image_vocab: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation f32 [D] of the image tokens' input embeddings over the vocabulary."""
    if embedding.dim() != 2 or not 2 <= image_vocab <= embedding.shape[0]:
        raise ConfigError(
            f"embedding of shape {tuple(embedding.shape)} with image_vocab={image_vocab}: expected [V+F, D] "
            "with at least two image rows"
        )
    std, mean = torch.std_mean(embedding[:image_vocab].float(), dim=0, correction=0)
    # A dimension that never varies carries no noise either; 1e-6 keeps its normalisation finite.
    return mean, std.clamp(min=1e-6)


def timestep_encodings(times: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Timestep tokens f32 [K, D]: sinusoidal encodings of 1000·t, brought to the embeddings' scale."""
    dim = mean.shape[0]
    half = (dim + 1) // 2
    steps = torch.arange(half, dtype=torch.float64, device=mean.device)
    angles = 1000.0 * times.double().to(mean.device)[:, None] * torch.exp(-math.log(10000.0) / half * steps)
    code = torch.cat((angles.cos(), angles.sin()), 1)[:, :dim]
    spread, centre = torch.std_mean(code, dim=1, keepdim=True, correction=0)
    return std * ((code - centre) / spread.clamp(min=1e-6)).float() + mean
