"""Chameleon, Anole and Lumina-mGPT: one vocabulary for text and pictures, norms on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..transformer import Transformer, TransformerConfig
from .chameleon_prompt import Picture, is_lumina, picture_of, picture_size
from .chameleon_vq import ChameleonEncoder, ChameleonVQ
from .family import ImageModel, LoadOptions, ModelFacts, read_noise, tuned_defaults
from .llama import llama_sources, transformer_config
from .tokenizer import load_tokenizer
from .weights import Checkpoint, Rows, Sources, TokenRows, load_encoder, load_module, load_transformer, read_json

USUAL_PROMPT = 96  # tokens, for estimates of memory
PROMPT_ROOM = 1024  # positions for the prompt and the last window, where config.json has fewer than a picture needs
# Where a checkpoint without a picture decoder may have one, in the folder itself.
VQ_FILES = ("vqgan.safetensors", "vqgan.ckpt")

_WINDOWS: Mapping[str, Any] = {"decoder": "jacobi", "window": 16, "sjd2": {"window": 32}}
DEFAULTS: Mapping[str, Any] = {**_WINDOWS, "guidance_scale": 3.0, "temperature": 0.7, "top_p": 0.9}
LUMINA_DEFAULTS: Mapping[str, Any] = {**_WINDOWS, "guidance_scale": 3.0, "top_k": 2000}


class ChameleonModel(ImageModel):
    """A loaded model of the family; `rows` maps the tokenizer's ids to rows of the input table."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        facts: ModelFacts,
        picture: Picture,
        rows: TokenRows,
        tokenizer: Any,
        vq: ChameleonVQ,
    ) -> None:
        super().__init__(name, transformer, facts)
        self.picture, self.token_rows, self.tokenizer, self.vq = picture, rows, tokenizer, vq

    def encode_prompt(self, text: str) -> list[int]:
        # By hand instead of by the tokenizer's own template, which differs between releases.
        ids = self.tokenizer.encode(self.picture.question.format(text=text), add_special_tokens=False).ids
        return self.token_rows([self.picture.begin, *ids, *self.picture.before])

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        if negative_prompt.strip():
            return self.prompt_embeds(negative_prompt)
        return self.rows(self.token_rows(self.picture.alone))

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        height, width = (side // self.vq.factor for side in self.facts.image_size)
        codes = tokens.view(-1, height, width).to(self.vq.post_quant_conv.weight.device)
        pixels = self.vq.decode(codes).clamp(-1.0, 1.0).add(1.0).mul(127.5)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)  # rounded down, as the models were published


def _find_vq(folder: Path, checkpoint: Checkpoint, allow_pickle: bool) -> tuple[Checkpoint, str]:
    """The checkpoint that holds the picture decoder, and what its names begin with."""
    for prefix in ("model.vqmodel.", "vqmodel."):
        if prefix + "decoder.conv_in.weight" in checkpoint:
            return checkpoint, prefix
    for file in VQ_FILES:
        if (folder / file).is_file():
            return Checkpoint(folder / file, allow_pickle), ""
    raise CheckpointError(
        f"{folder} has no picture decoder: the weights hold none (model.vqmodel.decoder.…) and there is no "
        f"{VQ_FILES[0]} or {VQ_FILES[1]} in the folder. Put the vqgan.ckpt of Meta's Chameleon release there (and say "
        "allow_pickle=True), or a safetensors file of its tensors"
    )


@dataclass(frozen=True)
class _Opened:
    """A folder whose files were looked at and not read."""

    facts: ModelFacts
    picture: Picture
    rows: TokenRows
    tokenizer: Any
    checkpoint: Checkpoint
    vq: tuple[Checkpoint, str]
    vq_config: dict[str, Any]
    tied: bool


