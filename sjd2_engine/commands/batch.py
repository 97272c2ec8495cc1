"""`sjd2 batch`: a file of prompts on many workers."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .common import table

PromptsFile = Annotated[
    Path, typer.Argument(help='.jsonl, one {"prompt": …} per line (also "id", "seed", "negative_prompt"), or .txt')
]
Workers = Annotated[int | None, typer.Option(help="Engines at work (default: one per GPU, without GPUs one per CPU).")]
Address = Annotated[str | None, typer.Option(help="Ray cluster: auto, ray://HOST:10001 (default: this host alone).")]
HEADERS = ("worker", "host", "device", "pictures", "seconds", "images/s", "deaths")


def batch(
    prompts: PromptsFile,
    out: o.Out = Path("out"),
    workers: Workers = None,
    address: Address = None,
    model: o.Model = "scenes-sjd2",
    decoder: o.Decoder = None,
    seed: o.Seed = 0,
    window: o.Window = None,
    levels: o.Levels = None,
    guidance: o.Guidance = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    verification: o.Verification = None,
    coupling: o.Coupling = None,
    negative_prompt: o.Negative = None,
    max_batch: o.MaxBatch = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Draw a file of prompts on many GPUs and hosts (Ray). A stopped run goes on by the same command."""
    from ..distributed.plan import make_plan
    from ..distributed.prompts import read_items
    from ..distributed.run import import_ray, run_batch
    from ..files import check_writable

    import_ray()
    o.at_least_one(**o.given(workers=workers))
    items = read_items(prompts, seed)
    options = o.given(
        window=window, denoise_levels=levels, guidance_scale=guidance, temperature=temperature, top_k=top_k,
        top_p=top_p, verification=verification, coupling=coupling, negative_prompt=negative_prompt,
        max_batch=max_batch,
    )  # fmt: skip
    plan = make_plan(
        model, out, uuid.uuid4().hex[:12], decoder=decoder, options=options, device=device, dtype=dtype,
        image_size=o.pixels(image_size), allow_pickle=allow_pickle,
    )  # fmt: skip
    check_writable(out)
    from tqdm import tqdm

    try:
        with tqdm(total=len(items), desc="batch", unit="picture", leave=False, dynamic_ncols=True) as bar:
            summary = run_batch(plan, items, workers, address, bar.update)
    except KeyboardInterrupt:
        typer.echo("sjd2: stopped; finished pictures are kept, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    _show(summary)
    typer.echo(json.dumps(summary, ensure_ascii=False))
    if summary["failed"]:
        raise typer.Exit(1)


def _show(summary: dict[str, Any]) -> None:
    """Workers, decoder and failures for people; the summary itself is for programs."""
    rows = [[_text(worker.get(name)) for name in _keys()] for worker in summary["workers"]]
    rows.append(["all", "", "", *(_text(summary[name]) for name in ("drawn", "seconds", "images_per_s")), ""])
    table(f"Pictures drawn: {summary['model']}, {summary['decoder']}", HEADERS, rows, 3)
    typer.echo(
        f"{_text(summary['forward_passes_mean'])} forward passes per picture, {_text(summary['step_compression'])} "
        "tokens each, over all pictures of the manifest"
    )
    steps = sum(summary["accepted_per_step"].values())
    shares = [f"{count}: {number / steps:.1%}" for count, number in summary["accepted_per_step"].items()]
    typer.echo(f"tokens accepted per step: {', '.join(shares) or '–'}")
    for failure in summary["failures"]:
        typer.echo(f"sjd2: failed: {failure['id']}: {failure['error']}", err=True)
    typer.echo(
        f"{summary['prompts']} prompts: {summary['drawn']} drawn, {summary['kept']} kept, {summary['failed']} failed; "
        f"{summary['manifest']}"
    )


def _keys() -> list[str]:
    return [header.replace("images/s", "images_per_s") for header in HEADERS]


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
