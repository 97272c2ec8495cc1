"""A decode watched step by step: what every forward pass was given, and how many tokens it accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import DecodeConfig
from ..engine import Engine
from ..slots import ACCEPTED, Slots, prompt_inputs

HIDDEN = -3  # states of a position in a trajectory: not in the window yet,
ACCEPTED_BEFORE = -2  # accepted by an earlier pass,
NEW = -1  # a clean draft that is another token than in the pass before, or was not one,
KEPT = 0  # a clean draft that is the same token as in the pass before; level k of noise is state k + 1


@dataclass
class Trace:
    """One picture, per forward pass: tokens accepted before it, the drafts' ids (-1 = noisy) and levels, the gain."""

    lengths: list[int] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)  # i64 [W-1], of positions lengths … lengths + W - 2
    levels: list[np.ndarray] = field(default_factory=list)  # i32 [W-1], -1 = clean
    accepted: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Forward passes."""
        return len(self.accepted)

    def cost(self) -> np.ndarray:
        """Passes spent on each position, float64 [N]: a pass that accepted n tokens cost each of them 1/n."""
        return np.repeat([1.0 / n for n in self.accepted if n], [n for n in self.accepted if n])

    def states(self) -> np.ndarray:
        """The state of every position before each pass, i64 [steps, N]: the constants above, or level + 1."""
        total = sum(self.accepted)
        found = np.full((self.steps, total), HIDDEN)
        before = np.full(total, -1)
        for step, (length, tokens, levels) in enumerate(zip(self.lengths, self.tokens, self.levels)):
            found[step, :length] = ACCEPTED_BEFORE
            count = min(len(tokens), total - length)
            here, drafts, noise = slice(length, length + count), tokens[:count], levels[:count]
            clean = np.where(drafts == before[here], KEPT, NEW)
            found[step, here] = np.where(noise >= 0, noise + 1, clean)
            before[here] = np.where(noise >= 0, -1, drafts)
        return found


def watch(engine: Engine, config: DecodeConfig, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trace]:
    """Decode all prompts together, one trace each; seeds: one per prompt. A fixed window is needed, no "auto"."""
    inputs = [prompt_inputs(engine.model, config, text) for text in prompts]
    slots = Slots(engine.model, config, len(prompts), max(part.length for part in inputs), engine.attention)
    for slot, (part, seed) in enumerate(zip(inputs, seeds, strict=True)):
        slots.start(slot, part, seed)
    traces = [Trace() for _ in prompts]
    while not slots.window.done:
        given = slots.window.inputs()
        lengths, running = slots.window.lengths.tolist(), (slots.window.rows_done == 0).tolist()
        tokens, levels = given.tokens[:, 1:].cpu().numpy().copy(), given.levels[:, 1:].cpu().numpy().copy()
        accepted = slots.step()[:, ACCEPTED].tolist()
        for row, trace in enumerate(traces):
            if running[row]:
                trace.lengths.append(lengths[row])
                trace.tokens.append(tokens[row])
                trace.levels.append(levels[row])
                trace.accepted.append(accepted[row])
    return traces


def cost_map(engine: Engine, traces: Sequence[Trace]) -> np.ndarray:
    """Mean passes spent on each image token, float64 [rows, columns] of the picture."""
    layout = engine.model.layout
    height, width = engine.model.facts.image_size
    mean = np.mean([trace.cost() for trace in traces], axis=0)[list(layout.image_positions)]
    rows = round((len(mean) * height / width) ** 0.5)
    return mean.reshape(rows, -1)
