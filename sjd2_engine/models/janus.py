"""Janus and Janus-Pro: image tokens with inputs and an output head of their own, pictures of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from ..transformer import Transformer
from .family import ImageModel, LoadOptions, ModelFacts, read_noise, tuned_defaults
from .janus_vq import encode_picture, image_table, load_encoder, load_vq, pixel_parameters, renamed
from .llama import llama_sources, transformer_config
from .releases import Renamed, sizes_of, token_ids
from .tokenizer import load_tokenizer
from .weights import Checkpoint, Rows, load_transformer, read_json

USUAL_PROMPT = 64  # tokens, for estimates of memory

# What config.json leaves out is as in Llama and in the first release.
LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
VQ: Mapping[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "base_channels": 128, "out_channels": 3,
    "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "projection_dim": 2048, "num_hidden_layers": 2,
    "hidden_act": "gelu", "image_token_embed_dim": 2048,
}  # fmt: skip
TOKENS = {"bos": "<｜begin▁of▁sentence｜>", "pad": "<｜▁pad▁｜>", "boi": "<begin_of_image>"}
USER = "<|User|>"  # a token of Janus-Pro; the first release spells the roles out
DEFAULTS: Mapping[str, Any] = {"decoder": "jacobi", "window": 16, "sjd2": {"window": 32}, "guidance_scale": 5.0}


class JanusModel(ImageModel):
    """A loaded model of the family; rows of the input table are image tokens, then the tokenizer's ids."""

    def __init__(
        self, name: str, transformer: Transformer, facts: ModelFacts, tokens: dict[str, int], tokenizer: Any, vq: Any
    ) -> None:
        super().__init__(name, transformer, facts)
        self.tokens, self.tokenizer, self.vq = tokens, tokenizer, vq
        pro = USER in tokenizer.get_vocab()
        self._question = "<|User|>: {}\n\n<|Assistant|>:" if pro else "User: {}\n\nAssistant:"

    def _rows_of(self, ids: list[int]) -> list[int]:
        if max(ids) >= self.facts.vocabulary - self.facts.image_vocabulary:
            raise CheckpointError(
                f"the tokenizer gives id {max(ids)}, the model has fewer words: tokenizer and weights are of "
                "different models"
            )
        return [self.facts.image_vocabulary + i for i in ids]

    def encode_prompt(self, text: str) -> list[int]:
        # By hand instead of by the tokenizer's own template, which differs between releases.
        ids = self.tokenizer.encode(self._question.format(text.strip()), add_special_tokens=False).ids
        return self._rows_of([self.tokens["bos"], *ids, self.tokens["boi"]])

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        if negative_prompt.strip():
            return self.prompt_embeds(negative_prompt)
        # As the model was trained: the prompt with every word blanked out, and the blanks attended to.
        begin, *words, start = self.encode_prompt(text)
        return self.rows([begin, *self._rows_of([self.tokens["pad"]]) * len(words), start])

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        pixels = self.vq.decode(tokens.to(self.vq.quantize.embedding.weight.device))
        pixels = pixels.clamp(-1.0, 1.0).add(1.0).mul(127.5)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)  # rounded down, as the models were published


@dataclass(frozen=True)
class _Opened:
    """A folder whose files were looked at and not read."""

    facts: ModelFacts
    tokens: dict[str, int]
    tokenizer: Any
    checkpoint: Checkpoint
    vq: dict[str, Any]


def _configs(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Sizes of the decoder and of the parts for pictures, by transformers' names, and the side of the token grid."""
    if config.get("model_type") != "multi_modality":
        text, vq, vision = (config.get(f"{name}_config") or {} for name in ("text", "vq", "vision"))
    elif "gen_aligner_config" not in config:
        raise CheckpointError(f"{path} is of a JanusFlow model, which draws without tokens: only Janus can be decoded")
    else:
        text, vq, vision = _authors_configs(config)
    text = {**text, **sizes_of(text, LLAMA, path)}
    eye = sizes_of(vision, {"image_size": 384, "patch_size": 16}, path)
    return text, sizes_of(vq, VQ, path), eye["image_size"] // eye["patch_size"]


def _authors_configs(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sizes of the decoder, the parts for pictures and the encoder, from config.json of an authors' release."""
    names = ("gen_vision", "gen_aligner", "gen_head", "vision")
    pixels, aligner, head, vision = ((config.get(f"{name}_config") or {}).get("params") or {} for name in names)
    vq = {
        **pixels,
        "embed_dim": pixels.get("n_embed"),
        "num_embeddings": pixels.get("image_token_size"),
        "projection_dim": aligner.get("n_embed"),
        "num_hidden_layers": aligner.get("depth"),
        "image_token_embed_dim": head.get("image_token_embed"),
    }
    return config.get("language_config") or {}, vq, vision


def _open(folder: Path, options: LoadOptions) -> _Opened:
    path = folder / "config.json"
    config = read_json(path)
    text, vq, grid = _configs(config, path)
    if vq["hidden_act"] != "gelu":
        raise CheckpointError(f"{path} asks for {vq['hidden_act']!r} in the output head: only 'gelu' is known")
    checkpoint = Renamed(folder, renamed, options.allow_pickle)
    tokenizer = load_tokenizer(folder)
    tokens = token_ids(tokenizer.get_vocab(), TOKENS, path)
    side = grid * 2 ** (len(vq["channel_multiplier"]) - 1)
    if options.size((side, side)) != (side, side):
        raise ConfigError(f"image_size={options.image_size}: Janus draws pictures of {side}x{side} pixels")
    codes = vq["num_embeddings"]
    layout = TokenLayout.raster(grid, grid, image_vocab=codes, eol=False)
    noise = read_noise(folder)
    facts = ModelFacts(
        "janus", transformer_config(text, path, head_hidden=vq["projection_dim"]), codes + text["vocab_size"],
        codes, (side, side), layout, tuned_defaults(DEFAULTS, noise), USUAL_PROMPT, pixel_parameters(checkpoint), noise,
    )  # fmt: skip
    # The decoder that transformers builds wants to know the grid.
    return _Opened(facts, tokens, tokenizer, checkpoint, {**vq, "num_patches": grid})


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """What a folder of this family holds; CheckpointError names what is missing or does not fit."""
    return _open(folder, options).facts


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> JanusModel:
    """Load a folder of this family; raises CheckpointError and, for impossible picture sizes, ConfigError."""
    opened = _open(folder, options)
    facts, checkpoint = opened.facts, opened.checkpoint
    table = image_table(checkpoint, opened.vq, device)
    sources = llama_sources(facts.transformer, "model.language_model.", head=None)
    sources["embedding"] = [table, Rows("model.language_model.embed_tokens.weight")]
    for layer, part in (("0", "proj_out"), ("2", "vision_head")):
        for kind in ("weight", "bias"):
            sources[f"head.{layer}.{kind}"] = [Rows(f"model.generation_head.{part}.{kind}")]
    vq = load_vq(checkpoint, opened.vq, device)
    transformer = load_transformer(
        checkpoint, facts.transformer, facts.vocabulary, facts.image_vocabulary, sources,
        options.core_device(device), dtype,
        ignore=("model.vision_model.", "model.aligner.", "model.vqmodel.", "model.generation_", "lm_head."),
    )  # fmt: skip
    model = JanusModel(name, transformer, facts, opened.tokens, opened.tokenizer, vq)
    model.load_encoder = lambda: partial(encode_picture, load_encoder(checkpoint, opened.vq, device))
    return model
