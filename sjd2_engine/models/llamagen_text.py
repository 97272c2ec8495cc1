"""Captions of LlamaGen: cleaned text, features of a T5 encoder, and their way into the decoder's width."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, PromptError
from .weights import read_json

# What the model's training did to captions, as far as it concerns prompts that people write; in this order.
CLEANING = (
    (r"<person>", "person"),
    (r"https?://[^\s:,]+|www\.[^\s:,]+|@\w+", ""),
    (r"[\u31c0-\u9fff]+", ""),
    (r"[\u2010-\u2015\u2212\u301c\uff0d]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"#\d{1,3}\b|#?\b\d{6,}\b", ""),
    (r"\S+\.(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}|[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+|\s+\.\s+", " "),
)
MANY_HYPHENS = 3  # where there are more, they stand for spaces
CLEANING_AFTER = (
    (r"\b\d+\.?\d*[x×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,.])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]|['_,\-:+]$", ""),
)


def clean(text: str) -> str:
    """A caption as the model was trained on them: lower case, plain punctuation, single spaces."""
    text = html.unescape(unquote_plus(text)).strip().lower()
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    if len(re.findall("[-_]", text)) > MANY_HYPHENS:
        text = re.sub("[-_]", " ", text)
    for pattern, replacement in CLEANING_AFTER:
        text = re.sub(pattern, replacement, text.strip())
    return text.strip()


class CaptionEmbedder(nn.Module):
    """Text features [n, features] -> embeddings [n, width]; parameters are named as in the checkpoints."""

    def __init__(self, features: int, width: int, tokens: int) -> None:
        super().__init__()
        self.uncond_embedding = nn.Parameter(torch.empty(tokens, features))
        layers = {"fc1": nn.Linear(features, width, bias=False), "fc2": nn.Linear(width, width, bias=False)}
        self.cap_proj = nn.ModuleDict(layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](features), approximate="tanh"))


def _transformers(place: Path | str) -> Any:
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f"the text encoder {place} needs: pip install 'sjd2-engine[hf]'") from None
    return transformers


def encoder_size(place: Path | str) -> int:
    """Numbers in the T5 encoder of a folder or hub id, by its config.json."""
    library = _transformers(place)
    if Path(place).is_dir():
        read_json(Path(place) / "config.json")  # where there is none, the library may guess one by the folder's name
    try:
        config = library.AutoConfig.from_pretrained(place)
        with torch.device("meta"):
            encoder = library.T5EncoderModel(config)
    except Exception as error:
        raise _unusable(place, error) from error
    # Some versions tie the two names of the input table only when they load weights.
    parts = encoder.named_parameters()
    return sum(parameter.numel() for name, parameter in parts if name != "encoder.embed_tokens.weight")


def _unusable(place: Path | str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the text encoder {place} cannot be read ({error}); put the files of google/flan-t5-xl into the folder t5 "
        "beside the weights, or say where they are by 'text_encoder' in config.json"
    )


class TextEncoder:
    """A T5 encoder and its tokenizer from a folder or hub id; float32, as 16 bits change its features.

    On the meta device it is the tokenizer alone.
    """

    def __init__(self, place: Path | str, device: torch.device, limit: int, allow_pickle: bool) -> None:
        library = _transformers(place)
        self.limit, self.device = limit, device
        self.encoder: Any = None
        try:
            self.tokenizer = library.AutoTokenizer.from_pretrained(place)
            if device.type == "meta":
                return
            encoder = library.T5EncoderModel.from_pretrained(
                place, dtype=torch.float32, use_safetensors=None if allow_pickle else True
            )
        except Exception as error:  # the library has dozens, all of them mean: not usable
            raise _unusable(place, error) from error
        self.encoder = encoder.to(device).eval().requires_grad_(False)

    def ids(self, text: str) -> list[int]:
        """Token ids of the cleaned text, the end mark included; PromptError where there are too many."""
        ids = self.tokenizer(clean(text)).input_ids
        if len(ids) > self.limit:
            raise PromptError(f"the prompt has {len(ids)} tokens, the model reads at most {self.limit}; shorten it")
        return ids

    def features(self, ids: list[int]) -> Tensor:
        """Features float32 [n, width] of n ids."""
        with torch.inference_mode():
            return self.encoder(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state[0]
