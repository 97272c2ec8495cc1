"""Weights in transformers' Llama format: read into the fused core, and written from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..transformer import Transformer, TransformerConfig


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; CheckpointError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; CheckpointError names the file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is not a complete checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch the checkpoint again") from error


def transformer_config(config: dict[str, Any], path: Path) -> TransformerConfig:
    """Sizes from a Llama config.json, in the 4.x and the 5.x spelling of the rotary base."""
    rope = config.get("rope_parameters") or {}
    try:
        heads = int(config["num_attention_heads"])
        return TransformerConfig(
            hidden_size=int(config["hidden_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate_size=int(config["intermediate_size"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            max_position_embeddings=int(config["max_position_embeddings"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} has no entry {error}, expected a Llama configuration") from None


def _names(layers: int) -> dict[str, list[str]]:
    """Core parameter -> the Llama tensors that make it up, stacked by rows."""
    names = {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
    for i in range(layers):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        names[new + "attention_norm"] = [old + "input_layernorm.weight"]
        names[new + "qkv.weight"] = [f"{old}self_attn.{part}_proj.weight" for part in "qkv"]
        names[new + "out.weight"] = [old + "self_attn.o_proj.weight"]
        names[new + "mlp_norm"] = [old + "post_attention_layernorm.weight"]
        names[new + "gate_up.weight"] = [old + "mlp.gate_proj.weight", old + "mlp.up_proj.weight"]
        names[new + "down.weight"] = [old + "mlp.down_proj.weight"]
    return names


def _take(stored: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in stored:
        raise CheckpointError(f"{path} has no tensor {name!r}; the checkpoint does not match its config.json")
    return stored.pop(name)


def load_llama(
    path: Path,
    config: TransformerConfig,
    vocabulary: int,
    image_vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Transformer:
    """The core with the weights of a Llama checkpoint file, its head cut to the image ids 0 … V-1."""
    stored = read_tensors(path)
    model = Transformer(config, vocabulary, image_vocabulary)
    state = {"head.weight": _take(stored, "lm_head.weight", path)[:image_vocabulary]}
    for name, parts in _names(config.num_hidden_layers).items():
        state[name] = torch.cat([_take(stored, part, path) for part in parts])
    if stored:
        raise CheckpointError(f"{path} holds unexpected tensors: {', '.join(sorted(stored)[:3])}")
    for name, weight in model.named_parameters():
        if state[name].shape != weight.shape:
            got, wanted = tuple(state[name].shape), tuple(weight.shape)
            raise CheckpointError(f"{path}: {name} has shape {got}, config.json asks for {wanted}")
    model.load_state_dict(state)
    return model.to(device, dtype).eval().requires_grad_(False)


def save_llama(model: Transformer, folder: Path, extra: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors so that `LlamaForCausalLM.from_pretrained` reads them too."""
    config, state = model.config, model.state_dict()
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    vocabulary = state["embedding"].shape[0]
    head = torch.zeros_like(state["embedding"])
    head[: state["head.weight"].shape[0]] = state["head.weight"]
    tensors = {"lm_head.weight": head}
    for name, parts in _names(config.num_hidden_layers).items():
        rows = [heads * dim, kv_heads * dim, kv_heads * dim] if len(parts) == 3 else len(state[name]) // len(parts)
        tensors |= dict(zip(parts, state[name].split(rows), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": vocabulary, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": str(dtype).removeprefix("torch."), **vars(config),
    }  # fmt: skip
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps({**fields, **extra}, indent=1) + "\n", encoding="utf-8")
