"""`sjd2 bench`: decoders on the same prompts and seeds."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BackendError
from . import options as o
from .common import load_engine, progress, table


def bench(
    model: o.Model = "scenes",
    decoders: o.Specs = "ar,sjd,sjd2",
    prompts: Annotated[int, typer.Option(help="How many held-out captions of the bundled model.")] = 16,
    prompt_file: o.PromptFile = None,
    seed: o.Seed = 0,
    out: o.Out = Path("out/bench"),
    tuned: Annotated[str | None, typer.Option(help="Weights for sjd2 (default: MODEL-sjd2).")] = None,
    windows: Annotated[str, typer.Option(help="auto, or sizes to run every decoder with: 16,32,64")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed decodes per decoder at the start.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed decodes per prompt and decoder.")] = 1,
    report: Annotated[
        Path | None, typer.Option(help="Folder for an HTML page with figures of how the decoders work, too.")
    ] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
    attention: o.Attention = "auto",
    compile: o.Compile = False,
    quantize: o.Quantize = None,
) -> None:
    """Compare decoders on the same prompts and seeds: forward passes, seconds, memory, pictures."""
    from ..evaluation.specs import parse_specs
    from ..files import check_writable

    o.at_least_one(prompts=prompts, batch=batch, repeats=repeats)
    specs = parse_specs(decoders, windows)
    _check_installed("matplotlib", *(["jinja2"] if report else []))
    check_writable(out)
    if report:
        check_writable(report)
    from ..evaluation import bench as comparison
    from ..evaluation import results
    from ..evaluation.prompts import Case, read_prompts, scene_cases

    names = {"base": model, "sjd2": tuned or f"{model}-sjd2"}
    places = (device, dtype, image_size, allow_pickle, attention, compile, quantize)
    engines = {w: load_engine(names[w], *places) for w in dict.fromkeys(spec.weights for spec in specs)}
    cases = [Case(text) for text in read_prompts(prompt_file)] if prompt_file else scene_cases(prompts, seed)
    plan = comparison.Plan(cases[:prompts], seed, batch, warmup, repeats)
    rows = comparison.contenders(specs, engines)
    result = comparison.run(plan, rows, out, progress("bench", "decode"))
    title = f"Decoders on {result.model}: {result.device}, {result.dtype}"
    table(title, results.HEADERS, results.table_rows(result), 3)
    typer.echo(f"Tables, plots and pictures are in {out}/")
    if report:
        from ..evaluation.report import write_report

        page = write_report(plan, rows, result, report, lambda label: progress(label, "round"), _command())
        typer.echo(f"The report is {page}")
    typer.echo(result.to_json())


def _check_installed(*modules: str) -> None:
    """Found missing before anything is measured."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"{', '.join(missing)} not installed; try: pip install 'sjd2-engine[eval]'")


def _command() -> str:
    """The command as typed, so that the page tells how to make it again."""
    return shlex.join(["sjd2", *sys.argv[1:]])
