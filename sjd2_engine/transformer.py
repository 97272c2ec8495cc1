"""The decoder core: a Llama block with fused projections, written once for training, prefill and windows.

A caller supplies `attend`, the only part that differs between the three: training attends inside the sequence,
prefill and windows attend to the static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder; names follow transformers' LlamaConfig."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int


def rope_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, float32 [positions, head_dim].

    With the sign of rotate-half folded into the sine, rotation is `x * cos + roll(x, head_dim / 2) * sin`.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of x [..., T, H, d] by tables [..., T, 1, d]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; the query, key, value and the gate, up projections are one matrix each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.hidden_size, config.head_dim
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * dim
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, rows, bias=False)
        self.out = nn.Linear(config.num_attention_heads * dim, width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        norm = F.rms_norm(x, x.shape[-1:], self.attention_norm, self.config.rms_norm_eps)
        qkv = self.qkv(norm).view(*x.shape[:2], heads + 2 * kv_heads, self.config.head_dim)
        rotated = rotate(qkv[:, :, : heads + kv_heads], cos, sin)
        attended = attend(layer, rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, heads + kv_heads :])
        x = x + self.out(attended.flatten(2))
        norm = F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.config.rms_norm_eps)
        gate, up = self.gate_up(norm).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Embeddings in, hidden states out; the head gives logits over image ids only.

    `embedding` is the input table [image ids + structure ids + words, D], image codes first, so that local ids of
    images and structure tokens are rows of it. `head` is [image ids, D].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig, vocabulary: int, image_vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(vocabulary, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = nn.Linear(config.hidden_size, image_vocabulary, bias=False)
        cos, sin = rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> None:
        """Normal weights of deviation 0.02, with residual outputs scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = depth if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * scale, generator=generator)

    def forward(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [R, T, D] of embeds [R, T, D] at positions int [R, T] or [T]."""
        cos = self.cos[positions].unsqueeze(-2).to(embeds.dtype)
        sin = self.sin[positions].unsqueeze(-2).to(embeds.dtype)
        x = embeds
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, attend)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps)
