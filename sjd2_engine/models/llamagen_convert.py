"""Make a folder of safetensors from LlamaGen's released .pt files.

    python -m sjd2_engine.models.llamagen_convert t2i_XL_stage1_256.pt vq_ds16_t2i.pt llamagen-t2i-256 \
        --model GPT-XL --type t2i --image-size 256

Pickles can run code when they are loaded: only the tensors in them are read here.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files import check_writable, replace_file
from ..transformer import Transformer
from .llamagen import NOT_CORE, open_weights
from .llamagen_core import PREFIX, SIZES, llamagen_sources, parse_config
from .llamagen_vq import LlamaGenVQ
from .weights import Checkpoint, Rows, check

PICTURES = ("decoder.", "post_quant_conv.", "quantize.embedding.", "encoder.", "quant_conv.")


def convert(weights: Path, vq: Path, out: Path, model: str, kind: str, image_size: int) -> None:
    """Write model.safetensors, vq.safetensors and config.json to `out`.

    Both files are first compared with what `model`, `kind` and `image_size` say. Raises CheckpointError, and
    ConfigError where `out` cannot be written to.
    """
    facts = {"sjd2_family": "llamagen", "gpt_model": model, "gpt_type": kind, "image_size": image_size}
    config = parse_config(facts, out)
    core, decoder = open_weights(weights, allow_pickle=True), open_weights(vq, allow_pickle=True)
    check(Transformer.outline(config.sizes, config.rows, config.codes), core, llamagen_sources(config), NOT_CORE)
    with torch.device("meta"):
        picture = LlamaGenVQ(config.vq)
    check(picture, decoder, {name: [Rows(name)] for name, _ in picture.named_parameters()}, ("",))
    check_writable(out)
    _write(core, out / "model.safetensors", ("",))
    _write(decoder, out / "vq.safetensors", PICTURES)
    replace_file(out / "config.json", json.dumps(facts, indent=1) + "\n")


def _write(checkpoint: Checkpoint, path: Path, prefixes: tuple[str, ...]) -> None:
    names = [name for name in checkpoint.names() if name.startswith(prefixes) and not name.endswith("freqs_cis")]
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: checkpoint.read(name).contiguous() for name in names}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a folder of safetensors from LlamaGen's released .pt files.")
    parser.add_argument("weights", type=Path, help="the transformer, for instance t2i_XL_stage1_256.pt")
    parser.add_argument("vq", type=Path, help="the picture tokenizer, vq_ds16_t2i.pt or vq_ds16_c2i.pt")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--type", choices=PREFIX, required=True, help="pictures of captions (t2i) or of classes (c2i)")
    parser.add_argument("--image-size", type=int, choices=(256, 384, 512), required=True)
    given = parser.parse_args()
    try:
        convert(given.weights, given.vq, given.out, given.model, given.type, given.image_size)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.out}: draw with sjd2 generate --model {given.out}")


if __name__ == "__main__":
    main()
