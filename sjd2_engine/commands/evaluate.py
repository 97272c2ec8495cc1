"""`sjd2 evaluate`: pictures of many prompts, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .common import load_engine, progress, table

HELDOUT = 120  # captions of the bundled model, where no file of prompts is given


def evaluate(
    model: o.Model = "scenes-sjd2",
    metrics: Annotated[str, typer.Option(help="Some of scene_eval,fid,clip,geneval.")] = "scene_eval",
    decoder: o.Decoder = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many: of the file (default: all), or held-out captions (default: 120).")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="JSON lines with prompt and optional id, seed, metadata; GenEval's too; or text lines."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures per prompt; GenEval takes 4.")] = 1,
    seed: o.Seed = 0,
    out: o.Out = Path("out/evaluate"),
    clip: Annotated[str | None, typer.Option(help="clip: folder or hub id of a CLIP model of transformers.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="fid: TorchScript or .pt2 extractor, uint8 [B,3,299,299] to [B,2048].")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="fid: folder of real pictures, or .npz with their mu and sigma.")
    ] = None,
    window: o.Window = None,
    levels: o.Levels = None,
    guidance: o.Guidance = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    verification: o.Verification = None,
    coupling: o.Coupling = None,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
    quantize: o.Quantize = None,
) -> None:
    """Draw pictures and score them: SceneEval, FID, CLIP score, GenEval. Goes on where a killed run stopped."""
    from ..files import check_writable

    o.at_least_one(**o.given(prompts=prompts, batch=batch, samples=samples))
    check_writable(out)
    from ..evaluation import evaluate as scoring
    from ..evaluation.metrics import make_metrics
    from ..evaluation.prompts import read_cases, scene_cases

    settings = o.given(
        window=window, denoise_levels=levels, guidance_scale=guidance, temperature=temperature, top_k=top_k,
        top_p=top_p, verification=verification, coupling=coupling,
    )  # fmt: skip
    cases = read_cases(prompt_file)[:prompts] if prompt_file else scene_cases(prompts or HELDOUT, seed)
    engine = load_engine(model, device, dtype, image_size, allow_pickle, quantize=quantize)
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    scorers = make_metrics(names, engine.device, clip, inception, reference)
    job = scoring.Job(engine, cases, out, seed, samples)
    result = scoring.evaluate(job, scorers, decoder, batch, settings, lambda label: progress(label, "batch"))
    table(f"{model}, {result.settings['decoder']}, {result.pictures} pictures", scoring.HEADERS, result.rows(), 2)
    for note in (note for found in result.metrics.values() for note in found.notes):
        typer.echo(f"- {note}")
    typer.echo(result.to_json())
