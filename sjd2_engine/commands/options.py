"""The options that several commands share, and what they all do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

Model = Annotated[str, typer.Option(help="Bundled model (scenes, scenes-sjd2), a local folder, or a hub id.")]
Decoder = Annotated[str | None, typer.Option(help="ar, jacobi, sjd, coupled or sjd2 (default: the model's).")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")]
Seed = Annotated[int, typer.Option(help="Seed of the first prompt; prompt i uses seed + i.")]


def window_size(text: str) -> int | str:
    """ "32" -> 32, "auto" as it is."""
    if text == "auto" or text.isdigit():
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r}: expected a number, or auto")


Window = Annotated[
    Any,
    typer.Option(parser=window_size, metavar="N|auto", help="Slots per forward pass (default: the model family's)."),
]
Levels = Annotated[int | None, typer.Option(help="Denoising levels of sjd2.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")]
Verification = Annotated[str | None, typer.Option(help="sjd2: match, ratio or paper.")]
Coupling = Annotated[str | None, typer.Option(help="coupled and sjd2 ratio: gumbel, maximal or none.")]
Negative = Annotated[str | None, typer.Option(help="Prompt of the unconditional row.")]
MaxBatch = Annotated[int | None, typer.Option(help="Most images decoded together.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Specs = Annotated[str, typer.Option(help="Comma-separated; each name[@base|@sjd2][:option]…")]
ImageSize = Annotated[
    str | None, typer.Option(help="Pixels: HEIGHTxWIDTH, or one number for squares (default: the model's).")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read tensors, and nothing else, from pickled checkpoints too.")
]
Attention = Annotated[str, typer.Option(help="auto, triton, flash, sdpa or cpu (sjd2 doctor: which are there).")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the decoder's blocks through torch.compile.")]
Quantize = Annotated[str | None, typer.Option(help="Weights of the blocks in 8 bits: int8 or fp8 (torchao).")]
PromptFile = Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others are left to the model family's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; expected at least 1")


def pixels(text: str | None) -> tuple[int, int] | int | None:
    """ "512x768" -> (512, 768), "512" -> 512."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise ConfigError(f"--image-size is {text!r}; expected HEIGHTxWIDTH in pixels, like 512x768, or one number")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
