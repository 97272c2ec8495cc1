"""The run behind `sjd2 finetune`: noise training of any family, on one device or many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, NumericalError
from ..files import check_writable, replace_file
from ..models import ImageModel
from ..models.weights import Origin
from ..schedule import CLEAN, embedding_statistics
from .batches import Batch, Feed, Pictures
from .checkpoints import Checkpoints
from .export import writable, write_model
from .lora import add_adapters, merged_weights
from .objective import Losses, Objective, recompute_activations
from .optimise import MovingAverage, make_optimisers, rate_at
from .options import Options
from .parallel import full_state, shard_over
from .throughput import Meter

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(options: Options, out: Path, device: str = "auto", track: tuple[str, ...] = ()) -> Accelerator:
    """accelerate's view of the processes and the device; ConfigError where it or a tracker is missing."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.tracking import get_available_trackers
    except ImportError:
        raise ConfigError("fine-tuning needs accelerate: pip install 'sjd2-engine[train]'") from None
    there = [str(name) for name in get_available_trackers()]
    missing = [name for name in track if name not in there]
    if missing:
        raise ConfigError(f"--track {missing[0]} is not installed; found: {', '.join(there) or 'none'}")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # FSDP2 has a precision policy of its own; elsewhere matrix products run in bfloat16 and weights stay in float32.
    mixed = "bf16" if options.precision == "bf16" and not options.shard else "no"
    AcceleratorState._reset_state()  # it keeps an earlier run's precision, and refuses another in the same process
    return Accelerator(cpu=on_cpu, mixed_precision=mixed, log_with=list(track) or None, project_dir=out / "run")


