"""Emu3: one vocabulary for text and pictures; the prompt says the picture's size, and every row ends with a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from ..transformer import Transformer
from .emu3_tokenizer import RANKS, released_tokenizer
from .emu3_vq import VQPlace, decode_picture, encode_picture, find_vq, load_encoder, load_vq
from .family import ImageModel, LoadOptions, ModelFacts, read_noise, tuned_defaults
from .llama import llama_sources, transformer_config
from .releases import sizes_of, token_ids
from .tokenizer import FILES, load_tokenizer
from .weights import Checkpoint, TokenRows, load_transformer, read_json

SIZE = (720, 720)  # pixels; the area the model was released for
USUAL_PROMPT = 96  # tokens, for estimates of memory
PROMPT_ROOM = 1024  # positions for the prompt and the last window, where config.json has fewer than a picture needs

# transformers leaves out of config.json what is as in the released model.
RELEASED: Mapping[str, Any] = {
    "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 9216, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}  # fmt: skip
# What names of the decoder begin with, and the output matrix: in the authors' release, transformers' format and its
# first one.
PREFIXES = ("model.", "model.text_model.", "text_model.model.")
HEADS = ("lm_head.weight", "text_model.lm_head.weight")

TOKENS = {"bos": "<|extra_203|>", "boi": "<|image start|>", "image": "<|image token|>"}
STRUCTURE = {"eol": "<|extra_200|>", "eof": "<|extra_201|>", "eoi": "<|image end|>", "eos": "<|extra_204|>"}
VISUAL = "<|visual token "

# Part of the published recipe, as is the prompt that guidance leads away from.
PRAISE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
DEFAULTS: Mapping[str, Any] = {
    "decoder": "jacobi", "window": 16, "sjd2": {"window": 32}, "guidance_scale": 3.0, "top_k": 2048,
    "negative_prompt": NEGATIVE,
}  # fmt: skip


class Emu3Model(ImageModel):
    """A loaded model of the family; `token_rows` maps the tokenizer's ids to rows of the input table."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        facts: ModelFacts,
        tokens: dict[str, int],
        rows: TokenRows,
        tokenizer: Any,
        vq: Any,
        factor: int,
    ) -> None:
        super().__init__(name, transformer, facts)
        self.token_rows, self.tokenizer, self.vq = rows, tokenizer, vq
        self.height, self.width = (side // factor for side in facts.image_size)
        self._begin = [tokens["bos"]]
        self._header = [tokens["boi"], *self._ids(f"{self.height}*{self.width}"), tokens["image"]]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt(self, text: str) -> list[int]:
        return self.token_rows([*self._begin, *self._ids(text), *self._header])

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt(text + PRAISE)

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        return self.rows(self._prompt(negative_prompt))

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        codes = tokens.view(-1, self.height, self.width).to(self.vq.quantize.embedding.weight.device)
        pixels = decode_picture(self.vq, codes).clamp(-1.0, 1.0).add(1.0).mul(127.5)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)  # rounded down, as the model was published


def image_ids(vocabulary: Mapping[str, int], path: Path) -> list[int]:
    """Ids of the picture codes 0, 1, …, whose names end in their number: <|visual token 000010|>."""
    codes = {int(name[len(VISUAL) : -2]): i for name, i in vocabulary.items() if name.startswith(VISUAL)}
    if not codes or sorted(codes) != list(range(len(codes))):
        raise CheckpointError(
            f"{path}: the vocabulary names {len(codes)} image tokens ({VISUAL}…), expected one for every code from 0 on"
        )
    return [codes[code] for code in range(len(codes))]


def picture_layout(size: tuple[int, int], codes: int, factor: int) -> TokenLayout:
    """Positions of a picture of (height, width) pixels: a token behind every row, and three behind the last."""
    if any(side % factor for side in size):
        raise ConfigError(f"image_size={size}: Emu3 draws pictures of multiples of {factor} pixels")
    height, width = (side // factor for side in size)
    # Local ids in the order of STRUCTURE: end of line, of frame, of image, of sequence.
    return TokenLayout.raster(height, width, image_vocab=codes, suffix=[codes + 1, codes + 2, codes + 3])


@dataclass(frozen=True)
class _Opened:
    """A folder whose files were looked at and not read."""

    facts: ModelFacts
    tokens: dict[str, int]
    rows: TokenRows
    tokenizer: Any
    checkpoint: Checkpoint
    vq: VQPlace
    tied: bool


def _tokenizer(folder: Path) -> Any:
    has_json = any((folder / name).is_file() for name in FILES)
    return released_tokenizer(folder) if (folder / RANKS).is_file() and not has_json else load_tokenizer(folder)


def _open(folder: Path, options: LoadOptions) -> _Opened:
    path = folder / "config.json"
    config = read_json(path)
    # transformers keeps the decoder's sizes apart, the authors' release does not.
    apart = "text_config" in config or config.get("model_type") == "emu3"
    text = (config.get("text_config") or {}) if apart else config
    text = {**text, **sizes_of(text, RELEASED, path)}
    checkpoint = Checkpoint(folder, options.allow_pickle)
    vq = find_vq(folder, checkpoint, config, options.allow_pickle)
    tokenizer = _tokenizer(folder)
    vocabulary = config.get("vocabulary_map") or tokenizer.get_vocab()
    tokens = token_ids(vocabulary, {**TOKENS, **STRUCTURE}, path)
    image = image_ids(vocabulary, path)
    if len(image) != vq.codes:
        raise CheckpointError(f"{path}: {len(image)} image tokens and a picture codebook of {vq.codes}")
    size = options.size(SIZE)
    layout = picture_layout(size, len(image), vq.factor)
    sizes = transformer_config(text, path)
    # Rotary positions go on behind what config.json says, and large pictures need that.
    reach = max(sizes.max_position_embeddings, len(layout) + PROMPT_ROOM)
    sizes = replace(sizes, max_position_embeddings=reach)
    rows = TokenRows(text["vocab_size"], image, [tokens[name] for name in STRUCTURE])
    noise = read_noise(folder)
    facts = ModelFacts(
        "emu3", sizes, len(rows.ids), rows.images, size, layout, tuned_defaults(DEFAULTS, noise), USUAL_PROMPT,
        vq.parameters, noise,
    )  # fmt: skip
    return _Opened(facts, tokens, rows, tokenizer, checkpoint, vq, bool(config.get("tie_word_embeddings")))


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    """What a folder of this family holds; CheckpointError names what is missing or does not fit."""
    return _open(folder, options).facts


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Emu3Model:
    """Load a folder of this family; raises CheckpointError and, for impossible picture sizes, ConfigError."""
    opened = _open(folder, options)
    facts, rows, checkpoint = opened.facts, opened.rows, opened.checkpoint
    prefix = next((start for start in PREFIXES if start + "embed_tokens.weight" in checkpoint), PREFIXES[0])
    head = next((name for name in HEADS if name in checkpoint), HEADS[0])
    if opened.tied:
        head = prefix + "embed_tokens.weight"
    sources = llama_sources(facts.transformer, prefix, rows.ids, head, rows.ids[: rows.images])
    vq = load_vq(opened.vq, device)
    transformer = load_transformer(
        checkpoint, facts.transformer, facts.vocabulary, facts.image_vocabulary, sources,
        options.core_device(device), dtype, ignore=("model.vqmodel.", "vqmodel."),
    )  # fmt: skip
    model = Emu3Model(name, transformer, facts, opened.tokens, rows, opened.tokenizer, vq, opened.vq.factor)
    model.load_encoder = lambda: partial(encode_picture, load_encoder(opened.vq, device))
    return model
