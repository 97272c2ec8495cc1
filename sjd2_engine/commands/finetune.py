"""`sjd2 finetune`: noise training of a model of any family."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import options as o
from .common import table

if TYPE_CHECKING:
    from ..models import ModelFacts
    from ..training.estimate import Estimate
    from ..training.options import Options

GIGA = 1e9
SCENES_SEED = 2  # of the pictures drawn for the bundled model
USUAL_PICTURES = 80_000  # of the publication, for an estimate without data

Data = Annotated[
    Path | None, typer.Option(help="Folder made by sjd2 prepare (default for scenes: drawn into OUT/data).")
]
Levels = Annotated[str | None, typer.Option(help="Counts of noise levels to train, that of decoding first: 25 or 3,2.")]
TMin = Annotated[float | None, typer.Option(help="Smallest noise level, in (0, 1).")]
Segment = Annotated[str | None, typer.Option(help="Least and most positions of one level: 1,8.")]
CleanRun = Annotated[str | None, typer.Option(help="Least and most clean positions between staircases: 0,96.")]
CleanShare = Annotated[float | None, typer.Option(help="Share of the pictures trained without any noise.")]
Unconditional = Annotated[float | None, typer.Option(help="Share of the pictures trained without their caption.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")]
Batch = Annotated[int | None, typer.Option(help="Pictures per step, over all processes.")]
MicroBatch = Annotated[int | None, typer.Option(help="Pictures per forward pass and process.")]
Rate = Annotated[float | None, typer.Option(help="Largest learning rate.")]
Optimiser = Annotated[str | None, typer.Option(help="adamw, or muon (with AdamW for tables and gains).")]
Schedule = Annotated[str | None, typer.Option(help="cosine or constant, after the warm-up.")]
Warmup = Annotated[int | None, typer.Option(help="Steps of linear warm-up.")]
Decay = Annotated[float | None, typer.Option(help="Weight decay of matrices.")]
Clip = Annotated[float | None, typer.Option(help="Largest norm of the gradient.")]
Ema = Annotated[float | None, typer.Option(help="Decay of a moving average, which is what is saved; 0 = none.")]
Lora = Annotated[int | None, typer.Option(help="Rank of adapters trained instead of the weights; 0 = all weights.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or float32.")]
Shard = Annotated[bool, typer.Option("--shard", help="Split the model over the processes (FSDP2).")]
Checkpointing = Annotated[
    bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations to save memory.")
]
Compiled = Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile.")]
Validation = Annotated[int | None, typer.Option(help="Pictures kept apart, the last ones of the data.")]
Every = Annotated[int | None, typer.Option(help="Steps between two of these.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
Track = Annotated[str, typer.Option(help="Trackers beside log.jsonl: tensorboard, wandb … (comma-separated).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Estimate memory and time, and stop.")]
Devices = Annotated[int | None, typer.Option(help="Devices of the estimate (default: the processes started).")]
Memory = Annotated[float | None, typer.Option(help="GB per device of the estimate (default: this GPU's).")]
GPU = Annotated[str, typer.Option(help="Name of the GPU of the estimate, like H100 (default: this one).")]


def finetune(
    model: o.Model = "scenes",
    out: o.Out = Path("out/finetune"),
    data: Data = None,
    levels: Levels = None,
    t_min: TMin = None,
    segment: Segment = None,
    clean_run: CleanRun = None,
    clean_share: CleanShare = None,
    unconditional: Unconditional = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch: Batch = None,
    micro_batch: MicroBatch = None,
    rate: Rate = None,
    optimiser: Optimiser = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    clip: Clip = None,
    ema: Ema = None,
    lora: Lora = None,
    precision: Precision = None,
    shard: Shard = False,
    checkpointing: Checkpointing = None,
    compile: Compiled = None,
    validation: Validation = None,
    validate_every: Every = None,
    save_every: Every = None,
    log_every: Every = None,
    seed: Seed = None,
    track: Track = "",
    image_size: o.ImageSize = None,
    allow_pickle: o.AllowPickle = False,
    device: o.Device = "auto",
    dry_run: DryRun = False,
    devices: Devices = None,
    memory: Memory = None,
    gpu: GPU = "",
) -> None:
    """Teach a model to read noisy inputs, as sjd2 needs. A stopped run goes on by the same command.

    On several GPUs: accelerate launch --num_processes 8 -m sjd2_engine.cli finetune … --shard
    """
    from ..models import LoadOptions, describe_model
    from ..training.options import Options

    load = LoadOptions(o.pixels(image_size), allow_pickle)
    facts = describe_model(model, load)
    options = Options.build(
        facts.family,
        **o.given(
            levels=_numbers("levels", levels), t_min=t_min, segment=_numbers("segment", segment, 2),
            clean_run=_numbers("clean-run", clean_run, 2), clean_share=clean_share, unconditional=unconditional,
            epochs=epochs, steps=steps, batch=batch, micro_batch=micro_batch, rate=rate, optimiser=optimiser,
            schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip, ema=ema, lora=lora,
            precision=precision, checkpointing=checkpointing, compiled=compile, validation=validation,
            validate_every=validate_every, save_every=save_every, log_every=log_every, seed=seed, shard=shard or None,
        ),
    )  # fmt: skip
    if dry_run:
        _estimate(facts, options, data, devices, memory, gpu)
        return
    trackers = tuple(name.strip() for name in track.split(",") if name.strip())
    try:
        written = _run(model, out, data, load, options, device, trackers)
    except KeyboardInterrupt:
        typer.echo("sjd2: stopped; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    if written:
        typer.echo(f"{out}  tuned for sjd2; try: sjd2 bench --model {model} --tuned {out}")


def _numbers(name: str, text: str | None, count: int | None = None) -> tuple[int, ...] | None:
    """ "3,2" -> (3, 2)."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or count not in (None, len(parts)):
        raise ConfigError(f"--{name} is {text!r}; expected {count or 'one or more'} whole numbers, like 3,2")
    return tuple(map(int, parts))