def _open(folder: Path, options: LoadOptions) -> _Opened:
    path = folder / "config.json"
    config = read_json(path)
    lumina = is_lumina(config)
    checkpoint = Checkpoint(folder, options.allow_pickle)
    vq_config = config.get("vq_config") or {}
    with torch.device("meta"):
        vq = ChameleonVQ(vq_config)
    size = picture_size(options, vq_config, folder, lumina)
    tokenizer = load_tokenizer(folder)
    picture = picture_of(config.get("vocabulary_map") or tokenizer.get_vocab(), path, size, vq.factor, lumina)
    if len(picture.image) != vq.codes:
        raise CheckpointError(f"{path}: {len(picture.image)} image tokens and a picture codebook of {vq.codes}")
    knobs = {"qk_norm": "layer", "post_norm": bool(config.get("swin_norm"))}
    sizes = transformer_config(config, path, **knobs)
    # Rotary positions go on behind what config.json says, and large pictures of Lumina-mGPT need that.
    reach = max(sizes.max_position_embeddings, len(picture.layout) + PROMPT_ROOM)
    sizes = replace(sizes, max_position_embeddings=reach)
    rows = TokenRows(int(config.get("vocab_size", 0)), picture.image, picture.structure)
    noise = read_noise(folder)
    facts = ModelFacts(
        "lumina-mgpt" if lumina else "chameleon", sizes, len(rows.ids), rows.images, size, picture.layout,
        tuned_defaults(LUMINA_DEFAULTS if lumina else DEFAULTS, noise), USUAL_PROMPT,
        sum(parameter.numel() for parameter in vq.parameters()), noise,
    )  # fmt: skip
    place = _find_vq(folder, checkpoint, options.allow_pickle)
    tied = bool(config.get("tie_word_embeddings"))
    return _Opened(facts, picture, rows, tokenizer, checkpoint, place, vq_config, tied)


def _per_head(checkpoint: Checkpoint, name: str, heads: int) -> Rows:
    """A norm's weights, which some releases store once per device that trained them."""
    stored = checkpoint.shape(name)[0]
    if heads % stored:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: {name!r} has {stored} rows, expected a divisor of {heads} heads"
        )
    return Rows(name, torch.arange(stored).repeat_interleave(heads // stored))


def chameleon_sources(sizes: TransformerConfig, checkpoint: Checkpoint, rows: TokenRows, tied: bool) -> Sources:
    """Where the core's parameters lie in a checkpoint of this family; the first rows of `rows` are image ids."""
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    sources = llama_sources(sizes, embedding=rows.ids, head=head, image_rows=rows.ids[: rows.images])
    for i in range(sizes.num_hidden_layers):
        for kind in ("weight", "bias"):
            sources[f"blocks.{i}.qk_{kind}"] = [
                _per_head(checkpoint, f"model.layers.{i}.self_attn.{part}_norm.{kind}", heads)
                for part, heads in (("q", sizes.num_attention_heads), ("k", sizes.num_key_value_heads))
            ]
    return sources


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """What a folder of this family holds; CheckpointError names what is missing or does not fit."""
    return _open(folder, options).facts


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> ChameleonModel:
    """Load a folder of this family; raises CheckpointError and, for impossible picture sizes, ConfigError."""
    opened = _open(folder, options)
    facts = opened.facts
    sources = chameleon_sources(facts.transformer, opened.checkpoint, opened.rows, opened.tied)
    vq = load_module(lambda: ChameleonVQ(opened.vq_config), *opened.vq, device)
    transformer = load_transformer(
        opened.checkpoint, facts.transformer, facts.vocabulary, facts.image_vocabulary, sources,
        options.core_device(device), dtype, ignore=("model.vqmodel.", "vqmodel."),
    )  # fmt: skip
    model = ChameleonModel(name, transformer, facts, opened.picture, opened.rows, opened.tokenizer, vq)
    model.load_encoder = lambda: load_encoder(lambda: ChameleonEncoder(opened.vq_config), *opened.vq, device)
    return model
