"""The `sjd2` command: generate, bench, evaluate, finetune, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .commands.batch import batch
from .commands.bench import bench
from .commands.common import load_engine
from .commands.config import config
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.finetune import finetune
from .commands.options import (
    AllowPickle,
    Attention,
    Compile,
    Coupling,
    Decoder,
    Device,
    Dtype,
    Guidance,
    ImageSize,
    Levels,
    MaxBatch,
    Model,
    Negative,
    Out,
    PromptFile,
    Quantize,
    Seed,
    Temperature,
    TopK,
    TopP,
    Verification,
    Window,
    at_least_one,
    given,
    pixels,
)
from .commands.prepare import prepare
from .commands.serve import serve
from .errors import PromptError, Sjd2Error

# Newer releases of typer carry click inside, older ones import it: ask typer for the class.
UsageError: Any = typer.BadParameter.__bases__[0]


def _fail(message: str) -> typer.Exit:
    """Say what is wrong in one line on stderr; the exit code is 2."""
    typer.echo(f"sjd2: error: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


class _Commands(TyperGroup):
    """Turns every error a user can cause into one line and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Sjd2Error as error:
            raise _fail(str(error)) from error
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "sjd2"
            raise _fail(f"{error.format_message()} (see {command} --help)") from error
        except OSError as error:
            # A full disk, a folder taken away: nothing that a traceback would explain better.
            raise _fail(f"{error.strerror or error}: {error.filename or 'a file or folder'}") from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sjd2-engine {__version__}")
        raise typer.Exit()


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and stop.")
    ] = False,
) -> None:
    """Several tokens per forward pass for autoregressive text-to-image models."""


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    out: Out = Path("out"),
    prompt_file: PromptFile = None,
    model: Model = "scenes-sjd2",
    decoder: Decoder = None,
    seed: Seed = 0,
    window: Window = None,
    levels: Levels = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    verification: Verification = None,
    coupling: Coupling = None,
    negative_prompt: Negative = None,
    max_batch: MaxBatch = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    image_size: ImageSize = None,
    allow_pickle: AllowPickle = False,
    attention: Attention = "auto",
    compile: Compile = False,
    quantize: Quantize = None,
) -> None:
    """Draw one picture per prompt. Finished pictures of an interrupted run are not drawn again."""
    from .evaluation.prompts import read_prompts
    from .files import check_writable
    from .generation import draw

    texts = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    if not texts:
        raise PromptError('no prompt given; try: sjd2 generate "a red circle left of a blue square" -o out')
    check_writable(out)
    options = given(
        window=window, denoise_levels=levels, guidance_scale=guidance, temperature=temperature, top_k=top_k,
        top_p=top_p, verification=verification, coupling=coupling, negative_prompt=negative_prompt,
        max_batch=max_batch,
    )  # fmt: skip
    try:
        engine = load_engine(model, device, dtype, image_size, allow_pickle, attention, compile, quantize)
        for line in draw(engine, texts, out, decoder, seed, options):
            typer.echo(line)
    except KeyboardInterrupt:
        typer.echo(f"sjd2: stopped; finished pictures are in {out}/, the same command draws the others", err=True)
        raise typer.Exit(130) from None


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A model to examine instead, without loading it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
    dtype: Dtype = "auto",
    image_size: ImageSize = None,
    batch: Annotated[int, typer.Option(help="Pictures decoded together.")] = 1,
    allow_pickle: AllowPickle = False,
) -> None:
    """Versions, devices, bundled models, and which backend each op uses and why; or what a MODEL is and needs."""
    at_least_one(batch=batch)
    from . import doctor as examination

    if model is None:
        facts, show = examination.examine(), examination.show
    else:
        from .models import LoadOptions

        options = LoadOptions(pixels(image_size), allow_pickle)
        facts, show = examination.examine_model(model, options, dtype, batch), examination.show_model
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


app.command()(bench)
app.command()(batch)
app.command()(prepare)
app.command()(evaluate)
app.command()(finetune)
app.command()(config)
app.command()(serve)
app.command()(demo)


def main() -> None:
    """Entry point of the `sjd2` command."""
    app(prog_name="sjd2")


if __name__ == "__main__":
    main()
