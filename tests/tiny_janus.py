"""Tiny random checkpoints of Janus, written to disk in transformers' format and in that of the authors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CODES, HEADS, HEAD_DIM, GRID = 32, 4, 16, 3
WIDTH = HEADS * HEAD_DIM
VQ = {
    "embed_dim": 4, "num_embeddings": CODES, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1, "projection_dim": WIDTH, "num_hidden_layers": 2, "image_token_embed_dim": WIDTH,
}  # fmt: skip
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>"]
SPECIAL += ["<image_placeholder>"]
ROLES = ["<|User|>", "<|Assistant|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:"


def vocabulary(pro: bool) -> dict[str, int]:
    """Names and ids; the first release has no tokens for the roles."""
    names = [*LETTERS, "U", "A", "Ġ", "Ċ", *(ROLES if pro else []), *SPECIAL]
    return {name: i for i, name in enumerate(names)}


def write_tokenizer(folder: Path, pro: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    ids = vocabulary(pro)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ids if len(name) > 1])
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, ids[begin])])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2], "extra_special_tokens": special,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hf_model(pro: bool, kv_heads: int) -> Any:
    """transformers' own model with random weights; float32."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    ids = vocabulary(pro)
    text = {
        "model_type": "llama", "vocab_size": len(ids) + 5, "hidden_size": WIDTH, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 160, "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4 * GRID, "patch_size": 4,
        "num_image_tokens": GRID**2, "projection_dim": WIDTH,
    }  # fmt: skip
    torch.manual_seed(7)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=VQ, tie_word_embeddings=False)
    model = JanusForConditionalGeneration(config).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += torch.randn_like(tensor) * (0.3 if tensor.dim() == 1 else 0.15)
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = ids[SPECIAL[0]], ids[SPECIAL[2]]
    generation.guidance_scale = 5
    generation.generation_kwargs = {"boi_token_id": ids["<begin_of_image>"]}  # type: ignore[attr-defined]
    return model


def write_hf(folder: Path, model: Any) -> Path:
    """A folder as transformers saves it, in shards."""
    model.save_pretrained(folder, max_shard_size="300KB")
    write_tokenizer(folder, True)
    return folder


# transformers' names and those of the authors, in this order.
NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vqmodel.decoder.mid.block_1.", "gen_vision_model.decoder.mid.0."),
    ("model.vqmodel.decoder.mid.attn_1.", "gen_vision_model.decoder.mid.1."),
    ("model.vqmodel.decoder.mid.block_2.", "gen_vision_model.decoder.mid.2."),
    ("model.vqmodel.decoder.up.", "gen_vision_model.decoder.conv_blocks."),
    ("model.vqmodel.encoder.mid.block_1.", "gen_vision_model.encoder.mid.0."),
    ("model.vqmodel.encoder.mid.attn_1.", "gen_vision_model.encoder.mid.1."),
    ("model.vqmodel.encoder.mid.block_2.", "gen_vision_model.encoder.mid.2."),
    ("model.vqmodel.encoder.down.", "gen_vision_model.encoder.conv_blocks."),
    ("model.vqmodel.", "gen_vision_model."),
    ("model.generation_embeddings.", "gen_embed."),
    ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
    ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
    ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
    ("model.generation_head.", "gen_head."),
    ("model.vision_model.", "vision_model.vision_tower."),
    ("model.aligner.", "aligner."),
)


def released_weights(model: Any) -> dict[str, Tensor]:
    """All tensors under the authors' names, with the counter that their codebook keeps."""
    tensors = {"gen_vision_model.quantize.codebook_used": torch.zeros(8)}
    for name, tensor in model.state_dict().items():
        old = next((new + name.removeprefix(start) for start, new in NAMES if name.startswith(start)), name)
        tensors[re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", old)] = tensor.contiguous()
    return tensors


def write_released(folder: Path, model: Any, pro: bool, pickled: bool) -> Path:
    """A folder as the authors publish it: Janus-Pro's weights are pickled."""
    folder.mkdir()
    if pickled:
        torch.save(released_weights(model), folder / "pytorch_model.bin")
    else:
        save_file(released_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "model_type")
    own = {"image_token_size": CODES, "n_embed": VQ["embed_dim"]}
    own |= {name: VQ[name] for name in ("base_channels", "channel_multiplier", "num_res_blocks", "latent_channels")}
    config = {
        "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"],
        "language_config": {name: text[name] for name in kept} | {"rope_theta": 900.0},
        "gen_vision_config": {"cls": "VQ-16", "params": own},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "input_dim": 4, "n_embed": WIDTH}},
        "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": WIDTH, "n_embed": WIDTH}},
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 16 * GRID}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, pro)
    return folder
