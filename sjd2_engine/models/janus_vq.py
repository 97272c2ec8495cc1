"""Parts of Janus beside its decoder: the inputs of image tokens, transformers' picture tokenizer, and the names of
both in the authors' releases."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .llamagen_vq import nearest_direction
from .weights import Checkpoint, load_module, require_encoder

# Tensors of the authors' releases by transformers' names, in this order.
TENSORS = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_model|aligner)\.", r"model.\1."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^(model\.vqmodel\.decoder)\.conv_blocks\.", r"\1.up."),
    (r"^(model\.vqmodel\.encoder)\.conv_blocks\.", r"\1.down."),
    (r"^(model\.vqmodel\.(?:decoder\.up|encoder\.down)\.\d+)\.res\.", r"\1.block."),
    (r"^(model\.vqmodel\.(?:de|en)coder\.mid)\.0\.", r"\1.block_1."),
    (r"^(model\.vqmodel\.(?:de|en)coder\.mid)\.1\.", r"\1.attn_1."),
    (r"^(model\.vqmodel\.(?:de|en)coder\.mid)\.2\.", r"\1.block_2."),
)
PIXELS = "model.vqmodel."


def renamed(name: str) -> str:
    """transformers' name of a tensor in the authors' releases."""
    layer = re.match(r"gen_aligner\.layers\.([1-9]\d*)\.(\w+)$", name)
    if layer:  # every other layer is an activation
        return f"model.generation_aligner.hidden_layers.{int(layer[1]) // 2 - 1}.{layer[2]}"
    for pattern, new in TENSORS:
        name = re.sub(pattern, new, name)
    return name


class ImageInputs(nn.Module):
    """What the decoder reads for every image token: a small embedding, and layers that widen it to the model's."""

    def __init__(self, vq: dict[str, Any]) -> None:
        super().__init__()
        width = vq["projection_dim"]
        self.generation_embeddings = nn.Embedding(vq["num_embeddings"], vq["embed_dim"])
        first = nn.Linear(vq["embed_dim"], width)
        others = nn.ModuleList(nn.Linear(width, width) for _ in range(vq["num_hidden_layers"] - 1))
        self.generation_aligner = nn.ModuleDict({"fc1": first, "hidden_layers": others})

    def forward(self) -> Tensor:
        """All of them, float32 [V, D]."""
        x = self.generation_aligner["fc1"](self.generation_embeddings.weight)
        for layer in self.generation_aligner["hidden_layers"].children():
            x = layer(F.gelu(x))
        return x


def image_table(checkpoint: Checkpoint, vq: dict[str, Any], device: torch.device) -> Tensor:
    """Inputs of all image tokens, float32 [V, D]: constants of the weights, hence computed once."""
    with torch.inference_mode():
        return load_module(lambda: ImageInputs(vq), checkpoint, "model.", device)()


def pixel_parameters(checkpoint: Checkpoint) -> int:
    """Numbers that picture decoding needs."""
    return sum(checkpoint.size(PIXELS + part) for part in ("decoder.", "post_quant_conv.", "quantize.embedding."))


DECODING, ENCODING = ("decoder", "post_quant_conv"), ("encoder", "quant_conv")


def load_vq(checkpoint: Checkpoint, vq: dict[str, Any], device: torch.device) -> Any:
    """transformers' JanusVQVAE without its encoder, in float32; raises CheckpointError."""
    return _load(checkpoint, vq, device, without=ENCODING)


def load_encoder(checkpoint: Checkpoint, vq: dict[str, Any], device: torch.device) -> Any:
    """transformers' JanusVQVAE without its decoder, in float32; raises CheckpointError."""
    require_encoder(checkpoint, PIXELS)
    return _load(checkpoint, vq, device, without=DECODING)


def encode_picture(vq: Any, pixels: Tensor) -> Tensor:
    """Codes int64 [B, h, w] of pixels float32 [B, 3, h·f, w·f], -1 to 1.

    As the authors' code compares directions; the module's own `encode` leaves lengths in, which its `decode` takes out.
    """
    return nearest_direction(vq.quant_conv(vq.encoder(pixels)), vq.quantize.embedding.weight)


def _load(checkpoint: Checkpoint, vq: dict[str, Any], device: torch.device, without: tuple[str, ...]) -> Any:
    try:
        from transformers import JanusVQVAE, JanusVQVAEConfig
    except ImportError:
        raise CheckpointError("Janus's picture tokenizer needs: pip install 'sjd2-engine[hf]'") from None

    def build() -> Any:
        try:
            model = JanusVQVAE(JanusVQVAEConfig(**vq))
        except Exception as error:  # the checks of transformers and of its modules raise many kinds
            raise CheckpointError(f"{checkpoint.path}/config.json describes no picture tokenizer ({error})") from error
        for part in without:
            delattr(model, part)
        return model

    return load_module(build, checkpoint, PIXELS, device)
