"""B slots on a device, each drawing one picture at a time: the window, the cache and the model between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import StaticCache
from .config import DecodeConfig
from .errors import ConfigError, PromptError
from .graphs import StepGraphs
from .models import ImageModel
from .pixels import Pixels
from .schedule import embedding_statistics, noise_times, timestep_encodings
from .window import JacobiWindow

DONE, LENGTH, ACCEPTED, TOKENS = 0, 1, 2, 3  # columns of a report; the newly accepted tokens are the last ones


@dataclass(frozen=True)
class Inputs:
    """A prompt as the model reads it: embeddings [P, D] with and, for guidance, without the text; their offsets."""

    embeds: tuple[Tensor, ...]
    offsets: tuple[int, ...]

    @property
    def length(self) -> int:
        """Entries of the longer one."""
        return max(map(len, self.embeds))


def prompt_inputs(model: ImageModel, config: DecodeConfig, text: str) -> Inputs:
    """What the rows of one picture begin with. Raises PromptError."""
    embeds = [model.prompt_embeds(text)]
    if config.guidance_scale != 1.0:
        embeds.append(model.unconditional_embeds(text, config.negative_prompt))
    return Inputs(tuple(embeds), tuple(model.position_offset(len(part)) for part in embeds))


def check_room(model: ImageModel, config: DecodeConfig, inputs: Inputs) -> None:
    """Raise PromptError or ConfigError where a prompt, its picture and the window exceed the model's positions."""
    limit = model.transformer.cos.shape[0] - max(inputs.offsets)
    capacity = inputs.length - 1 + len(model.layout) + config.width
    room = config.width - capacity + limit
    if room < 1:
        raise PromptError(
            f"the longest prompt has {inputs.length} tokens, {1 - room} more than the model has positions "
            "for beside the picture; shorten it"
        )
    if capacity > limit:
        raise ConfigError(
            f"window={config.window} needs {capacity} positions with this prompt, the model has {limit}; "
            f"use a window of at most {room}"
        )