class Finetune:
    """One run: `train()` goes on where a killed one stopped, `write()` leaves a model of the same family in `out`.

    model: loaded in float32 on the run's device, or on the CPU where it is to be sharded; `folder` is where it came
    from. pictures: its data. Raises ConfigError for options, data or a folder that cannot work.
    """

    def __init__(
        self, model: ImageModel, folder: Path, pictures: Pictures, out: Path, options: Options, accelerator: Accelerator
    ) -> None:
        check_writable(out)
        self.model, self.folder, self.out, self.options, self.accelerator = model, folder, out, options, accelerator
        self.passes = options.accumulation(accelerator.num_processes)
        size = model.transformer.image_vocabulary
        recipe = options.noise
        self.feed = Feed(pictures, model.layout, size, recipe, options.seed, options.validation)
        self.feed.require(options.batch, options.validation)
        self.steps = options.steps_for(self.feed.size)
        # Validation is by the levels of decoding: the first count, whose times come first in the table too.
        main = replace(recipe, levels=recipe.levels[:1])
        self.kept = Feed(pictures, model.layout, size, main, options.seed, options.validation)
        self.origin = Origin.of(model.transformer)
        self._prepare()
        self.checkpoints = Checkpoints(out / "run", accelerator.is_main_process, accelerator.wait_for_everyone)
        self.checkpoints.settings(
            {**options.lasting(), "steps": self.steps, "model": model.name, "pictures": len(pictures)}
        )
        self.step = self.checkpoints.load(self.objective, self.optimisers, self.average)

    def _prepare(self) -> None:
        options, core = self.options, self.model.transformer
        torch.manual_seed(options.seed)  # of the adapters' first values; nothing else is drawn from it
        core.train()
        if options.lora:
            add_adapters(core, options.lora)
        else:
            trained = writable(self.origin)
            for name, weight in core.named_parameters():
                weight.requires_grad_(name in trained)
        self.objective = Objective(self.model, options.noise.times(), options.compiled)
        if options.checkpointing:
            recompute_activations(core.blocks)
        if options.shard:
            shard_over(self.objective, core.blocks, self.accelerator.device, options.precision)
            self.wrapped: nn.Module = self.objective
        else:
            self.objective.to(self.accelerator.device)
            self.wrapped = self.accelerator.prepare_model(self.objective)
        self.optimisers = make_optimisers(self.objective, options)
        self.average = MovingAverage(self.objective, options.ema) if options.ema else None
        self.weights = [weight for weight in self.objective.parameters() if weight.requires_grad]

    def train(self, stop_at: int | None = None) -> None:
        """Train up to the last step, or to step `stop_at`, with checkpoints and a log on the way."""
        options, accelerator = self.options, self.accelerator
        last = min(self.steps, stop_at or self.steps)
        if self.step == 0:  # what the training is to be judged against
            self._log({"step": 0, **self.validate()})
        meter = Meter(self.model, options, accelerator)
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", desc="finetune", disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )  # fmt: skip
        while self.step < last:
            self.advance(meter)
            bar.update()
            saving = self.step % options.save_every == 0 or self.step == last
            if self.step % options.log_every == 0 or saving:
                figures = meter.read(self.step, rate_at(self.step - 1, self.steps, options), options.noise.levels[0])
                # Before a checkpoint is written: the one that is kept must be a sound one.
                self._check_finite(figures)
                self._log(figures)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            with meter.paused():
                if self.step % options.validate_every == 0 and self.step < self.steps:
                    self._log({"step": self.step, **self.validate()})
                if saving:
                    self.checkpoints.save(self.step, self.objective, self.optimisers, self.average)
        bar.close()
        self.seconds = meter.seconds

    def _numbers(self, turn: int) -> range:
        """Pictures, by their numbers in the order of training, of this process's forward pass `turn` of a step."""
        size, processes = self.options.micro_batch, self.accelerator.num_processes
        first = self.step * self.options.batch + (turn * processes + self.accelerator.process_index) * size
        return range(first, first + size)

    def advance(self, meter: Meter) -> None:
        """One optimiser step, counted by the meter."""
        self.wrapped.train()
        for turn in range(self.passes):
            batch = self.feed.training(self._numbers(turn)).to(self.accelerator.device)
            # Sharded gradients are reduced every time: keeping them whole would take a model's memory.
            wait = turn + 1 < self.passes and not self.options.shard
            with self.accelerator.no_sync(self.wrapped) if wait else nullcontext():
                losses: Losses = self.wrapped(batch)
                self.accelerator.backward(losses.mean / self.passes)
            meter.add(losses)
        nn.utils.clip_grad_norm_(self.weights, self.options.clip)
        rate = rate_at(self.step, self.steps, self.options)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1

    def _check_finite(self, figures: Mapping[str, float]) -> None:
        if not math.isfinite(figures["loss"]):
            raise NumericalError(
                f"the loss is {figures['loss']} before step {self.step}: lower --rate; the last sound checkpoint is "
                f"{self.checkpoints.latest() or 'none'}",
                step=self.step,
            )

    def _log(self, figures: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            rounded = {name: round(v, 6) if isinstance(v, float) else v for name, v in figures.items()}
            with (self.out / "run" / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(rounded) + "\n")
        flat = {name: value for name, value in figures.items() if isinstance(value, (int, float)) and name != "step"}
        self.accelerator.log(flat, step=self.step)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the pictures kept apart: without noise, and with noise by the level of the input."""
        self.wrapped.eval()
        with self.average.in_place() if self.average else nullcontext():
            clean, noisy = (self._mean_losses(noised) for noised in (False, True))
        found = {"validation_loss": float(clean[0].sum() / clean[1].sum())}
        names = ["clean inputs", *(f"t={float(t):.3f}" for t in self.objective.times)]
        for name, total, count in zip(names, *noisy):
            if count:
                found[f"validation_loss_noisy/{name}"] = float(total / count)
        return found

    def _mean_losses(self, noised: bool) -> Tensor:
        """Sums and counts [2, K+1] over all pictures kept apart."""
        size, accelerator = self.options.micro_batch, self.accelerator
        total = torch.zeros(2, len(self.objective.times) + 1, device=accelerator.device)
        batches = self.kept.validation_batches(size)
        for turn in range(-(-batches // accelerator.num_processes)):
            which = turn * accelerator.num_processes + accelerator.process_index
            batch = self.kept.validation(size, min(which, batches - 1)).to(accelerator.device)
            if not noised:
                batch = Batch(
                    batch.tokens, torch.full_like(batch.levels, CLEAN), batch.seeds, batch.captions, batch.dropped
                )
            losses = self.wrapped(batch)
            if which < batches:  # the others keep the processes in step
                total += torch.stack([losses.sums, losses.counts])
        return accelerator.reduce(total, "sum")  # pyright: ignore[reportReturnType]

    def write(self) -> Path:
        """Validate, and leave the tuned model in `out`; returns it."""
        figures = self.validate()
        self._log({"step": self.step, **figures})
        with self.average.in_place() if self.average else nullcontext():
            state = merged_weights(self.model.transformer) if self.options.lora else full_state(self.objective)
            table = state.get("embedding", self.model.transformer.embedding)
            if self.accelerator.is_main_process:
                trained: dict[str, Callable[[], Tensor]] = {
                    name: (lambda tensor=tensor: tensor) for name, tensor in state.items()
                }
                write_model(self.folder, self.out, self.origin, trained, self._noise(table, figures))
                report = {"steps": self.step, "seconds": round(getattr(self, "seconds", 0.0)), **figures}
                replace_file(self.out / "run" / "report.json", json.dumps(report, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.out

    def _noise(self, table: Tensor, figures: Mapping[str, float]) -> dict[str, Any]:
        """sjd2.json: the levels that decoding must use, the statistics of the table, and where they come from."""
        recipe = self.options.noise
        count = recipe.levels[0]
        mean, std = embedding_statistics(table.detach(), self.model.transformer.image_vocabulary)
        return {
            "levels": count,
            "t_min": recipe.t_min,
            "times": [round(float(t), 6) for t in recipe.times()[:count]],
            "trained_levels": list(recipe.levels),
            "steps": self.step,
            "batch": self.options.batch,
            "base": self.model.name,
            "losses": {name: round(value, 5) for name, value in figures.items()},
            "embedding_mean": [float(f"{value:.6g}") for value in mean.tolist()],
            "embedding_std": [float(f"{value:.6g}") for value in std.tolist()],
        }
