"""What --quantize and --compile do to the bundled model on the CPU: `python benchmarks/cpu_options.py`.

Memory of the weights, seconds of a forward pass beside the weights as they are (in turns), and how far the choice of
tokens is still the same: pictures are drawn with the weights as they are, then both read them and are asked at every
position which token comes next. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.evaluation.machine import commit, device_name, versions
from sjd2_engine.evaluation.prompts import scene_cases
from sjd2_engine.models import LoadOptions, load_model
from sjd2_engine.quantize import quantize_linears
from sjd2_engine.transformer import Transformer
from sjd2_kernels import rng

MODEL = "scenes"
OPTIONS: dict[str, dict[str, Any]] = {"int8": {"quantize": "int8"}, "compile": {"compile": True}}
WIDTHS = (1, 16, 32)
SEED = 1000  # of the captions and the pictures


def block_bytes(quantize: str | None) -> int:
    """Bytes of the blocks' parameters; before they are packed, which hides their storage but not their size."""
    core = load_model(MODEL, torch.device("cpu"), torch.float32, LoadOptions()).transformer
    if quantize is not None:
        quantize_linears(core, quantize)
    total = 0
    weights: list[Any] = list(core.blocks.parameters())
    for weight in weights:
        # A quantised weight is made of parts: the integers and a scale per output.
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else None
        parts = [getattr(weight, name) for name in names] if names else [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def step_of(engine: Engine, width: int) -> Callable[[], Tensor]:
    """A forward pass of a window with guidance behind 150 entries, as in the middle of a picture."""
    core = engine.model.transformer
    cache = StaticCache(core.config, 2, 320, 0, engine.device, engine.dtype)
    cache.lengths.fill_(150)
    embeds = torch.randn(2, width, core.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return lambda: core.head(cache.forward(core, embeds))


def forward_ms(engines: list[Engine], width: int, turns: int) -> list[float]:
    """Medians of each engine's pass; they take turns, so that whatever else the machine does hits all of them."""
    steps = [step_of(engine, width) for engine in engines]
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(turns + 10):
        for step, into in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if turn >= 10:
                into.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(values) for values in times]


def logits_of(core: Transformer, prompts: list[list[int]], picture: Tensor, guidance: float) -> Tensor:
    """Guided logits [N, V] before each token of one picture; prompts: the conditional and the unconditional."""
    both = []
    for prompt in prompts:
        embeds = core.embedding[torch.cat([torch.tensor(prompt), picture[:-1]])][None]
        cache = StaticCache(core.config, 1, embeds.shape[1], 0, embeds.device, embeds.dtype)
        both.append(core.head(cache.forward(core, embeds))[0, len(prompt) - 1 :])
    return both[1] + guidance * (both[0] - both[1])


def agreement(plain: Engine, other: Engine, pictures: int) -> dict[str, float]:
    """Over image positions of drawn pictures: share with the same likeliest token, share with the same drawn token
    (the same noise for both), and the mean of KL(plain || other) in nats."""
    config, layout = plain.config_for("ar"), plain.model.layout
    where = torch.tensor(layout.image_positions)
    captions = [case.text for case in scene_cases(pictures, SEED)]
    drawn = plain.generate(captions, "ar", seed=SEED).tokens
    same_top, same_drawn, divergence = [], [], []
    for row, (caption, tokens) in enumerate(zip(captions, drawn, strict=True)):
        picture = torch.tensor(layout.forced)
        picture[where] = tokens
        prompts = [plain.model.encode_prompt(text) for text in (caption, config.negative_prompt)]
        scores = [
            logits_of(engine.model.transformer, prompts, picture, config.guidance_scale)[where] / config.temperature
            for engine in (plain, other)
        ]
        p, q = (score.log_softmax(-1) for score in scores)
        noise = rng.gumbel(torch.tensor([SEED + row]), where[None], 0, rng.SAMPLE, p.shape[-1])[0]
        if ((p + noise).argmax(-1) != tokens).float().mean() > 0.02:  # rounding flips a near-tie now and then
            raise SystemExit("these are not the logits that drew the picture")
        same_top.append((p.argmax(-1) == q.argmax(-1)).float())
        same_drawn.append(((p + noise).argmax(-1) == (q + noise).argmax(-1)).float())
        divergence.append((p.exp() * (p - q)).sum(-1))
    names = ("same_likeliest", "same_drawn", "kl_nats")
    return {name: float(torch.cat(rows).mean()) for name, rows in zip(names, (same_top, same_drawn, divergence))}


def main() -> None:
    parser = argparse.ArgumentParser(description="What --quantize and --compile do to the bundled model on the CPU.")
    parser.add_argument("--turns", type=int, default=60, help="timed passes per width")
    parser.add_argument("--pictures", type=int, default=16, help="pictures whose tokens are asked for; 0: none")
    given = parser.parse_args()
    with torch.inference_mode():
        plain = Engine.from_pretrained(MODEL, device="cpu")
        others = {name: Engine.from_pretrained(MODEL, device="cpu", **extra) for name, extra in OPTIONS.items()}
        rows: dict[str, Any] = {
            name: {"blocks_bytes": block_bytes(OPTIONS[name].get("quantize")), "forward_ms": {}} for name in OPTIONS
        }
        base: dict[str, Any] = {"blocks_bytes": block_bytes(None), "forward_ms": {}}
        for width in WIDTHS:
            first, *rest = forward_ms([plain, *others.values()], width, given.turns)
            base["forward_ms"][str(width)] = first
            for name, ms in zip(OPTIONS, rest, strict=True):
                rows[name]["forward_ms"][str(width)] = ms
            shown = "  ".join(f"{name} {ms:.2f} ms" for name, ms in zip(OPTIONS, rest, strict=True))
            print(f"W = {width:2}  as they are {first:.2f} ms  {shown}", flush=True)
        for name, engine in others.items():
            if given.pictures:
                rows[name]["agreement"] = agreement(plain, engine, given.pictures)
                print(name, rows[name]["agreement"], flush=True)
    document = {
        "device": device_name(torch.device("cpu")), "dtype": "float32", "threads": torch.get_num_threads(),
        "versions": versions(), "commit": commit(), "model": MODEL, "rows": 2, "turns": given.turns,
        "pictures": given.pictures, "as_they_are": base, **rows,
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
