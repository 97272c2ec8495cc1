"""The decoder core: a Llama block with fused projections, written once for training, prefill and windows.

A caller supplies `attend`, the only part that differs between the three: training attends inside the sequence,
prefill and windows attend to the static cache. Families other than Llama differ by a few knobs of the config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

LAYER_NORM_EPS = 1e-5  # of query and key norms, the same in every checkpoint that has them


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder; names follow transformers' LlamaConfig, and the defaults are Llama.

    qk_norm      norm of each head's queries and keys before rotation: "none", "rms", or "layer" (with bias)
    post_norm    norms stand behind attention and MLP, inside the residual branch, instead of before them
    qkv_bias     the query, key and value projections have biases
    head_hidden  width of a two-layer output head (linear, GELU, linear, with biases); 0 = one matrix
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    qk_norm: str = "none"
    post_norm: bool = False
    qkv_bias: bool = False
    head_hidden: int = 0


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
    """Attention and SwiGLU; the query, key, value and the gate, up projections are one matrix each.

    `qk_weight` and `qk_bias` [H + Hkv, head_dim] are those of the query heads, then of the key heads.
    `outside` calls `attend` for a compiled block.
    """

    outside: Callable[..., Tensor] | None = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.hidden_size, config.head_dim
        normed_heads = config.num_attention_heads + config.num_key_value_heads
        rows = (normed_heads + config.num_key_value_heads) * dim
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, rows, bias=config.qkv_bias)
        if config.qk_norm != "none":
            self.qk_weight = nn.Parameter(torch.ones(normed_heads, dim))
        if config.qk_norm == "layer":
            self.qk_bias = nn.Parameter(torch.zeros(normed_heads, dim))
        self.out = nn.Linear(config.num_attention_heads * dim, width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        if self.config.post_norm:
            x = x + self._norm(self._attention(x, cos, sin, layer, attend), self.attention_norm)
            return x + self._norm(self._mlp(x), self.mlp_norm)
        x = x + self._attention(self._norm(x, self.attention_norm), cos, sin, layer, attend)
        return x + self._mlp(self._norm(x, self.mlp_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.qkv(x).view(*x.shape[:2], heads + 2 * kv_heads, self.config.head_dim)
        rotated = rotate(self._qk_normed(qkv[:, :, : heads + kv_heads]), cos, sin)
        given = (layer, rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, heads + kv_heads :])
        attended = attend(*given) if self.outside is None else self.outside(attend, *given)
        return self.out(attended.flatten(2))

    def _qk_normed(self, qk: Tensor) -> Tensor:
        if self.config.qk_norm == "rms":
            return F.rms_norm(qk, qk.shape[-1:], None, self.config.rms_norm_eps) * self.qk_weight
        if self.config.qk_norm == "layer":
            return F.layer_norm(qk, qk.shape[-1:], None, None, LAYER_NORM_EPS) * self.qk_weight + self.qk_bias
        return qk

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def _call(attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(layer, q, k, v)


class Transformer(nn.Module):
    """Embeddings in, hidden states out; the head gives logits over image ids only.

    `embedding` is the input table [vocabulary, D]: image ids, then structure ids, then everything else, so that
    the local ids of images and structure tokens are rows of it. `head` maps D to `image_vocabulary`.
    """

    cos: Tensor
    sin: Tensor
    compiled = False

    def __init__(self, config: TransformerConfig, vocabulary: int, image_vocabulary: int) -> None:
        super().__init__()
        self.config, self.image_vocabulary = config, image_vocabulary
        width, hidden = config.hidden_size, config.head_hidden
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(width))
        if hidden:
            self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, image_vocabulary))
        else:
            self.head = nn.Linear(width, image_vocabulary, bias=False)
        self.set_rope(*rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta))

    def compile_blocks(self) -> None:
        """Let torch.compile make kernels of each block's norms, products and rotation, on the first passes.

        Attention and the cache stay outside: they read lengths that change with every pass.
        """
        outside = cast(Callable[..., Tensor], torch.compiler.disable(_call))
        for block in self.blocks:
            cast(Block, block).outside = outside
            block.compile()
        self.compiled = True

    def set_rope(self, cos: Tensor, sin: Tensor) -> None:
        """Rotate by these float32 tables [positions, head_dim], sine signed as in `rope_table`."""
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def outline(cls, config: TransformerConfig, vocabulary: int, image_vocabulary: int) -> Transformer:
        """A model without storage, for shapes and counts; `allocate` gives it some."""
        with torch.device("meta"):
            return cls(config, vocabulary, image_vocabulary)

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give an outline uninitialised weights, and the default rotary tables in float32."""
        self.to(dtype).to_empty(device=device)
        config = self.config
        cos, sin = rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.set_rope(cos.to(device), sin.to(device))

    def initialise(self, seed: int) -> None:
        """Normal weights of deviation 0.02, with residual outputs scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not name.endswith(("qk_weight", "qk_bias")):
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
