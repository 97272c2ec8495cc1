"""Models with random weights at the sizes of published ones, made on the device, and sessions in mid-picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sjd2_engine import DecodeConfig, TokenLayout
from sjd2_engine.errors import PromptError
from sjd2_engine.models import ImageModel, ModelFacts
from sjd2_engine.models.chameleon import LUMINA_DEFAULTS
from sjd2_engine.models.chameleon_prompt import layout_for
from sjd2_engine.models.emu3 import DEFAULTS as EMU3_DEFAULTS
from sjd2_engine.models.emu3 import picture_layout
from sjd2_engine.models.janus import DEFAULTS as JANUS_DEFAULTS
from sjd2_engine.slots import Inputs, Slots
from sjd2_engine.transformer import Transformer, TransformerConfig

PROMPT_ROOM = 1024  # positions for the prompt and the last window


@dataclass(frozen=True)
class Published:
    """Forward passes per picture that a paper gives, and the window whose step time a prediction takes."""

    method: str
    forwards: int
    window: int


@dataclass(frozen=True)
class FloorGoal:
    """How many times its floor a step of one picture may take; `entries`: cached per row, 0 = mid-picture."""

    window: int
    ratio: float
    entries: int = 0


@dataclass(frozen=True)
class Geometry:
    """Sizes of a published model; `vocabulary` counts the rows of the input table, `prompt` the inputs of a prompt.

    picture_goal: seconds that a picture is predicted to take at most, at the published forwards of SJD2.
    """

    name: str
    core: TransformerConfig
    vocabulary: int
    image_vocabulary: int
    layout: TokenLayout
    defaults: Mapping[str, Any]
    prompt: int
    published: tuple[Published, ...] = ()
    floor_goals: tuple[FloorGoal, ...] = ()
    picture_goal: float | None = None

    @property
    def middle(self) -> int:
        """Entries per row when half of the picture is there."""
        return self.prompt - 1 + len(self.layout) // 2

    def config(self, decoder: str, window: int) -> DecodeConfig:
        """The family's default options, with guidance; prompts come as embeddings, so no negative one is read."""
        return DecodeConfig.build(self.defaults, decoder=decoder, window=window, negative_prompt="")


def _llama(width: int, layers: int, heads: int, kv_heads: int, feed: int, positions: int, **more: Any):
    sizes: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, **more}
    return TransformerConfig(width, layers, heads, kv_heads, 128, feed, max_position_embeddings=positions, **sizes)


def _janus(name: str, width: int, layers: int, feed: int) -> Geometry:
    heads = width // 128
    core = _llama(width, layers, heads, heads, feed, 16384, rms_norm_eps=1e-6, head_hidden=width)
    layout = TokenLayout.raster(24, 24, image_vocab=16384, eol=False)
    published = Published("AR", 576, 1), Published("SJD2", 144, 32)
    return Geometry(name, core, 16384 + 102_400, 16384, layout, JANUS_DEFAULTS, 64, published)


def _lumina() -> Geometry:
    layout = layout_for(768, 768, 8192, 16, lumina=True)
    core = _llama(4096, 32, 32, 32, 11008, len(layout) + PROMPT_ROOM, qk_norm="layer")
    published = Published("AR", 2357, 1), Published("SJD", 1060, 96), Published("SJD2", 592, 96)
    goals = FloorGoal(1, 1.15), FloorGoal(96, 1.25)
    return Geometry("lumina-mgpt-7b", core, 65_536, 8192, layout, LUMINA_DEFAULTS, 96, published, goals, 4.0)


def _emu3() -> Geometry:
    layout = picture_layout((720, 720), 32_768, 8)
    core = _llama(4096, 32, 32, 8, 14336, len(layout) + PROMPT_ROOM, rope_theta=1e6)
    published = Published("AR", 8193, 1), Published("SJD", 3528, 128), Published("SJD2", 1461, 128)
    goals = (FloorGoal(128, 1.4, entries=8000),)
    return Geometry("emu3-8b", core, 184_622, 32_768, layout, EMU3_DEFAULTS, 96, published, goals)


