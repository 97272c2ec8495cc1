"""Text in, images out: prefill, the decoding loop, pixels, streaming."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .cache import StaticCache
from .config import DecodeConfig
from .errors import BackendError, CheckpointError, ConfigError, NumericalError, PromptError
from .linear import pack_linears
from .models import ImageModel, LoadOptions, load_model
from .schedule import embedding_statistics, noise_times, timestep_encodings
from .window import JacobiWindow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DecodeStats:
    """Figures of one `generate` call.

    forward_passes: per image. tokens: per image, forced ones included. step_compression: tokens / mean forward
    passes. accepted_per_step: how many steps of all images accepted n tokens. latency_s: wall-clock of the call,
    text to pixels. peak_memory_bytes: device memory allocated at most, on the CPU the process's peak.
    """

    decoder: str
    window: int
    forward_passes: list[int]
    tokens: int
    accepted_per_step: dict[int, int]
    latency_s: float
    peak_memory_bytes: int

    @property
    def step_compression(self) -> float:
        return self.tokens * len(self.forward_passes) / max(1, sum(self.forward_passes))


@dataclass(frozen=True)
class Result:
    """Images in the order of the prompts (None where decoding failed), int64 [B, n] tokens, figures, failures."""

    images: list[Image.Image | None]
    tokens: Tensor
    stats: DecodeStats
    failures: list[NumericalError] = field(default_factory=list)


@dataclass(frozen=True)
class StepEvent:
    """One forward pass of a batch: `rows` are indices of prompts, `accepted` tokens each won in this step,
    `tokens` the newly accepted local ids of each row, `lengths` tokens so far, `previews` pictures or None."""

    step: int
    rows: list[int]
    accepted: list[int]
    tokens: list[list[int]]
    lengths: list[int]
    previews: list[Image.Image] | None = None


class Decode:
    """A batch of images on its way: the window, the cache and the model between them."""

    def __init__(
        self,
        model: ImageModel,
        config: DecodeConfig,
        prompts: Sequence[str],
        seeds: Sequence[int],
        attention: str = "auto",
    ) -> None:
        transformer = model.transformer
        embedding = transformer.embedding
        self.model, self.transformer, self.batch = model, transformer, len(prompts)
        self.guided = config.guidance_scale != 1.0
        given = [model.prompt_embeds(text) for text in prompts]
        if self.guided:
            given += [model.unconditional_embeds(text, config.negative_prompt) for text in prompts]
        offsets = [model.position_offset(len(row)) for row in given]
        levels = config.denoise_levels if config.uses_noise else 0
        capacity = max(map(len, given)) - 1 + len(model.layout) + config.width
        limit = transformer.cos.shape[0] - max(offsets)
        room = config.width - capacity + limit
        if room < 1:
            raise PromptError(
                f"the longest prompt has {max(map(len, given))} tokens, {1 - room} more than the model has positions "
                "for beside the picture; shorten it"
            )
        if capacity > limit:
            raise ConfigError(
                f"window={config.window} needs {capacity} positions with this prompt, the model has {limit}; "
                f"use a window of at most {room}"
            )
        device, dtype = embedding.device, embedding.dtype
        self.cache = StaticCache(
            transformer.config, len(given), capacity, levels, device, dtype, offsets if any(offsets) else None
        )
        self.cache.fused &= attention != "sdpa"
        if levels:
            mean, std = embedding_statistics(embedding, transformer.image_vocabulary)
            times = noise_times(levels, config.t_min).to(device)
            self.cache.write_timesteps(transformer, timestep_encodings(times, mean, std))
        self._prefill(given)
        last = torch.stack([row[-1] for row in given])
        start, other = last[: self.batch], last[self.batch :]
        # Most families end both prompts alike: then both rows of guidance have the same inputs throughout.
        self._other_start = other[:, None] if self.guided and not torch.equal(start, other) else None
        self.window = JacobiWindow(config, model.layout, embedding, start, seeds=seeds, kv_lengths=self.cache.lengths)

    def _prefill(self, prompts: list[Tensor]) -> None:
        """Cache every prompt [P, D] but its last entry; shorter rows carry padding that the window overwrites."""
        lengths = [len(row) - 1 for row in prompts]
        if any(lengths):
            padded = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in prompts], batch_first=True)
            self.cache.forward(self.transformer, padded)
        self.cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def step(self) -> Tensor:
        """One forward pass and everything after it; returns accepted counts int32 [B]."""
        inputs = self.window.inputs()
        embeds, levels = inputs.embeds, inputs.levels if self.cache.levels else None
        assert embeds is not None
        if self.guided:
            other = embeds
            if self._other_start is not None:
                other = torch.where((inputs.positions == -1)[..., None], self._other_start, embeds)
            embeds = torch.cat([embeds, other])
            levels = None if levels is None else torch.cat([levels, levels])
        logits = self.transformer.head(self.cache.forward(self.transformer, embeds, levels))
        if self.guided:
            logits = logits.view(2, self.batch, *logits.shape[1:])
        return self.window.step(logits).accepted

    def image_tokens(self) -> Tensor:
        """Image tokens int64 [B, n], 0 where nothing is accepted yet."""
        return self.model.layout.image_tokens(self.window.tokens).clamp(min=0)


class Engine:
    """A model ready to decode; see `from_pretrained`."""

    def __init__(self, model: ImageModel, attention: str = "auto") -> None:
        self.model, self.attention = model, attention
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
    ) -> Engine:
        """Load a bundled model, a folder or a hub id.

        device: "auto" (CUDA where there is one), "cpu", "cuda". dtype: "auto" (bfloat16 on CUDA, else float32),
        "float32", "bfloat16", "float16". attention: "auto" (the fused ops on CUDA, else PyTorch's) or
        "sdpa" (always PyTorch's). image_size: (height, width) of pictures in
        pixels, or one number for squares; None = the model's own. allow_pickle: read tensors, and nothing else,
        from pickled files too. Raises CheckpointError, BackendError, ConfigError.
        """
        if attention not in ("auto", "sdpa"):
            raise ConfigError(f"attention={attention!r}: expected 'auto' or 'sdpa'")
        place = _device(device)
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r}: expected 'auto' or one of {', '.join(DTYPES)}")
        kind = DTYPES.get(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        return cls(load_model(name_or_path, place, kind, LoadOptions(image_size, allow_pickle)), attention)

    @property
    def model_name(self) -> str:
        return self.model.name

    @property
    def device(self) -> torch.device:
        return self.model.transformer.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.transformer.embedding.dtype

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
                f"{self.model_name}-sjd2 if it is there, make one by `sjd2 finetune --model {self.model_name}`, "
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
        images: list[Image.Image | None] = []
        tokens, passes, failures = [], [], []
        histogram: Counter[int] = Counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for first in range(0, len(texts), config.max_batch):
            part = slice(first, first + config.max_batch)
            decode = self._start(config, texts[part], seeds[part])
            with torch.inference_mode():
                while not decode.window.done:
                    decode.step()
            window = decode.window
            found = _failures(window, first)
            drawn = decode.image_tokens()
            pictures = _pictures(self.model, drawn)
            broken = {failure.image for failure in found}
            images += [None if first + i in broken else picture for i, picture in enumerate(pictures)]
            failures += found
            tokens.append(drawn.cpu())
            passes += window.steps.tolist()
            counts = window.histogram.sum(0).tolist()
            histogram.update({accepted: count for accepted, count in enumerate(counts) if count})
        if failures and len(failures) == len(texts):
            raise failures[0]
        stats = DecodeStats(
            config.decoder, config.width, passes, len(self.model.layout), dict(sorted(histogram.items())),
            time.perf_counter() - started, _peak_memory(self.device),
        )  # fmt: skip
        return Result(images, torch.cat(tokens), stats, failures)

    def stream(
        self, prompts: str | Sequence[str], decoder: str | None = None, preview_every: int = 0, **options: Any
    ) -> Iterator[StepEvent]:
        """Like `generate`, but yields a StepEvent after every forward pass, with preview pictures every
        `preview_every` steps and at the end (0 = none). The last event of a batch has all its tokens."""
        if preview_every < 0:
            raise ConfigError(f"preview_every={preview_every}: expected 0 (never) or a number of steps")
        texts, config, seeds = self._checked(prompts, decoder, options)
        return self._events(texts, config, seeds, preview_every)

    def _events(
        self, texts: list[str], config: DecodeConfig, seeds: list[int], preview_every: int
    ) -> Iterator[StepEvent]:
        for first in range(0, len(texts), config.max_batch):
            part = slice(first, first + config.max_batch)
            decode = self._start(config, texts[part], seeds[part])
            rows = list(range(first, first + decode.batch))
            step = 0
            while not decode.window.done:
                with torch.inference_mode():
                    accepted = decode.step().tolist()
                step += 1
                lengths = decode.window.lengths.tolist()
                done = decode.window.done
                new = [
                    row[end - count : end].tolist()
                    for row, count, end in zip(decode.window.tokens, accepted, lengths, strict=True)
                ]
                show = preview_every and (done or step % preview_every == 0)
                previews = _pictures(self.model, decode.image_tokens()) if show else None
                yield StepEvent(step, rows, accepted, new, lengths, previews)
            for failure in _failures(decode.window, first):
                raise failure

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

    @torch.inference_mode()
    def _start(self, config: DecodeConfig, texts: Sequence[str], seeds: Sequence[int]) -> Decode:
        return Decode(self.model, config, texts, seeds, self.attention)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r}: expected 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device={name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA device here")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: expected 'auto', 'cpu' or 'cuda'")
    return device


def _pictures(model: ImageModel, tokens: Tensor) -> list[Image.Image]:
    # One at a time: convolutions round differently for other batch sizes, and the picture must not depend on it.
    return [Image.fromarray(model.decode_pixels(row[None])[0].cpu().numpy()) for row in tokens]


def _failures(window: JacobiWindow, first: int) -> list[NumericalError]:
    found = []
    for row, (position, step) in enumerate(zip(window.failed.tolist(), window.failed_step.tolist(), strict=True)):
        if position >= 0:
            message = (
                f"NaN or infinite logits: image {first + row}, step {step}, position {position}; "
                "try dtype='float32', or check the weights"
            )
            found.append(NumericalError(message, image=first + row, step=step, position=position))
    return found


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
