"""Text in, images out: the public face of floors 1 to 4."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .attention import Workload, check_name, choose
from .config import AUTO, DecodeConfig
from .errors import BackendError, CheckpointError, ConfigError, PromptError
from .graphs import CaptureReport
from .linear import pack_linears
from .memory import affordable_batch, is_out_of_memory
from .models import ImageModel, LoadOptions, describe_model, load_model
from .quantize import check_quantize, quantize_linears
from .results import DecodeStats, Picture, Result, StepEvent
from .session import Advance, PreviewEvery, Session
from .slots import Slots, check_room, prompt_inputs
from .tuning import WIDTHS, WindowTuner

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROOM = 32  # prompts' room is a multiple of it, so that slots fit the next call too


@dataclass
class _Run:
    """Figures of one call, over all the sessions it took."""

    batch: int = 1
    passes: Counter[int] = field(default_factory=Counter)
    graphs: CaptureReport = field(default_factory=lambda: CaptureReport(0, 0.0, 0))


class Engine:
    """A model ready to decode; see `from_pretrained`."""

    def __init__(
        self, model: ImageModel, attention: str = "auto", compile: bool = False, quantize: str | None = None
    ) -> None:
        self.model, self.attention, self.compiled, self.quantize = model, attention, compile, quantize
        self._idle: dict[Any, Slots] = {}
        self._tuners: dict[Any, WindowTuner] = {}
        if quantize is not None:
            quantize_linears(model.transformer, quantize)
        if compile:
            model.transformer.compile_blocks()
        else:
            pack_linears(model.transformer)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        image_size: tuple[int, int] | int | None = None,
        allow_pickle: bool = False,
        compile: bool = False,
        quantize: str | None = None,
    ) -> Engine:
        """Load a bundled model, a folder or a hub id.

        device: "auto" (CUDA where there is one), "cpu", "cuda". dtype: "auto" (bfloat16 on CUDA, else float32),
        "float32", "bfloat16", "float16". attention: "auto" or a backend: "triton", "flash", "sdpa", "cpu"
        (`sjd2 doctor` says which are there and which "auto" takes). image_size: (height, width) of pictures in
        pixels, or one number for squares; None = the model's own. allow_pickle: read tensors, and nothing else,
        from pickled files too. compile: run the blocks through torch.compile instead of the fused ops or packed
        products. quantize: weights of the blocks in "int8" or "fp8", by torchao; None = as they are.
        Raises CheckpointError, BackendError, ConfigError.
        """
        check_name(attention)
        place = find_device(device)
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}: expected 'auto' or one of {', '.join(DTYPES)}")
        kind = DTYPES.get(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        options = LoadOptions(image_size, allow_pickle)
        # What cannot work is said before gigabytes are read.
        if attention != "auto":
            sizes = describe_model(name_or_path, options).transformer
            choose(attention, Workload.of(sizes, place, kind, timesteps=False))
        if quantize is not None:
            check_quantize(quantize, place)
        return cls(load_model(name_or_path, place, kind, options), attention, compile, quantize)

    @property
    def model_name(self) -> str:
        """The checkpoint's name, with how its weights were quantised: "scenes", "scenes+int8"."""
        return self.model.name if self.quantize is None else f"{self.model.name}+{self.quantize}"

    @property
    def device(self) -> torch.device:
        return self.model.transformer.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.transformer.embedding.dtype

    @property
    def loaded_with(self) -> list[str]:
        """The options of `from_pretrained` that change timings and are not "auto" or off, to be named beside them."""
        attention = [] if self.attention == "auto" else [f"attention={self.attention}"]
        return attention + ["compile"] * self.compiled

    @property
    def is_tuned(self) -> bool:
        """Whether the weights were trained to read noisy inputs, as `sjd2` needs."""
        return self.model.noise is not None

    def config_for(self, decoder: str | None = None, **options: Any) -> DecodeConfig:
        """The checked configuration of a decode: options over the defaults of this model and decoder."""
        config = DecodeConfig.build(self.model.defaults, decoder=decoder, **options)
        if config.uses_noise and not self.is_tuned:
            raise CheckpointError(
                f"decoder='sjd2' needs weights trained on noisy inputs, and {self.model_name!r} is not; use "
                f"{self.model.name}-sjd2 if it is there, make one by `sjd2 finetune --model {self.model.name}`, "
                "or take another decoder"
            )
        return config

    def generate(self, prompts: str | Sequence[str], decoder: str | None = None, **options: Any) -> Result:
        """Draw one image per prompt; options are the fields of `DecodeConfig`.

        Raises ConfigError, PromptError and CheckpointError before anything is computed, and NumericalError if
        no image at all could be finished.
        """
        started = time.perf_counter()
        texts, config, seeds = self._checked(prompts, decoder, options)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        run, found = _Run(), {}
        for advance in self._advances(run, texts, config, seeds, 0):
            found |= advance.finished
        pictures: list[Picture] = [found[index] for index in range(len(texts))]
        failures = [picture.failure for picture in pictures if picture.failure]
        if len(failures) == len(texts):
            raise failures[0]
        histogram: Counter[int] = Counter()
        for picture in pictures:
            histogram.update(picture.accepted_per_step)
        stats = DecodeStats(
            config.decoder, max(run.passes, key=lambda width: run.passes[width]),
            [picture.forward_passes for picture in pictures], len(self.model.layout), dict(sorted(histogram.items())),
            time.perf_counter() - started, _peak_memory(self.device), dict(sorted(run.passes.items())), run.batch,
            run.graphs,
        )  # fmt: skip
        images = [picture.image for picture in pictures]
        return Result(images, torch.stack([picture.tokens for picture in pictures]), stats, failures)

    def stream(
        self,
        prompts: str | Sequence[str],
        decoder: str | None = None,
        preview_every: PreviewEvery = 0,
        **options: Any,
    ) -> Iterator[StepEvent]:
        """Like `generate`, but yields a StepEvent after every forward pass, with preview pictures every
        `preview_every` steps (0 = none, "auto" = as often as a fiftieth of the time allows). Pictures arrive in
        `finished` as they become ready; one that failed says so there and does not stop the others."""
        texts, config, seeds = self._checked(prompts, decoder, options)
        Session.check(preview_every)
        return self._events(texts, config, seeds, preview_every)

    def session(
        self,
        decoder: str | None = None,
        slots: int | None = None,
        room: int | None = None,
        preview_every: PreviewEvery = 0,
        **options: Any,
    ) -> Session:
        """Continuous batching for whoever has a loop of their own: prompts come and go, see `Session`.

        slots: pictures drawn at the same time (default: max_batch, as far as memory allows); room: entries of the
        longest prompt (default: twice the family's usual length). Options are those of `DecodeConfig`; seeds and
        prompts come with `Session.submit`. Raises ConfigError, CheckpointError, BackendError.
        """
        config = self.config_for(decoder, **options)
        count = self._affordable(config, slots or config.max_batch)
        probe = prompt_inputs(self.model, config, config.negative_prompt)
        check_room(self.model, config, probe)
        longest = max(probe.length, room or 2 * self.model.facts.prompt_length)
        limit = self.model.transformer.cos.shape[0] - max(probe.offsets) - len(self.model.layout) - config.width + 1
        return self._open(config, count, min(longest, limit), preview_every)

    def _events(
        self, texts: list[str], config: DecodeConfig, seeds: list[int], preview_every: PreviewEvery
    ) -> Iterator[StepEvent]:
        step = 0
        for advance in self._advances(_Run(), texts, config, seeds, preview_every):
            step += bool(advance.progress)
            rows: list[Any] = [row.key for row in advance.progress]
            previews = [row.preview for row in advance.progress]
            yield StepEvent(
                step,
                rows,
                [row.accepted for row in advance.progress],
                [row.tokens for row in advance.progress],
                [row.length for row in advance.progress],
                previews if any(previews) else None,
                {int(str(key)): picture for key, picture in advance.finished.items()},
            )

    def _advances(
        self, run: _Run, texts: list[str], config: DecodeConfig, seeds: list[int], preview_every: PreviewEvery
    ) -> Iterator[Advance]:
        """Every step of a whole job; where memory runs out, what is unfinished is begun again in fewer slots."""
        inputs = [prompt_inputs(self.model, config, text) for text in texts]
        for given in inputs:
            check_room(self.model, config, given)
        longest = max(given.length for given in inputs)
        del inputs
        count = self._affordable(config, min(config.max_batch, len(texts)))
        todo: list[int] = list(range(len(texts)))
        while todo:
            try:
                with closing(self._steps(run, texts, config, seeds, todo, count, longest, preview_every)) as steps:
                    for advance in steps:
                        todo = [index for index in todo if index not in advance.finished]
                        yield advance
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.release()
                if count == 1:
                    raise BackendError(
                        f"out of memory with a single picture ({error}); use a smaller window, guidance_scale=1.0, "
                        "dtype='bfloat16', or a smaller picture"
                    ) from error
                count = count // 2
                logger.warning("out of memory: %d picture(s) are begun again, %d at a time", len(todo), count)

    def _steps(
        self,
        run: _Run,
        texts: list[str],
        config: DecodeConfig,
        seeds: list[int],
        todo: list[int],
        count: int,
        longest: int,
        preview_every: PreviewEvery,
    ) -> Generator[Advance, None, None]:
        """The steps of the prompts `todo` in `count` slots; to close it is to give the rest up."""
        session = self._open(config, count, longest, preview_every)
        before = session.slots.graphs.report()
        try:
            for index in todo:
                session.submit(texts[index], seeds[index], index)
            while session.busy:
                yield session.step()
        finally:
            run.batch = max(run.batch, count)
            run.passes.update(session.passes)
            after = session.slots.graphs.report()
            run.graphs = CaptureReport(
                after.graphs - before.graphs, after.seconds - before.seconds, after.bytes - before.bytes
            )
            session.cancel_all()
            self._idle = {self._key(config, count): session.slots}

    def _open(self, config: DecodeConfig, count: int, longest: int, preview_every: PreviewEvery) -> Session:
        """A session on slots left over from the last call if they fit, else on new ones."""
        key = self._key(config, count)
        widest, tuner = config.width, None
        if config.window == AUTO and config.decoder != "ar":
            widest = min(widest, max(1, self._spare_positions(longest)))
            tuner = self._tuners.setdefault(key, self._tuner(config, widest))
        slots = self._idle.pop(key, None)
        self._idle.clear()  # nothing that does not fit may stay in memory while more is allocated
        if slots is None or slots.room < longest:
            room = min(-(-longest // ROOM) * ROOM, longest + max(0, self._spare_positions(longest) - widest))
            with torch.inference_mode():
                slots = Slots(self.model, replace(config, window=widest), count, room, self.attention)
        return Session(slots, preview_every, tuner)

    def _key(self, config: DecodeConfig, count: int) -> Any:
        """What slots are made for."""
        return replace(config, seed=0, max_batch=1), count

    def _spare_positions(self, longest: int) -> int:
        """Positions that the model has beside a prompt of `longest` entries and the picture."""
        offset = self.model.position_offset(longest)
        return self.model.transformer.cos.shape[0] - offset - longest + 1 - len(self.model.layout)

    def _tuner(self, config: DecodeConfig, widest: int) -> WindowTuner:
        usual = {name: value for name, value in self.model.defaults.items() if name != "decoder"}
        first = DecodeConfig.build(usual, decoder=config.decoder).window
        first = min(first, widest) if isinstance(first, int) else min(32, widest)
        half = 16.0 * config.denoise_levels if config.uses_noise else 8.0
        return WindowTuner(first, tuple(width for width in WIDTHS if width <= widest), half)

    def _affordable(self, config: DecodeConfig, wanted: int) -> int:
        count = affordable_batch(self.model.facts, config, self.dtype, wanted, self.device)
        if count < wanted:
            logger.warning("memory is enough for about %d of %d pictures at a time", count, wanted)
        return count

    def release(self) -> None:
        """Free the cache and graphs that are kept for the next call."""
        self._idle.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _checked(
        self, prompts: str | Sequence[str], decoder: str | None, options: dict[str, Any]
    ) -> tuple[list[str], DecodeConfig, list[int]]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.config_for(decoder, **options)
        if not texts:
            raise PromptError("no prompt was given: expected a text or a list of texts")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise PromptError(f"prompt {text!r} is empty: describe the picture in words")
            self.model.encode_prompt(text)
        self.model.encode_prompt(config.negative_prompt)
        return texts, config, config.seeds(len(texts))


def find_device(name: str) -> torch.device:
    """The device of a name like "auto", "cpu" or "cuda:1". Raises ConfigError, or BackendError without CUDA."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:1' …") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device={name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA device here")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:1' …")
    return device


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
