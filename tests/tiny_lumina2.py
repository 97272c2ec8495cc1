"""A tiny random checkpoint of Lumina-mGPT 2.0 with the released model's ids, written to disk as it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CODES, FIRST = 24, 155_000
SIZE = (32, 64)
# The released ids; text and the marks of turns and of sizes have others there.
BOI, EOI, EOL, TURN, BEGIN = 151_665, 151_666, 151_670, 90, 91
GRID = {32: 92, 64: 93}
VQ = {"n_embed": CODES, "embed_dim": 4, "z_channels": 6, "ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1}


def vocabulary() -> dict[str, int]:
    ids = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzGI0123456789 :\n")}
    ids |= {"<reserved08706>": TURN, "<|endoftext|>": BEGIN, "<unk>": 94}
    ids |= {f"<reserved{8800 + side // 32:05d}>": i for side, i in GRID.items()}
    return ids | {"<racm3:break>": BOI, "<eoss>": EOI, "<reserved08799>": EOL}


def movq_weights() -> dict[str, Tensor]:
    """A random picture decoder under the names of movqgan_270M.ckpt, written out by hand."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {"quantize.embedding.weight": torch.randn(CODES, 4, generator=generator)}

    def conv(name: str, inputs: int, outputs: int, size: int) -> None:
        scale = (inputs * size * size) ** -0.5
        tensors[name + ".weight"] = scale * torch.randn(outputs, inputs, size, size, generator=generator)
        tensors[name + ".bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name: str, channels: int) -> None:
        tensors[name + ".norm_layer.weight"] = 1 + 0.2 * torch.randn(channels, generator=generator)
        tensors[name + ".norm_layer.bias"] = 0.1 * torch.randn(channels, generator=generator)
        conv(name + ".conv_y", 4, channels, 1)
        conv(name + ".conv_b", 4, channels, 1)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(name + ".norm1", inputs)
        conv(name + ".conv1", inputs, outputs, 3)
        norm(name + ".norm2", outputs)
        conv(name + ".conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(name + ".nin_shortcut", inputs, outputs, 1)

    def attention(name: str) -> None:
        norm(name + ".norm", 64)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", 64, 64, 1)

    conv("post_quant_conv", 4, 6, 1)
    conv("decoder.conv_in", 6, 64, 3)
    block("decoder.mid.block_1", 64, 64)
    attention("decoder.mid.attn_1")
    block("decoder.mid.block_2", 64, 64)
    for level, inputs, outputs in ((3, 64, 64), (2, 64, 32), (1, 32, 32), (0, 32, 32)):
        for i in range(2):
            block(f"decoder.up.{level}.block.{i}", inputs if i == 0 else outputs, outputs)
            if level == 3:
                attention(f"decoder.up.3.attn.{i}")
        if level:
            conv(f"decoder.up.{level}.upsample.conv", outputs, outputs, 3)
    norm("decoder.norm_out", 32)
    conv("decoder.conv_out", 32, 3, 3)
    return tensors | {"encoder.conv_in.weight": torch.ones(1), "ema_decoder.decay": torch.ones(1)}


def hf_model() -> Any:
    """transformers' Chameleon with random weights, in which two heads share each set of query and key norms."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = ChameleonConfig(
        vocab_size=FIRST + CODES + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=100, vocabulary_map={"<image>": 1},
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 8},
    )  # fmt: skip
    torch.manual_seed(3)
    model = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.model.layers.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 or "_norm" in name else 0.15))
        if "q_norm" in name:
            parameter.copy_(parameter[:2].repeat_interleave(2, 0))
    model.model.embed_tokens.weight.mul_(90)
    model.lm_head.weight.mul_(10)
    return model


def write(folder: Path, oracle: Any) -> Path:
    """A folder as the release is, with MoVQGAN's file in it."""
    from tokenizers import AddedToken, Tokenizer, models

    folder.mkdir(exist_ok=True)
    tensors = {name: tensor for name, tensor in oracle.state_dict().items() if "vqmodel" not in name}
    tensors = {name: tensor[::2].contiguous() if "q_norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = oracle.config.to_dict() | {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "movq_config": VQ}
    (folder / "config.json").write_text(json.dumps(config))
    ids = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ids if len(name) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|endoftext|>"}))
    torch.save(movq_weights(), folder / "movqgan_270M.ckpt")
    return folder