GEOMETRIES: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        _lumina(), _emu3(), _janus("janus-pro-1b", 2048, 24, 5632), _janus("janus-pro-7b", 4096, 30, 11008),
    )
}  # fmt: skip


def tiny(geometry: Geometry) -> Geometry:
    """The same shape of model in sizes that a CPU runs at once: norms, grouped heads and head kind stay."""
    kv_heads = 2 if geometry.core.num_key_value_heads < geometry.core.num_attention_heads else 4
    core = replace(
        geometry.core, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        head_dim=16, intermediate_size=96, max_position_embeddings=160,
        head_hidden=48 if geometry.core.head_hidden else 0,
    )  # fmt: skip
    layout = TokenLayout.raster(8, 8, image_vocab=40)
    published = tuple(replace(entry, window=min(entry.window, 8)) for entry in geometry.published)
    goals = tuple(replace(g, window=min(g.window, 8), entries=min(g.entries, 60)) for g in geometry.floor_goals)
    defaults = {**geometry.defaults, "top_k": 20}
    name = f"tiny {geometry.name}"  # so that no figure is taken for one of the true size
    return Geometry(name, core, 60, 40, layout, defaults, 5, published, goals, geometry.picture_goal)


def random_transformer(geometry: Geometry, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Normal weights of deviation 0.02, drawn where they stay: gigabytes never pass through the host."""
    model = Transformer.outline(geometry.core, geometry.vocabulary, geometry.image_vocabulary)
    model.allocate(device, dtype)
    model.requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif name.endswith(("norm", "qk_weight")):
            nn.init.ones_(weight)
        else:
            weight.normal_(std=0.02, generator=generator)
    return model


class RandomModel(ImageModel):
    """Random weights behind the engine's interface. Prompts are random inputs; there is no picture tokenizer."""

    def __init__(self, geometry: Geometry, transformer: Transformer) -> None:
        side = len(geometry.layout)
        facts = ModelFacts(
            "random", geometry.core, geometry.vocabulary, geometry.image_vocabulary, (side, side), geometry.layout,
            geometry.defaults, geometry.prompt, 0,
        )  # fmt: skip
        super().__init__(geometry.name, transformer, facts)

    def encode_prompt(self, text: str) -> list[int]:
        raise PromptError("a model of random weights reads no text")

    def decode_pixels(self, tokens: Tensor) -> Tensor:
        raise PromptError("a model of random weights draws no pictures")


def random_model(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> RandomModel:
    """A geometry with random weights. Unlike an engine's on the CPU, its products are not packed."""
    return RandomModel(geometry, random_transformer(geometry, device, dtype))


@torch.inference_mode()
def mid_picture(
    geometry: Geometry, model: RandomModel, config: DecodeConfig, count: int, attention: str = "auto"
) -> Slots:
    """`count` slots, each with half a picture: random prompts, tokens and cache entries."""
    slots = Slots(model, config, count, geometry.prompt, attention)
    table = model.transformer.embedding
    generator = torch.Generator(table.device).manual_seed(1)
    for slot in range(count):
        shape = (geometry.prompt, table.shape[1])
        prompt = torch.randn(shape, generator=generator, device=table.device, dtype=torch.float32).to(table.dtype) / 50
        slots.start(slot, Inputs((prompt, prompt) if slots.guided else (prompt,), (0, 0)), seed=slot)
    for stored in (slots.cache.keys, slots.cache.values):
        for layer in stored:
            layer.normal_(generator=generator)  # nothing is timed on zeros
    slots.window.tokens.random_(0, geometry.image_vocabulary, generator=generator)
    seek(slots, geometry)
    return slots


@torch.inference_mode()
def seek(slots: Slots, geometry: Geometry, entries: int = 0) -> None:
    """Put every slot where its rows have `entries` (0: those of mid-picture): each measured step has the same work."""
    entries = entries or geometry.middle
    slots.window.lengths.fill_(entries - geometry.prompt + 1)
    slots.cache.lengths.fill_(entries)
    slots.window.rows_done.zero_()
