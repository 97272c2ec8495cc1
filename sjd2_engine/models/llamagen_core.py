"""LlamaGen's configuration, weight names and rotary table, in terms of the decoder core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..transformer import TransformerConfig
from .weights import Rows, Sources, read_json

# What the releases are called, and their layers, heads and width.
SIZES = {
    "GPT-B": (12, 12, 768), "GPT-L": (24, 16, 1024), "GPT-XL": (36, 20, 1280), "GPT-XXL": (48, 24, 1536),
    "GPT-3B": (24, 32, 3200),
}  # fmt: skip
PREFIX = {"t2i": 120, "c2i": 1}  # positions in front of the picture
ROOM = 1024  # positions behind the picture, for the last windows
TEXT_ENCODER = "google/flan-t5-xl"


@dataclass(frozen=True)
class LlamaGenConfig:
    """config.json of a converted release, which either names a released size or gives its numbers.

    kind             "t2i": pictures of captions, "c2i": of classes
    image_size       side of the square pictures in pixels; grid: the same in tokens
    prefix           positions in front of the picture
    codes, classes   entries of the codebook, classes without the empty one (0 for captions)
    caption_dim      width of the text encoder's features
    vq               what differs from the released picture decoder
    labels           classes by lower-case name
    encoder          folder or hub id of the text encoder
    """

    kind: str
    image_size: int
    grid: int
    prefix: int
    codes: int
    classes: int
    caption_dim: int
    sizes: TransformerConfig
    vq: dict[str, Any]
    labels: dict[str, int]
    encoder: str

    @property
    def rows(self) -> int:
        """Rows of the input table: image codes, then the classes, the empty one last."""
        return self.codes + (self.classes + 1 if self.classes else 0)


def read_config(folder: Path) -> LlamaGenConfig:
    """The configuration of a folder; CheckpointError names what is missing or no number."""
    return parse_config(read_json(folder / "config.json"), folder)


def parse_config(config: dict[str, Any], folder: Path) -> LlamaGenConfig:
    """The same of the contents of config.json."""
    path = folder / "config.json"
    kind, name = str(config.get("gpt_type")), str(config.get("gpt_model"))
    if kind not in PREFIX or not (name in SIZES or "dim" in config):
        raise CheckpointError(
            f"{path}: gpt_type={kind!r} and gpt_model={name!r}, expected t2i or c2i and one of {', '.join(SIZES)}"
        )
    config = {**dict(zip(("n_layer", "n_head", "dim"), SIZES.get(name, ()))), **config}
    vq = config.get("vq") or {}
    try:
        factor = 2 ** (len(vq.get("ch_mult", [1, 1, 2, 2, 4])) - 1)
        grid, rest = divmod(int(config["image_size"]), factor)
        prefix = int(config.get("cls_token_num", PREFIX[kind]))
        if rest:
            raise ValueError(f"image_size is no multiple of {factor}")
        return LlamaGenConfig(
            kind, grid * factor, grid, prefix, int(config.get("vocab_size", 16384)),
            int(config.get("num_classes", 1000)) if kind == "c2i" else 0, int(config.get("caption_dim", 2048)),
            _sizes(config, prefix + grid * grid + prefix + ROOM), vq, _labels(config.get("id2label") or {}),
            str(folder / "t5" if (folder / "t5").is_dir() else config.get("text_encoder", TEXT_ENCODER)),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no usable configuration ({error!r})") from None


def _labels(names: Mapping[str, str]) -> dict[str, int]:
    return {name.strip().lower(): int(i) for i, several in names.items() for name in several.split(",")}


def _sizes(config: Mapping[str, Any], positions: int) -> TransformerConfig:
    width, heads = int(config["dim"]), int(config["n_head"])
    multiple = int(config.get("multiple_of", 256))
    hidden = -(-int(2 * 4 * width / 3) // multiple) * multiple
    return TransformerConfig(
        hidden_size=width,
        num_hidden_layers=int(config["n_layer"]),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("n_kv_head") or heads),
        head_dim=width // heads,
        intermediate_size=hidden,
        rms_norm_eps=float(config.get("norm_eps", 1e-5)),
        rope_theta=float(config.get("rope_base", 10000)),
        max_position_embeddings=positions,
    )


def grid_rope(side: int, head_dim: int, theta: float, prefix: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine float32 [positions, head_dim] of a picture of side x side tokens behind a prefix.

    One half of the rotated pairs turns with the row, the other with the column. The prefix is multiplied by zero:
    every query sees all of it alike, whatever its place, so that leaving padding out of it changes nothing. So are
    positions behind the picture, which hold rejected drafts only.
    """
    frequency = theta ** -(torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency
    pairs = torch.cat([angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)], 2).flatten(0, 1)
    cos, sin = torch.cat([pairs.cos()] * 2, 1), torch.cat([-pairs.sin(), pairs.sin()], 1)
    around = (0, 0, prefix, positions - prefix - side * side)
    return F.pad(cos, around), F.pad(sin, around)


def llamagen_sources(config: LlamaGenConfig) -> Sources:
    """Core parameter -> tensors of a release, where numbers rotated together stand side by side instead of half a head
    apart."""
    sizes = config.sizes
    dim, kv_heads = sizes.head_dim, sizes.num_key_value_heads
    pairs = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    rotated = (torch.arange(sizes.num_attention_heads + kv_heads)[:, None] * dim + pairs).flatten()
    order = torch.cat([rotated, len(rotated) + torch.arange(kv_heads * dim)])
    names: dict[str, list[Rows | Tensor]] = {
        "embedding": [Rows("tok_embeddings.weight")],
        "norm": [Rows("norm.weight")],
        "head.weight": [Rows("output.weight")],
    }
    if config.classes:
        names["embedding"].append(Rows("cls_embedding.embedding_table.weight"))
    for i in range(sizes.num_hidden_layers):
        old, new = f"layers.{i}.", f"blocks.{i}."
        names[new + "attention_norm"] = [Rows(old + "attention_norm.weight")]
        names[new + "qkv.weight"] = [Rows(old + "attention.wqkv.weight", order)]
        names[new + "out.weight"] = [Rows(old + "attention.wo.weight")]
        names[new + "mlp_norm"] = [Rows(old + "ffn_norm.weight")]
        names[new + "gate_up.weight"] = [Rows(f"{old}feed_forward.{part}.weight") for part in ("w1", "w3")]
        names[new + "down.weight"] = [Rows(old + "feed_forward.w2.weight")]
    return names
