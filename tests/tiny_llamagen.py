"""Tiny random LlamaGen checkpoints under the releases' tensor names, and what they mean, in plain float64."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CODES, GRID, PREFIX, FEATURES, CLASSES = 40, 4, 12, 24, 6
VQ = {"codebook_size": CODES, "codebook_embed_dim": 6, "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1}
VQ |= {"z_channels": 20}
# The sizes of each kind that is tested: a caption model, one with fewer key heads, the head size of the 3B release.
KINDS: dict[str, dict[str, Any]] = {
    "t2i": {"gpt_type": "t2i", "dim": 48, "n_head": 4, "n_layer": 3, "cls_token_num": PREFIX},
    "c2i": {"gpt_type": "c2i", "dim": 64, "n_head": 4, "n_kv_head": 2, "n_layer": 2},
    "c2i-3b": {"gpt_type": "c2i", "dim": 200, "n_head": 2, "n_layer": 2},
}
WORDS = ["a", "red", "fox", "an", "owl", "at", "night", "in", "the", "fog", ","]


def config(kind: str) -> dict[str, Any]:
    """config.json of a kind; entries of the released models are left out where the default is theirs."""
    sizes = {"image_size": 4 * GRID, "vocab_size": CODES, "num_classes": CLASSES, "caption_dim": FEATURES}
    return {"sjd2_family": "llamagen", **KINDS[kind], **sizes, "multiple_of": 16, "rope_base": 200, "vq": VQ}


def weights(kind: str) -> dict[str, Tensor]:
    """Random tensors of the transformer under the releases' names."""
    generator = torch.Generator().manual_seed(len(kind))
    facts = config(kind)
    dim, heads = facts["dim"], facts["n_head"]
    kv = facts.get("n_kv_head", heads) * (dim // heads)
    hidden = -(-int(8 * dim / 3) // 16) * 16

    def random(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)

    tensors = {"tok_embeddings.weight": random(CODES, dim, scale=1.0), "output.weight": random(CODES, dim)}
    tensors["norm.weight"] = 1 + random(dim, scale=0.3)
    if facts["gpt_type"] == "c2i":
        tensors["cls_embedding.embedding_table.weight"] = random(CLASSES + 1, dim, scale=1.0)
    else:
        tensors["cls_embedding.uncond_embedding"] = random(PREFIX, FEATURES)
        tensors["cls_embedding.cap_proj.fc1.weight"] = 2 * random(dim, FEATURES)
        tensors["cls_embedding.cap_proj.fc2.weight"] = 2 * random(dim, dim)
    for i in range(facts["n_layer"]):
        layer = f"layers.{i}."
        tensors[layer + "attention.wqkv.weight"] = 2 * random(dim + 2 * kv, dim)
        tensors[layer + "attention.wo.weight"] = random(dim, dim)
        tensors[layer + "attention_norm.weight"] = 1 + random(dim, scale=0.3)
        tensors[layer + "ffn_norm.weight"] = 1 + random(dim, scale=0.3)
        tensors[layer + "feed_forward.w1.weight"] = random(hidden, dim)
        tensors[layer + "feed_forward.w3.weight"] = random(hidden, dim)
        tensors[layer + "feed_forward.w2.weight"] = random(dim, hidden)
    return tensors


def vq_weights() -> dict[str, Tensor]:
    """Random tensors of the picture decoder under the releases' names, written out by hand."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {"quantize.embedding.weight": torch.randn(CODES, 6, generator=generator)}

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

    def attention(name: str, channels: int) -> None:
        norm(name + ".norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    conv("post_quant_conv", 6, 20, 1)
    conv("decoder.conv_in", 20, 64, 3)
    block("decoder.mid.0", 64, 64)
    attention("decoder.mid.1", 64)
    block("decoder.mid.2", 64, 64)
    for level, (inputs, outputs) in enumerate([(64, 64), (64, 64), (64, 32)]):
        for i in range(2):
            block(f"decoder.conv_blocks.{level}.res.{i}", inputs if i == 0 else outputs, outputs)
            if level == 0:
                attention(f"decoder.conv_blocks.0.attn.{i}", outputs)
        if level < 2:
            conv(f"decoder.conv_blocks.{level}.upsample.conv", outputs, outputs, 3)
    norm("decoder.norm_out", 32)
    conv("decoder.conv_out", 32, 3, 3)
    # Of the encoder and of training, which the releases carry too.
    return tensors | {"encoder.conv_in.bias": torch.ones(3), "quantize.codebook_used": torch.zeros(9)}


def write_t5(folder: Path) -> None:
    """A tiny T5 encoder with its tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(1)
    sizes = T5Config(
        vocab_size=len(WORDS) + 3, d_model=FEATURES, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(sizes).save_pretrained(folder)
    ids = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)


def write(folder: Path, kind: str) -> Path:
    """A folder as `llamagen_convert` makes it, with its own text encoder where it needs one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(kind)))
    save_file(weights(kind), folder / "model.safetensors")
    save_file(vq_weights(), folder / "vq.safetensors")
    if kind == "t2i":
        write_t5(folder / "t5")
    return folder


def write_release(folder: Path, kind: str) -> tuple[Path, Path]:
    """The same as the .pt files of the release, with what training left in them."""
    folder.mkdir()
    files = folder / "t2i_XL.pt", folder / "vq_ds16.pt"
    extra = {"steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": {**weights(kind), "freqs_cis": torch.ones(3)}, **extra}, files[0])
    torch.save({"model": vq_weights()}, files[1])
    return files


def reference_logits(kind: str, prefix: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
    """Logits float64 [P + n, V] of a prefix of P embeddings [P, D], `mask` bool [P] false on its padding, and n codes.

    As published: rotation of neighbouring pairs by complex numbers, which are zero in the prefix; padding is hidden
    from every query but its own.
    """
    facts = config(kind)
    w = {name: tensor.double() for name, tensor in weights(kind).items()}
    heads = facts["n_head"]
    kv_heads, dim = facts.get("n_kv_head", heads), facts["dim"] // heads
    x = torch.cat([prefix.double(), w["tok_embeddings.weight"][codes]])
    total, length = len(prefix), len(x)

    quarter = torch.tensor([200.0 ** (-2 * j / (dim // 2)) for j in range(dim // 4)], dtype=torch.float64)
    cells = torch.arange(GRID * GRID, dtype=torch.float64)
    angles = torch.cat([torch.outer(cells // GRID, quarter), torch.outer(cells % GRID, quarter)], 1)
    turn = torch.polar(torch.ones_like(angles), angles)
    turn = torch.cat([torch.zeros(total, dim // 2, dtype=turn.dtype), turn])[:length, None]

    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden[:, :total] |= ~mask
    hidden.fill_diagonal_(False)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for i in range(facts["n_layer"]):
        layer = f"layers.{i}."
        fused = norm(x, layer + "attention_norm") @ w[layer + "attention.wqkv.weight"].T
        q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (rotated(k), v))
        scores = torch.einsum("thd,shd->hts", rotated(q), k) / dim**0.5
        weight = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", weight, v).flatten(1) @ w[layer + "attention.wo.weight"].T
        y = norm(x, layer + "ffn_norm")
        gate, up = (y @ w[f"{layer}feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[layer + "feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


def prefix_of(kind: str, features: Tensor) -> Tensor:
    """Embeddings float64 [P, D] of padded text features [P, F], or of classes int64 [1]."""
    w = weights(kind)
    if kind != "t2i":
        return w["cls_embedding.embedding_table.weight"][features].double()
    hidden = features.double() @ w["cls_embedding.cap_proj.fc1.weight"].double().T
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return hidden @ w["cls_embedding.cap_proj.fc2.weight"].double().T
