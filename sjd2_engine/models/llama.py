"""Weights in transformers' Llama format: sizes and names for every family built on it, and the writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..transformer import Transformer, TransformerConfig
from .weights import Rows, Sources

NOT_LLAMA = ("qk_norm", "post_norm", "qkv_bias", "head_hidden")


def transformer_config(config: dict[str, Any], path: Path, **knobs: Any) -> TransformerConfig:
    """Sizes from a Llama config.json, in the 4.x and the 5.x spelling of the rotary base.

    `knobs` set the fields in which a family differs from Llama, or override what config.json says.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path} asks for {config['hidden_act']!r} in the MLP: only 'silu' is known")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"{path} asks for rotary scaling of type {kind!r}: only plain rotary positions are known")
    try:
        heads = int(config["num_attention_heads"])
        fields: dict[str, Any] = {
            "hidden_size": int(config["hidden_size"]),
            "num_hidden_layers": int(config["num_hidden_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
            "intermediate_size": int(config["intermediate_size"]),
            "rms_norm_eps": float(config["rms_norm_eps"]),
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            "max_position_embeddings": int(config["max_position_embeddings"]),
        }
    except KeyError as error:
        raise CheckpointError(f"{path} has no entry {error}, expected a Llama configuration") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds an entry that is no number ({error})") from None
    return TransformerConfig(**{**fields, **knobs})


def llama_sources(
    config: TransformerConfig,
    prefix: str = "model.",
    embedding: Tensor | None = None,
    head: str | None = "lm_head.weight",
    image_rows: Tensor | None = None,
) -> dict[str, list[Rows | Tensor]]:
    """Core parameter -> the stored tensors that make it up, under transformers' names below `prefix`.

    embedding: order of the input table's rows, int64. head: name of the output matrix; None where the family fills
    in `head.*` itself. image_rows: rows of the head that are image ids. Families change entries for what they
    store in other ways.
    """
    names: dict[str, list[Rows | Tensor]] = {
        "embedding": [Rows(prefix + "embed_tokens.weight", embedding)],
        "norm": [Rows(prefix + "norm.weight")],
    }
    if head is not None:
        names["head.weight"] = [Rows(head, image_rows)]
    for i in range(config.num_hidden_layers):
        old, new = f"{prefix}layers.{i}.", f"blocks.{i}."
        names[new + "attention_norm"] = [Rows(old + "input_layernorm.weight")]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            names[f"{new}qkv.{kind}"] = [Rows(f"{old}self_attn.{part}_proj.{kind}") for part in "qkv"]
        names[new + "out.weight"] = [Rows(old + "self_attn.o_proj.weight")]
        names[new + "mlp_norm"] = [Rows(old + "post_attention_layernorm.weight")]
        names[new + "gate_up.weight"] = [Rows(f"{old}mlp.{part}_proj.weight") for part in ("gate", "up")]
        names[new + "down.weight"] = [Rows(old + "mlp.down_proj.weight")]
    return names


def _stored(names: Sources, state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The core's tensors taken apart into those of a Llama checkpoint."""
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    tensors = {}
    for name, parts in names.items():
        rows = [queries, keys, keys] if len(parts) == 3 else len(state[name]) // len(parts)
        labels = [part.name for part in parts if isinstance(part, Rows)]
        tensors |= dict(zip(labels, state[name].split(rows), strict=True))
    return tensors


def save_llama(model: Transformer, folder: Path, extra: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors so that `LlamaForCausalLM.from_pretrained` reads them too."""
    config, state = model.config, model.state_dict()
    tensors = _stored(llama_sources(config, head=None), state, config)
    head = torch.zeros_like(state["embedding"])
    head[: model.image_vocabulary] = state["head.weight"]
    tensors["lm_head.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(head), "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: value for name, value in vars(config).items() if name not in NOT_LLAMA},
    }  # fmt: skip
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps({**fields, **extra}, indent=1) + "\n", encoding="utf-8")