def _run(
    name: str, out: Path, data: Path | None, load: Any, options: Options, device: str, track: tuple[str, ...]
) -> bool:
    """Train and write; whether this is the process that speaks."""
    import torch

    from ..files import check_writable
    from ..models import find_model, load_model
    from ..training.finetune import Finetune, make_accelerator
    from ..training.store import Store

    check_writable(out)
    accelerator = make_accelerator(options, out, device, track)
    # What can be known without the weights, before they are loaded.
    options.accumulation(accelerator.num_processes)
    if data is not None:
        Store(data)
    folder = find_model(name)
    # To be sharded it must not lie on a device as a whole; adapters go onto weights of half the size.
    place = torch.device("cpu") if options.shard else accelerator.device
    half = options.lora and options.precision == "bf16" and place.type == "cuda"
    model = load_model(name, place, torch.bfloat16 if half else torch.float32, load)
    source = _data(model, out, data, options, accelerator)
    pictures = Store(source)
    pictures.check(model)
    _warn(model.facts, options, accelerator, len(pictures))
    if track:
        accelerator.init_trackers("sjd2-finetune", {k: str(v) for k, v in asdict(options).items()})
    run = Finetune(model, folder, pictures, out, options, accelerator)
    run.train()
    run.write()
    return accelerator.is_main_process


def _data(model: Any, out: Path, data: Path | None, options: Options, accelerator: Any) -> Path:
    """The folder of prepared pictures; those of the bundled model's world are drawn where they are missing."""
    from ..models.scenes import ScenesModel

    if not isinstance(model, ScenesModel):
        if data is None:
            raise ConfigError(
                f"a model of the family {model.family} needs --data, a folder made by: sjd2 prepare PICTURES "
                f"--model {model.name} -o FOLDER"
            )
        return data
    if data is not None:
        return data
    if accelerator.is_main_process:
        from ..training.prepare import Plan, draw

        draw(model, out / "data", _drawn(options), Plan(), seed=SCENES_SEED)
    accelerator.wait_for_everyone()
    return out / "data"


def _drawn(options: Options) -> int:
    """How many pictures are drawn for the bundled model; those of its usual run where this one is told epochs."""
    from ..training.options import FAMILY_DEFAULTS

    return (options.steps or FAMILY_DEFAULTS["scenes"]["steps"]) * options.batch + options.validation


def _warn(facts: ModelFacts, options: Options, accelerator: Any, pictures: int) -> None:
    import torch

    from ..training.estimate import estimate

    if accelerator.device.type == "cuda" and accelerator.is_main_process:
        found = estimate(facts, options, accelerator.num_processes, pictures - options.validation)
        room = torch.cuda.get_device_properties(accelerator.device).total_memory
        if not found.fits(room):
            typer.echo(
                f"sjd2: warning: about {found.footprint.total / GIGA:.0f} GB per device are needed and there are "
                f"{room / GIGA:.0f}; {_advice(options)}", err=True,
            )  # fmt: skip


def _advice(options: Options) -> str:
    ways = [
        (not options.shard and not options.lora, "--shard on more devices"),
        (not options.checkpointing, "--checkpointing"),
        (options.micro_batch > 1, "a smaller --micro-batch"),
        (not options.lora, "--lora 32"),
    ]
    return "try " + " or ".join(way for helps, way in ways if helps) if any(h for h, _ in ways) else "use more devices"


def _estimate(
    facts: ModelFacts, options: Options, data: Path | None, devices: int | None, memory: float | None, gpu: str
) -> None:
    """Print the estimate; exit code 1 where it does not fit."""
    import torch

    from ..training.estimate import estimate
    from ..training.store import Store

    usual = _drawn(options) - options.validation if facts.family == "scenes" else USUAL_PICTURES
    pictures = len(Store(data)) - options.validation if data else usual
    count = devices or int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, memory = gpu or properties.name, memory or properties.total_memory / GIGA
    options.accumulation(count)
    found = estimate(facts, options, count, pictures, gpu)
    table(f"One of {count} devices", ("what", "GB"), _rows(found), 1)
    time = "" if found.hours is None else f", about {found.hours:.1f} h at 35 % of the peak of {gpu}"
    typer.echo(
        f"{_count(found.parameters)} parameters, {_count(found.trained)} trained; {found.steps} steps of "
        f"{options.batch} of {pictures} pictures{time}; {found.host_bytes / GIGA:.0f} GB of host memory per process "
        "while loading"
    )
    if memory is None:
        typer.echo("say --memory GB to see whether it fits")
    elif not found.fits(int(memory * GIGA)):
        typer.echo(
            f"sjd2: does not fit: {found.footprint.total / GIGA:.1f} GB of {memory:.0f}; {_advice(options)}", err=True
        )
        raise typer.Exit(1)
    else:
        typer.echo(f"fits: {found.footprint.total / GIGA:.1f} GB of {memory:.0f} per device")


def _count(parameters: int) -> str:
    return f"{parameters / GIGA:.2f} B" if parameters >= GIGA else f"{parameters / 1e6:.1f} M"


def _rows(found: Estimate) -> list[tuple[str, str]]:
    parts = asdict(found.footprint)
    return [
        *((name, f"{size / GIGA:.2f}") for name, size in parts.items()),
        ("all", f"{found.footprint.total / GIGA:.2f}"),
    ]
