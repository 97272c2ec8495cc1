"""A forward pass on the fused ops: five kernels and four matrix products a layer, nothing else.

The same maths as `Transformer.forward` over a `StaticCache`, for inference. Norms add the residual on their way, one
op normalises, rotates and stores keys, and attention reads the cache with each row's own length and timestep key. Any
attention backend will do.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sjd2_kernels import reference

from .attention import Attention
from .transformer import LAYER_NORM_EPS, Block, Transformer, TransformerConfig

QK_NORMS = {"none": reference.NO_NORM, "rms": reference.RMS_NORM, "layer": reference.LAYER_NORM}


def can_fuse(config: TransformerConfig) -> bool:
    """Whether the fused ops cover a decoder: norms must stand before attention and MLP."""
    return not config.post_norm


def fused_forward(
    model: Transformer, embeds: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, front: int, attention: Attention
) -> Tensor:
    """Hidden states [R, T, D] of embeds [R, T, D], appended behind each row's valid entries of a cache.

    keys, values [layers, R, S, Hkv, d] (written in place), of which the first `front` slots are no entries; lengths
    int32 [R]; `attention` as prepared for this pass. Entry n of a row stands at rotary position n.
    """
    ops, config = torch.ops.sjd2, model.config
    blocks = [cast(Block, block) for block in model.blocks]
    norms = [*(block.attention_norm for block in blocks[1:]), model.norm]
    residual = embeds.clone()
    x = ops.rms_norm(residual, blocks[0].attention_norm, config.rms_norm_eps, None)
    for layer, block in enumerate(blocks):
        qkv = block.qkv(x).view(*x.shape[:2], -1, config.head_dim)
        q = ops.qk_norm_rope_cache(
            qkv, model.cos, model.sin, lengths, keys[layer], values[layer], *_qk_weights(block),
            QK_NORMS[config.qk_norm], LAYER_NORM_EPS if config.qk_norm == "layer" else config.rms_norm_eps, front,
        )  # fmt: skip
        attended = attention(q, keys[layer], values[layer])
        x = ops.rms_norm(block.out(attended.flatten(2)), block.mlp_norm, config.rms_norm_eps, residual)
        x = ops.rms_norm(block.down(ops.swiglu(block.gate_up(x))), norms[layer], config.rms_norm_eps, residual)
    return x


def _qk_weights(block: Block) -> tuple[Tensor | None, ...]:
    """Weight and bias of the query heads' norm, then of the key heads'; None where there are none."""
    heads = block.config.num_attention_heads
    weight, bias = getattr(block, "qk_weight", None), getattr(block, "qk_bias", None)
    parts = [(None, None) if part is None else (part[:heads], part[heads:]) for part in (weight, bias)]
    return parts[0][0], parts[1][0], parts[0][1], parts[1][1]