class Slots:
    """`count` slots with room for prompts of `room` entries, all of one configuration; idle until `start`.

    A step is one forward pass of all slots and everything behind it; nothing in it waits for the device, so on CUDA
    it is captured as a graph per width. `report` i32 [B, 3 + width] says what the last one did.
    """

    def __init__(self, model: ImageModel, config: DecodeConfig, count: int, room: int, attention: str = "auto") -> None:
        transformer = model.transformer
        embedding = transformer.embedding
        self.model, self.config, self.count, self.room = model, config, count, room
        self.attention = attention
        self.guided = config.guidance_scale != 1.0
        rows = 2 * count if self.guided else count
        levels = config.denoise_levels if config.uses_noise else 0
        offsets = [0] * rows if type(model).position_offset is not ImageModel.position_offset else None
        self.cache = self._make_cache(rows, room - 1 + len(model.layout) + config.width, levels, offsets)
        if levels:
            mean, std = embedding_statistics(embedding, transformer.image_vocabulary)
            times = noise_times(levels, config.t_min).to(embedding.device)
            self.cache.write_timesteps(transformer, timestep_encodings(times, mean, std))
        start = embedding.new_zeros(count, embedding.shape[1])
        self.window = JacobiWindow(
            config, model.layout, embedding, start, seeds=[0] * count, kv_lengths=self.cache.lengths
        )
        self.window.stop(range(count))
        # The unconditional prompt's last entry, where it is not that of the prompt itself.
        self._other_start: Tensor | None = None
        # On the device from the beginning: to copy it there with every picture would stop the loop.
        self._image_positions = torch.tensor(model.layout.image_positions, device=embedding.device)
        self.graphs = StepGraphs(embedding.device)
        self.pixels = Pixels(model)
        self._reports: dict[int, Tensor] = {}

    def _make_cache(self, rows: int, capacity: int, levels: int, offsets: Sequence[int] | None) -> StaticCache:
        table = self.model.transformer.embedding
        return StaticCache(
            self.model.transformer.config, rows, capacity, levels, table.device, table.dtype, offsets, self.attention
        )

    @torch.inference_mode()
    def start(self, slot: int, inputs: Inputs, seed: int) -> None:
        """Begin a picture in an idle slot."""
        rows = [slot, self.count + slot] if self.guided else [slot]
        # One prompt at a time, so that a picture never depends on the prompts beside it, not even by rounding.
        lengths = [len(part) - 1 for part in inputs.embeds]
        if max(lengths):
            offsets = inputs.offsets if self.cache.offsets is not None else None
            staging = self._make_cache(len(rows), max(lengths), 0, offsets)
            padded = torch.nn.utils.rnn.pad_sequence([part[:-1] for part in inputs.embeds], batch_first=True)
            staging.forward(self.model.transformer, padded)
            self.cache.adopt(staging, rows, max(lengths))
        index = torch.tensor(rows, device=self.cache.lengths.device)
        self.cache.lengths[index] = torch.tensor(lengths, dtype=torch.int32).to(index.device)
        if self.cache.offsets is not None:
            self.cache.offsets[index] = torch.tensor(inputs.offsets, dtype=torch.int32).to(index.device)
        last = [part[-1] for part in inputs.embeds]
        self.window.restart([slot], [seed], last[0][None])
        if self.guided:
            self._set_other_start(slot, last)

    def _set_other_start(self, slot: int, last: list[Tensor]) -> None:
        # Most families end both prompts alike: then both rows of guidance have the same inputs throughout.
        starts = self._other_start
        if starts is None:
            if torch.equal(*last):
                return
            starts = self._other_start = self.model.transformer.embedding.new_zeros(self.count, 1, last[0].shape[0])
            self.graphs.clear()
        starts[slot, 0] = last[1]

    @torch.inference_mode()
    def stop(self, slot: int) -> None:
        """Make a slot idle."""
        self.window.stop([slot])

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One forward pass of every slot; returns the report, which the next step overwrites."""
        width = self.window.width
        if width not in self._reports:
            shape = (self.count, TOKENS + width)
            self._reports[width] = torch.zeros(shape, dtype=torch.int32, device=self.window.device)
        self.graphs.run(width, self._pass)
        return self._reports[width]

    @torch.inference_mode()
    def resize(self, width: int) -> None:
        """Go on with another width."""
        self.window.resize(width)

    def _pass(self) -> None:
        window = self.window
        inputs = window.inputs()
        embeds, levels = inputs.embeds, inputs.levels if self.cache.levels else None
        assert embeds is not None
        if self.guided:
            other = embeds
            if self._other_start is not None:
                other = torch.where((inputs.positions == -1)[..., None], self._other_start, embeds)
            embeds = torch.cat([embeds, other])
            levels = None if levels is None else torch.cat([levels, levels])
        logits = self.model.transformer.head(self.cache.forward(self.model.transformer, embeds, levels))
        if self.guided:
            logits = logits.view(2, self.count, *logits.shape[1:])
        accepted = window.step(logits).accepted
        report = self._reports[window.width]
        report[:, :TOKENS] = torch.stack([window.rows_done, window.lengths, accepted], 1)
        report[:, TOKENS:] = window.latest()

    @torch.inference_mode()
    def summary(self, slot: int) -> Tensor:
        """A finished picture as one i64 vector on the device: steps, failed position and step, histogram, tokens."""
        window = self.window
        counters = torch.stack([window.steps[slot], window.failed[slot], window.failed_step[slot]]).long()
        return torch.cat([counters, window.histogram[slot], self.image_tokens(slot)])

    @torch.inference_mode()
    def image_tokens(self, slot: int) -> Tensor:
        """Image tokens i64 [n] of a slot, 0 where nothing is accepted yet; a copy."""
        return self.window.tokens[slot].index_select(0, self._image_positions).clamp(min=0)
