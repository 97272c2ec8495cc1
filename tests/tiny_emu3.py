"""Tiny random checkpoints of Emu3, written to disk in transformers' format and in that of the authors."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CODES, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 16
VQ = {
    "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "temporal_downsample_factor": 4, "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [3], "hidden_size": 64,
}  # fmt: skip
VISION = ["<|image token|>", "<|image start|>", "<|image end|>"]
# Against the order of the codes, so that nothing works by luck.
VISION += [f"<|visual token {code:06d}|>" for code in reversed(range(CODES))]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)), *VISION]
# Byte pairs in the order in which they are joined; all bytes come before them. "nig" is reached by no join of two
# tokens: as a word of its own it is one nevertheless.
PAIRS = ["th", "he", "the", " t", " the", "in", "ing", "er", "re", " re", "ed", " red", " f", "ox", " fox", "nig"]


def text_vocabulary(hf: bool) -> dict[str, int]:
    """Names and ids of the whole vocabulary; transformers' release calls one of them otherwise."""
    letters = [*"abcdefghijklmnopqrstuvwxyzĠ0123456789*,."] if hf else []
    names = [*letters, *SPECIAL] if hf else [*(f"byte {i}" for i in range(256)), *PAIRS, *SPECIAL]
    ids = {name: i for i, name in enumerate(names)}
    if hf:
        ids["<image>"] = ids.pop("<|extra_0|>")
    return ids


def write_tokenizer(folder: Path, hf: bool) -> None:
    if not hf:
        tokens = [bytes([i]) for i in range(256)] + [pair.encode() for pair in PAIRS]
        lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
        (folder / "emu3.tiktoken").write_text("\n".join(lines) + "\n")
        (folder / "emu3_vision_tokens.txt").write_text("\n".join(VISION) + "\n")
        return
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = text_vocabulary(True)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ids if len(name) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>",
        "pad_token": "<|endoftext|>", "extra_special_tokens": special,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hf_model(hf_names: bool) -> Any:
    """transformers' own model with random weights, statistics of batch norms included; float32."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    ids = text_vocabulary(hf_names)
    named = ("<|endoftext|>", "<|extra_203|>", "<|extra_204|>")
    pad, bos, eos = (ids[name] for name in named)
    text = {
        "vocab_size": len(ids) + 3, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 200,
        "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos,
    }  # fmt: skip
    torch.manual_seed(7)
    vocabulary = ids | {"<image>": ids["<image>" if hf_names else "<|extra_0|>"]}
    config = Emu3Config(text_config=text, vq_config=VQ, vocabulary_map=vocabulary)
    model = Emu3ForConditionalGeneration(config).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor) * (0.3 if tensor.dim() == 1 else 0.15)
            tensor += noise.abs() if name.endswith("running_var") else noise
    return model


def write_hf(folder: Path, model: Any, old_names: bool) -> Path:
    """A folder as transformers saves it, in shards, by its first names of the tensors or its present ones."""
    model.save_pretrained(folder, max_shard_size="300KB", save_original_format=old_names)
    write_tokenizer(folder, True)
    return folder


def write_released(folder: Path, model: Any) -> Path:
    """The language model as its authors publish it, and their picture tokenizer in a folder beside it."""
    folder.mkdir(parents=True)
    text, pixels = {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vqmodel."):
            pixels |= _released_vq(name.removeprefix("model.vqmodel."), tensor)
        else:
            text[name.replace("model.text_model.", "model.")] = tensor.contiguous()
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = model.config.text_config.to_dict()
    sizes |= {"rope_theta": sizes.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    sizes |= {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "image_area": 518400}
    (folder / "config.json").write_text(json.dumps(sizes))
    write_tokenizer(folder, False)
    beside = folder.parent / "Emu3-VisionTokenizer"
    beside.mkdir()
    save_file(pixels, beside / "model.safetensors")
    names = {"latent_channels": "z_channels", "base_channels": "ch", "channel_multiplier": "ch_mult"}
    own = {names.get(name, name): value for name, value in VQ.items() if name != "hidden_size"}
    (beside / "config.json").write_text(json.dumps(own | {"model_type": "Emu3VisionVQ", "double_z": False}))
    return folder


def _released_vq(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the picture tokenizer under its authors' name; their attention is made of 1x1 convolutions."""
    if name.endswith("_proj.weight"):
        tensor = tensor[:, :, None, None]
    name = name.replace("middle_block.attn_norm.", "mid.attn_1.norm.").replace("middle_block.", "mid.")
    name = re.sub(r"attn_norms\.(\d+)\.", r"attn.\1.norm.", name)
    name = name.replace("up_block.up.", "up.").replace("down_block.down.", "down.").replace("out_proj.", "proj_out.")
    return {re.sub(r"\b([qkv])_proj\.", r"\1.", name): tensor.contiguous()}
