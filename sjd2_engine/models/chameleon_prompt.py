"""Prompts and token layouts of Chameleon, Anole and Lumina-mGPT, by the names of their tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..layout import TokenLayout
from .family import LoadOptions

LUMINA = ("ChameleonXLLMXForConditionalGeneration", "lumina-mgpt")
LUMINA_SIZE = 768
GRID_STEP = 32  # Lumina-mGPT says its pictures' sides in these
LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of Lumina-mGPT, whose pictures have their size in front and a token per row."""
    return any(name in LUMINA for name in [config.get("sjd2_family"), *(config.get("architectures") or [])])


@dataclass(frozen=True)
class Picture:
    """Ids of a picture's tokens in the tokenizer's numbering, and the sequence they stand in.

    image       image ids by code
    structure   ids of the layout's forced tokens, in the order of their local ids
    begin       id in front of every prompt with text
    before      ids between the prompt's text and the picture's first token
    alone       the unconditional prompt
    question    text of the prompt, with {text} for the user's
    """

    image: list[int]
    structure: list[int]
    begin: int
    before: list[int]
    alone: list[int]
    question: str
    layout: TokenLayout


def _id(ids: Mapping[str, int], name: str, path: Path) -> int:
    if name not in ids:
        raise CheckpointError(f"{path}: the vocabulary has no token {name!r}, which pictures of this family need")
    return ids[name]


def image_ids(ids: Mapping[str, int], path: Path) -> list[int]:
    """Image ids in the order of their codes, which their names spell in letters: IMGIMGBAZ is code 10."""
    codes = {int(name[6:-1].translate(LETTERS)): i for name, i in ids.items() if name.startswith("IMGIMG")}
    if not codes or sorted(codes) != list(range(len(codes))):
        raise CheckpointError(
            f"{path}: the vocabulary names {len(codes)} image tokens (IMGIMG…), expected one for every code from 0 on"
        )
    return [codes[code] for code in range(len(codes))]


def layout_for(height: int, width: int, codes: int, factor: int, lumina: bool) -> TokenLayout:
    """Positions of a picture of that many pixels: Lumina-mGPT ends every row, both end the picture."""
    rows, columns = height // factor, width // factor
    if lumina:  # local ids: end of line, end of picture, end of turn
        return TokenLayout.raster(rows, columns, image_vocab=codes, suffix=[codes + 1, codes + 2])
    return TokenLayout.raster(rows, columns, image_vocab=codes, eol=False, suffix=[codes])


def picture_of(ids: Mapping[str, int], path: Path, size: tuple[int, int], factor: int, lumina: bool) -> Picture:
    """Everything that surrounds the image tokens of a picture of that (height, width) in pixels.

    ids: the vocabulary by name, from `path`. CheckpointError names a token that it lacks.
    """
    image = image_ids(ids, path)
    begin, start, end, turn = (_id(ids, name, path) for name in ("<s>", "<racm3:break>", "<eoss>", "<reserved08706>"))
    layout = layout_for(*size, len(image), factor, lumina)
    if not lumina:
        return Picture(image, [end], begin, [turn, start], [begin, start], "{text}", layout)
    height, width = size
    names = [f"<reserved{8800 + side // GRID_STEP:05d}>" for side in size]
    if any(name not in ids for name in names):
        raise ConfigError(f"image_size={size}: the model's vocabulary has no tokens for sides of that length")
    grid = [start, *(ids[name] for name in names)]
    question = f"Generate an image of {width}x{height} according to the following prompt:\n{{text}}"
    structure = [_id(ids, "<reserved08799>", path), end, turn]
    return Picture(image, structure, begin, [turn, *grid], grid, question, layout)


def picture_size(options: LoadOptions, vq_config: dict[str, Any], folder: Path, lumina: bool) -> tuple[int, int]:
    """(height, width) in pixels as asked for or as released; ConfigError for sizes the model cannot draw."""
    if not lumina:
        side = vq_config.get("resolution", 512)
        size = options.size((side, side))
        if size != (side, side):
            raise ConfigError(f"image_size={options.image_size}: this model draws pictures of {side}x{side} pixels")
        return size
    # The releases differ by the size they were trained for, and only their names tell it.
    named = re.search(r"Lumina-mGPT-\d+B-(\d+)", str(folder.absolute()))
    side = int(named[1]) if named else LUMINA_SIZE
    size = options.size((side, side))
    if any(side % GRID_STEP for side in size):
        raise ConfigError(f"image_size={options.image_size}: Lumina-mGPT draws pictures of multiples of 32 pixels")
    return size
