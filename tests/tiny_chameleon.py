"""Tiny random checkpoints of the Chameleon family, written to disk in the formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CODES, HEADS, HEAD_DIM = 32, 4, 16
VQ = {
    "base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 2], "num_res_blocks": 1, "embed_dim": 12,
    "latent_channels": 16, "num_embeddings": CODES, "resolution": 64,
}  # fmt: skip
LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
SPECIAL = ["<racm3:break>", "<eoss>", "<reserved08706>", "<image>", "<reserved08799>"]
SPECIAL += [f"<reserved{8800 + n:05d}>" for n in range(1, 5)]


def vocabulary() -> dict[str, int]:
    """Names and ids; image ids run against the order of their codes, so that nothing works by luck."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [f"IMGIMG{str(code).translate(LETTERS)}Z" for code in reversed(range(CODES))]
    names += [*SPECIAL, *"abcdefghijklmnopqrstuvwxyzGI0123456789 :\n"]
    return {name: i for i, name in enumerate(names)}


def image_ids() -> list[int]:
    """The id of every code."""
    return [4 + CODES - 1 - code for code in range(CODES)]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    ids = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ids if len(name) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def decoder_weights(seed: int = 5) -> dict[str, Tensor]:
    """A random picture decoder under the names of Meta's vqgan.ckpt, written out by hand."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"quantize.embedding.weight": torch.randn(CODES, 12, generator=generator)}

    def conv(name: str, inputs: int, outputs: int, size: int) -> None:
        scale = (inputs * size * size) ** -0.5
        tensors[name + ".weight"] = scale * torch.randn(outputs, inputs, size, size, generator=generator)
        tensors[name + ".bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name: str, channels: int) -> None:
        tensors[name + ".weight"] = 1 + 0.2 * torch.randn(channels, generator=generator)
        tensors[name + ".bias"] = 0.1 * torch.randn(channels, generator=generator)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(name + ".norm1", inputs)
        conv(name + ".conv1", inputs, outputs, 3)
        norm(name + ".norm2", outputs)
        conv(name + ".conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(name + ".nin_shortcut", inputs, outputs, 1)

    conv("post_quant_conv", 12, 16, 1)
    conv("decoder.conv_in", 16, 64, 3)
    block("decoder.mid.block_1", 64, 64)
    norm("decoder.mid.attn_1.norm", 64)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"decoder.mid.attn_1.{part}", 64, 64, 1)
    block("decoder.mid.block_2", 64, 64)
    width = 64
    for level, channels in reversed(list(enumerate([32, 32, 32, 32, 64]))):
        for i in range(2):
            block(f"decoder.up.{level}.block.{i}", width, channels)
            width = channels
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", 32)
    conv("decoder.conv_out", 32, 3, 3)
    return tensors


def hf_model(swin: bool = False, kv_heads: int = 2, shared_norms: int = 0) -> Any:
    """transformers' own model with random weights, norms and biases included; float32.

    shared_norms: how many sets of query and key norms the heads share; 0 = one for each.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = ChameleonConfig(
        vocab_size=len(vocabulary()), hidden_size=HEADS * HEAD_DIM, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=160, swin_norm=swin,
        vocabulary_map=vocabulary(), vq_config=VQ, model_parallel_size=shared_norms or 1,
        bos_token_id=0, eos_token_id=2, pad_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 900.0},
    )  # fmt: skip
    torch.manual_seed(7)
    model = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "vqmodel" not in name:
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 or "_norm" in name else 0.15))
        if shared_norms and ("q_norm" in name or "k_norm" in name):
            parameter.copy_(parameter[:shared_norms].repeat_interleave(len(parameter) // shared_norms, 0))
    return model


def write_hf(folder: Path, model: Any, decoder_inside: bool) -> Path:
    """A folder as transformers saves it, in shards; Anole's weights have the picture decoder among them."""
    model.save_pretrained(folder, max_shard_size="300KB")
    write_tokenizer(folder)
    if not decoder_inside:
        save_file(decoder_weights(), folder / "vqgan.safetensors")
        return folder
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in decoder_weights().items()}
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    inside = {name: tensor for name, tensor in tensors.items() if name not in listed["weight_map"]}
    # Those that transformers keeps too (codebook, post_quant_conv) must be this decoder's.
    for file in sorted({listed["weight_map"][name] for name in tensors if name in listed["weight_map"]}):
        from safetensors.torch import load_file

        shard = load_file(folder / file)
        save_file({name: tensors.get(name, tensor) for name, tensor in shard.items()}, folder / file)
    save_file(inside, folder / "decoder.safetensors")
    listed["weight_map"] |= dict.fromkeys(inside, "decoder.safetensors")
    index.write_text(json.dumps(listed))
    return folder


def write_lumina(folder: Path, model: Any, shared_norms: int) -> Path:
    """As Lumina-mGPT is published: norms once per training device, no picture tokenizer, Meta's file beside it."""
    folder.mkdir()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "vqmodel" in name:
            continue
        if "q_norm" in name or "k_norm" in name:
            tensor = tensor[:: len(tensor) // shared_norms]
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "dropout": 0.0}
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "mask_image_logits": False}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    encoder = {"encoder.conv_in.weight": torch.ones(1), "loss.logvar": torch.ones(1)}
    torch.save({"state_dict": decoder_weights() | encoder}, folder / "vqgan.ckpt")
    return folder
