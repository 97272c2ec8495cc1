"""LlamaGen: pictures of a class or of a caption, rotary positions on the picture's grid (arXiv 2406.06525).

The releases are bare .pt files, of which `python -m sjd2_engine.models.llamagen_convert` makes a folder. One with the
files as model.pt and vq.pt beside such a config.json is read too, if the user allows pickles.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, PromptError
from ..layout import TokenLayout
from ..transformer import Transformer
from .family import ImageModel, LoadOptions, ModelFacts, read_noise, tuned_defaults
from .llamagen_core import LlamaGenConfig, grid_rope, llamagen_sources, read_config
from .llamagen_text import CaptionEmbedder, TextEncoder, encoder_size
from .llamagen_vq import LlamaGenEncoder, LlamaGenVQ
from .weights import Checkpoint, load_encoder, load_module, load_transformer

USUAL_CAPTION = 32  # tokens, for estimates of memory
NOT_CORE = ("cls_embedding.", "freqs_cis")

_WINDOWS: Mapping[str, Any] = {"decoder": "jacobi", "window": 16, "sjd2": {"window": 32}}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "t2i": {**_WINDOWS, "guidance_scale": 7.5, "top_k": 1000},
    "c2i": {**_WINDOWS, "guidance_scale": 4.0, "top_k": 2000},
}


class LlamaGenModel(ImageModel):
    """A loaded model of the family; `caption` and `encoder` are None where pictures are of classes."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        facts: ModelFacts,
        config: LlamaGenConfig,
        vq: LlamaGenVQ,
        caption: CaptionEmbedder | None,
        encoder: TextEncoder | None,
    ) -> None:
        super().__init__(name, transformer, facts)
        self.config, self.vq, self.caption, self.encoder = config, vq, caption, encoder
        self.prompt_kind = "class" if config.kind == "c2i" else "text"

    def encode_prompt(self, text: str) -> list[int]:
        if self.encoder is not None:
            return self.encoder.ids(text)
        wanted, classes = text.strip().lower(), self.config.classes
        if not wanted:
            return [self.config.codes + classes]
        found = int(wanted) if wanted.isdecimal() else self.config.labels.get(wanted, -1)
        if not 0 <= found < classes:
            named = " or a name of config.json's id2label" if self.config.labels else ""
            raise PromptError(
                f"prompt {text!r}: this model draws classes; give a number from 0 to {classes - 1}{named}"
            )
        return [self.config.codes + found]

    def prompt_embeds(self, text: str) -> Tensor:
        ids = self.encode_prompt(text)
        return self.rows(ids) if self.encoder is None else self._projected(self.encoder.features(ids))

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        if self.caption is None or negative_prompt.strip():
            return self.prompt_embeds(negative_prompt)
        # As many entries of the learned empty caption as the prompt has: both end where the picture begins.
        return self._projected(self.caption.uncond_embedding[-len(self.encode_prompt(text)) :])

    def position_offset(self, length: int) -> int:
        return self.config.prefix - length

    def _projected(self, features: Tensor) -> Tensor:
        assert self.caption is not None
        return self.caption(features).to(self.transformer.embedding.dtype)

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        codes = tokens.view(-1, self.config.grid, self.config.grid).to(self.vq.post_quant_conv.weight.device)
        pixels = self.vq.decode(codes).clamp(-1.0, 1.0).add(1.0).mul(127.5).add(0.5)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def open_weights(path: Path, allow_pickle: bool) -> Checkpoint:
    """A folder's or file's tensors; the releases' pickles may hold their training arguments too, mere data."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return Checkpoint(path, allow_pickle)


def _vq_weights(folder: Path, allow_pickle: bool) -> Checkpoint:
    for name in ("vq.safetensors", "vq.pt"):
        if (folder / name).is_file():
            return open_weights(folder / name, allow_pickle)
    raise CheckpointError(
        f"{folder / 'vq.safetensors'} is missing: convert the release's vq_ds16_t2i.pt or vq_ds16_c2i.pt together with "
        "the weights, by python -m sjd2_engine.models.llamagen_convert"
    )


def _facts(folder: Path, config: LlamaGenConfig, options: LoadOptions) -> ModelFacts:
    own = (config.image_size, config.image_size)
    if options.size(own) != own:
        raise ConfigError(
            f"image_size={options.image_size}: these weights were trained for pictures of {own[0]}x{own[1]} pixels"
        )
    with torch.device("meta"):
        beside: list[nn.Module] = [LlamaGenVQ(config.vq)]
        if config.kind == "t2i":
            beside.append(_caption_embedder(config))
    numbers = sum(parameter.numel() for module in beside for parameter in module.parameters())
    numbers += encoder_size(config.encoder) if config.kind == "t2i" else 0
    noise = read_noise(folder)
    return ModelFacts(
        "llamagen", config.sizes, config.rows, config.codes, own,
        TokenLayout.raster(config.grid, config.grid, image_vocab=config.codes, eol=False),
        tuned_defaults(DEFAULTS[config.kind], noise), USUAL_CAPTION if config.kind == "t2i" else 1, numbers, noise,
    )  # fmt: skip


def _caption_embedder(config: LlamaGenConfig) -> CaptionEmbedder:
    return CaptionEmbedder(config.caption_dim, config.sizes.hidden_size, config.prefix)


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """What a folder of this family holds; CheckpointError names what is missing or does not fit."""
    open_weights(folder, options.allow_pickle)
    _vq_weights(folder, options.allow_pickle)
    return _facts(folder, read_config(folder), options)


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> LlamaGenModel:
    """Load a folder of this family; raises CheckpointError and, for other picture sizes, ConfigError."""
    config = read_config(folder)
    facts = _facts(folder, config, options)
    checkpoint = open_weights(folder, options.allow_pickle)
    pixels = _vq_weights(folder, options.allow_pickle)
    vq = load_module(lambda: LlamaGenVQ(config.vq), pixels, "", device)
    caption = encoder = None
    if config.kind == "t2i":
        caption = load_module(lambda: _caption_embedder(config), checkpoint, "cls_embedding.", device)
        encoder = TextEncoder(config.encoder, options.core_device(device), config.prefix, options.allow_pickle)
    transformer = load_transformer(
        checkpoint, config.sizes, facts.vocabulary, config.codes, llamagen_sources(config),
        options.core_device(device), dtype, NOT_CORE,
    )  # fmt: skip
    sizes = config.sizes
    table = grid_rope(config.grid, sizes.head_dim, sizes.rope_theta, config.prefix, sizes.max_position_embeddings)
    transformer.set_rope(*(part.to(device) for part in table))
    model = LlamaGenModel(name, transformer, facts, config, vq, caption, encoder)
    model.load_encoder = lambda: load_encoder(lambda: LlamaGenEncoder(config.vq), pixels, "", device)
    return model
