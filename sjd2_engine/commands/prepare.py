"""`sjd2 prepare`: captioned pictures to tokens on disk, what `sjd2 finetune` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from . import options as o

if TYPE_CHECKING:
    from ..training.prepare import Summary

SourcePath = Annotated[
    Path | None,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of images with a .txt beside each or a metadata.jsonl; or webdataset tars, or parquet files.",
    ),
]
Batch = Annotated[int, typer.Option(help="Pictures encoded together.")]
Workers = Annotated[int, typer.Option(help="Threads that read and resize images.")]
Limit = Annotated[int | None, typer.Option(help="Most pictures in the folder (default: all of the source).")]
Upscale = Annotated[
    bool, typer.Option("--upscale", help="Enlarge images that are too small, instead of skipping them.")
]
ShardSize = Annotated[int, typer.Option(help="Pictures per file; a killed run loses less than one file.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column of the images in parquet (default: the first known name).")
]
CaptionColumn = Annotated[
    str | None, typer.Option(help="Name of the caption in parquet and JSON (default: text, caption, prompt …).")
]
Synthetic = Annotated[
    int | None, typer.Option(help="Draw this many captioned scenes instead of reading a source (scenes only).")
]
REASONS = 5  # shown; all are in skipped.jsonl


def prepare(
    source: SourcePath = None,
    out: o.Out = Path("out/data"),
    model: o.Model = "scenes",
    batch: Batch = 16,
    workers: Workers = 4,
    limit: Limit = None,
    upscale: Upscale = False,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    synthetic: Synthetic = None,
    seed: Annotated[int, typer.Option(help="Seed of --synthetic.")] = 0,
    shard_size: ShardSize = 1024,
    device: o.Device = "auto",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
) -> None:
    """Encode captioned pictures with a model's picture tokenizer, for sjd2 finetune. A stopped run goes on."""
    if (source is None) == (synthetic is None):
        raise ConfigError("expected either a SOURCE of captioned pictures or --synthetic COUNT, and not both")
    o.at_least_one(**o.given(synthetic=synthetic))
    import torch

    from ..engine import find_device
    from ..files import check_writable
    from ..models import LoadOptions, load_model
    from ..training.prepare import Plan, draw
    from ..training.prepare import prepare as encode
    from ..training.sources import open_source

    plan = Plan(batch, workers, limit, upscale, shard_size)
    opened = open_source(source, image_column, caption_column) if source is not None else None
    check_writable(out)
    wanted = LoadOptions(o.pixels(image_size), allow_pickle, core=False)
    loaded = load_model(model, find_device(device), torch.float32, wanted)
    try:
        if source is not None and opened is not None:
            settings = {"source": str(source.resolve()), "image_column": image_column, "caption_column": caption_column}
            summary = encode(loaded, opened, out, plan, settings)
        else:
            summary = draw(loaded, out, synthetic or 0, plan, seed)
    except KeyboardInterrupt:
        typer.echo("sjd2: stopped; whole shards are kept, and the same command goes on behind them", err=True)
        raise typer.Exit(130) from None
    _show(summary, out, model)


def _show(summary: Summary, out: Path, model: str) -> None:
    rate = f", {summary.added / summary.seconds:.1f} images/s" if summary.added else ""
    typer.echo(f"{out}  {summary.pictures} pictures, {summary.added} of them new{rate}")
    if summary.skipped:
        typer.echo(f"{sum(summary.skipped.values())} items skipped, listed in {out}/skipped.jsonl:")
        for reason, count in summary.skipped.most_common(REASONS):
            typer.echo(f"  {count} x {reason}")
        if len(summary.skipped) > REASONS:
            typer.echo(f"  and {len(summary.skipped) - REASONS} other reasons")
    typer.echo(f"try: sjd2 finetune --model {model} --data {out}")
