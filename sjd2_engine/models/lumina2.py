"""Lumina-mGPT 2.0: Chameleon's decoder trained from scratch, with a vocabulary and a picture tokenizer of its own.

The sizes of the released model are in its config.json only, and its picture tokenizer is a file of another release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from .chameleon import PROMPT_ROOM, USUAL_PROMPT, ChameleonModel, chameleon_sources
from .chameleon_prompt import GRID_STEP, Picture
from .family import LoadOptions, ModelFacts, read_noise, tuned_defaults
from .llama import transformer_config
from .lumina2_vq import MoVQ, MoVQEncoder
from .releases import token_ids
from .tokenizer import load_tokenizer
from .weights import Checkpoint, TokenRows, load_encoder, load_module, load_transformer, read_json

SIZE = (768, 768)
FIRST_IMAGE_ID = 155_000  # of code 0; the others follow it
TOKENS = {"boi": "<racm3:break>", "eoi": "<eoss>", "eol": "<reserved08799>", "turn": "<reserved08706>"}
QUESTION = "Generate an image of {width}x{height} according to the following prompt:\n{{text}}"
VQ_FILES = ("movqgan_270M.safetensors", "movqgan_270M.ckpt")
DEFAULTS: Mapping[str, Any] = {
    "decoder": "jacobi", "window": 16, "sjd2": {"window": 32}, "guidance_scale": 4.0, "top_k": 4096,
}  # fmt: skip


class Lumina2Model(ChameleonModel):
    """A loaded model of the family."""

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        height, width = (side // self.vq.factor for side in self.facts.image_size)
        codes = tokens.view(-1, height, width).to(self.vq.post_quant_conv.weight.device)
        pixels = self.vq.decode(codes).add(1.0).mul(127.5).round().clamp(0, 255)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def _begin(folder: Path, ids: Mapping[str, int]) -> int:
    """Id in front of every prompt: that of the tokenizer's begin mark, or of its end mark where there is none."""
    path = folder / "tokenizer_config.json"
    given = read_json(path)
    marks = [given.get("bos_token"), given.get("eos_token")]
    names = [mark.get("content") if isinstance(mark, dict) else mark for mark in marks]
    name = names[0] or names[1]
    if not isinstance(name, str) or name not in ids:
        raise CheckpointError(f"{path}: bos_token, or else eos_token, is {name!r}, which the vocabulary does not have")
    return ids[name]


def picture_of(folder: Path, ids: Mapping[str, int], size: tuple[int, int], vq: MoVQ) -> Picture:
    """Everything that surrounds the image tokens of a picture of that (height, width) in pixels."""
    path = folder / "config.json"
    if any(side % GRID_STEP for side in size):
        raise ConfigError(f"image_size={size}: Lumina-mGPT 2.0 draws pictures of multiples of {GRID_STEP} pixels")
    tokens = token_ids(ids, TOKENS, path)
    names = [f"<reserved{8800 + side // GRID_STEP:05d}>" for side in size]
    if any(name not in ids for name in names):
        raise ConfigError(f"image_size={size}: the model's vocabulary has no tokens for sides of that length")
    height, width = size
    grid = [tokens["boi"], *(ids[name] for name in names)]
    image = list(range(FIRST_IMAGE_ID, FIRST_IMAGE_ID + vq.codes))
    layout = TokenLayout.raster(height // vq.factor, width // vq.factor, image_vocab=vq.codes, suffix=[vq.codes + 1])
    question = QUESTION.format(width=width, height=height)
    structure = [tokens["eol"], tokens["eoi"]]
    return Picture(image, structure, _begin(folder, ids), [tokens["turn"], *grid], grid, question, layout)


def _open_vq(folder: Path, allow_pickle: bool) -> Checkpoint:
    for file in VQ_FILES:
        if (folder / file).is_file():
            return Checkpoint(folder / file, allow_pickle)
    raise CheckpointError(
        f"{folder / VQ_FILES[1]} is missing, which turns tokens into pictures: put that file of ai-forever/MoVQGAN "
        f"there (and say allow_pickle=True), or {VQ_FILES[0]} with its tensors"
    )


def _open(folder: Path, options: LoadOptions) -> tuple[ModelFacts, Picture, TokenRows, Any, dict[str, Any]]:
    path = folder / "config.json"
    config = read_json(path)
    with torch.device("meta"):
        vq = MoVQ(config.get("movq_config") or {})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.get_vocab()
    picture = picture_of(folder, {**ids, **(config.get("vocabulary_map") or {})}, options.size(SIZE), vq)
    sizes = transformer_config(config, path, qk_norm="layer", post_norm=bool(config.get("swin_norm")))
    reach = max(sizes.max_position_embeddings, len(picture.layout) + PROMPT_ROOM)
    rows = TokenRows(int(config.get("vocab_size", 0)), picture.image, picture.structure)
    noise = read_noise(folder)
    facts = ModelFacts(
        "lumina-mgpt-2", replace(sizes, max_position_embeddings=reach), len(rows.ids), rows.images,
        options.size(SIZE), picture.layout, tuned_defaults(DEFAULTS, noise), USUAL_PROMPT,
        sum(parameter.numel() for parameter in vq.parameters()), noise,
    )  # fmt: skip
    return facts, picture, rows, tokenizer, config


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """What a folder of this family holds; CheckpointError names what is missing or does not fit."""
    Checkpoint(folder, options.allow_pickle)
    _open_vq(folder, options.allow_pickle)
    return _open(folder, options)[0]


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Lumina2Model:
    """Load a folder of this family; raises CheckpointError and, for impossible picture sizes, ConfigError."""
    facts, picture, rows, tokenizer, config = _open(folder, options)
    checkpoint, pixels = Checkpoint(folder, options.allow_pickle), _open_vq(folder, options.allow_pickle)
    sources = chameleon_sources(facts.transformer, checkpoint, rows, bool(config.get("tie_word_embeddings")))
    vq: Any = load_module(lambda: MoVQ(config.get("movq_config") or {}), pixels, "", device)
    transformer = load_transformer(
        checkpoint, facts.transformer, facts.vocabulary, facts.image_vocabulary, sources,
        options.core_device(device), dtype, ignore=("model.vqmodel.",),
    )  # fmt: skip
    model = Lumina2Model(name, transformer, facts, picture, rows, tokenizer, vq)
    model.load_encoder = lambda: load_encoder(lambda: MoVQEncoder(config.get("movq_config") or {}), pixels, "", device)
    return model
