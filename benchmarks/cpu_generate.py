"""The engine against transformers' generate on the CPU: bundled weights, same greedy tokens, seconds per picture.

    PYTHONPATH=.:kernels python benchmarks/cpu_generate.py [--prompts N] [--out FILE]

The bundled folders are Llama checkpoints, which transformers reads as they are. Its generate is told by a logits
processor which tokens are pictures and where a row ends, what the engine knows from the layout. Once without guidance,
once with transformers' own guidance processor. Then the engine's exact decoders, sampling at their default windows,
against its AR. All take turns with every prompt. The last line of stdout is one JSON document; exit status 1 where
tokens differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu.document import write
from sjd2_engine import Engine
from sjd2_engine.evaluation.machine import commit, device_name, versions
from sjd2_engine.evaluation.prompts import scene_cases
from sjd2_engine.models import find_model

SEED = 1000
MODEL = "scenes"
GUIDANCE = (1.0, 1.5)
# Exact decoders, each on the weights that it is fastest on.
DECODERS = {"ar": MODEL, "jacobi": "scenes-sjd2", "sjd": "scenes-sjd2", "coupled": "scenes-sjd2", "sjd2": "scenes-sjd2"}


class PictureTokens:
    """A logits processor: structure tokens where the layout has them, image tokens elsewhere."""

    def __init__(self, engine: Engine, vocabulary: int, prompt: int) -> None:
        layout, self.prompt = engine.model.layout, prompt
        self.mask = torch.full((len(layout), vocabulary), float("-inf"))
        for position, token in enumerate(layout.forced):
            allowed = slice(0, engine.model.transformer.image_vocabulary) if token < 0 else token
            self.mask[position, allowed] = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.mask[input_ids.shape[1] - self.prompt]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--guidance", default=",".join(map(str, GUIDANCE)), help="scales for the first comparison")
    parser.add_argument("--decoders", default=",".join(DECODERS), help="for the second")
    parser.add_argument("--out", type=Path, help="write the JSON document here as well")
    options = parser.parse_args(argv)
    prompts = [case.text for case in scene_cases(options.prompts, SEED)]
    greedy = [against_transformers(prompts, float(scale)) for scale in options.guidance.split(",")]
    exact = among_decoders(prompts, options.decoders.split(","))
    for found in greedy:
        print(
            f"greedy, guidance {found['guidance']}: engine {found['engine_s']:.3f} s, transformers "
            f"{found['transformers_s']:.3f} s a picture, {found['speedup']:.2f}x; same tokens: {found['same_tokens']}"
        )
    for decoder, found in exact["decoders"].items():
        print(f"{decoder:8} on {found['model']}: {found['median_s']:.3f} s a picture, {found['over_ar']:.2f}x AR")
    document = {
        "device": device_name("cpu"), "threads": torch.get_num_threads(), "commit": commit(), "prompts": len(prompts),
        "versions": versions(), "greedy": greedy, "sampling": exact,
    }  # fmt: skip
    write(document, options.out)
    return 0 if all(found["same_tokens"] for found in greedy) else 1


def against_transformers(prompts: Sequence[str], guidance: float) -> dict[str, Any]:
    """Greedy pictures by the engine's AR and by generate, in turns; guidance 1.0 is none."""
    engine, llama = Engine.from_pretrained(MODEL, device="cpu"), loaded()
    ours, theirs = (
        lambda text: engine.generate(text, "ar", temperature=0.0, guidance_scale=guidance).tokens[0],
        lambda text: generated(engine, llama, text, guidance),
    )
    for draw in (ours, theirs):  # the first calls warm up
        draw(prompts[0])
    times: dict[str, list[float]] = {"engine": [], "transformers": []}
    same = True
    for turn, text in enumerate(tqdm(prompts, desc=f"greedy, guidance {guidance}", file=sys.stderr)):
        runs = [("engine", ours), ("transformers", theirs)]
        drawn = {name: timed(draw, text, times[name]) for name, draw in (runs if turn % 2 else runs[::-1])}
        same &= torch.equal(drawn["engine"], drawn["transformers"])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "guidance": guidance,
        "engine_s": medians["engine"],
        "transformers_s": medians["transformers"],
        "speedup": medians["transformers"] / medians["engine"],
        "same_tokens": same,
        "seconds": times,
    }


def loaded() -> Any:
    """The bundled weights as transformers' own Llama."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(find_model(MODEL), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # Llama's own is a picture's token here
    return model.eval()


@torch.inference_mode()
def generated(engine: Engine, llama: Any, text: str, guidance: float) -> Tensor:
    """Image tokens of a greedy picture and its pixels, as the engine's time has them in it."""
    from transformers import LogitsProcessorList

    layout, prompt = engine.model.layout, torch.tensor([engine.model.encode_prompt(text)])
    processor = PictureTokens(engine, llama.config.vocab_size, prompt.shape[1])
    options: dict[str, Any] = {}
    if guidance != 1.0:
        unconditional = torch.tensor([engine.model.encode_prompt("")])
        options = {"guidance_scale": guidance, "negative_prompt_ids": unconditional}
    found = llama.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(layout),
        pad_token_id=0, logits_processor=LogitsProcessorList([processor]), **options,
    )  # fmt: skip
    tokens = layout.image_tokens(found[:, prompt.shape[1] :])
    engine.model.decode_pixels(tokens)
    return tokens[0]


def timed(draw: Callable[[str], Tensor], text: str, times: list[float]) -> Tensor:
    began = time.perf_counter()
    tokens = draw(text)
    times.append(time.perf_counter() - began)
    return tokens


def among_decoders(prompts: Sequence[str], decoders: Sequence[str]) -> dict[str, Any]:
    """Seconds per picture of the engine's decoders with their defaults, in turns."""
    engines = {name: Engine.from_pretrained(name, device="cpu") for name in {DECODERS[d] for d in decoders}}
    times: dict[str, list[float]] = {decoder: [] for decoder in decoders}
    for turn, text in enumerate(tqdm([prompts[0], *prompts], desc="decoders", file=sys.stderr)):
        first = turn % len(decoders)
        for decoder in (*decoders[first:], *decoders[:first]):
            stats = engines[DECODERS[decoder]].generate(text, decoder, seed=turn).stats
            if turn:  # the first one warms up
                times[decoder].append(stats.latency_s)
    medians = {decoder: statistics.median(seconds) for decoder, seconds in times.items()}
    rows = {
        decoder: {
            "model": DECODERS[decoder],
            "median_s": median,
            "over_ar": medians["ar"] / median if "ar" in medians else None,
            "seconds": times[decoder],
        }
        for decoder, median in medians.items()
    }
    return {"decoders": rows, "fastest": min(medians, key=lambda decoder: medians[decoder])}


if __name__ == "__main__":
    raise SystemExit(main())
