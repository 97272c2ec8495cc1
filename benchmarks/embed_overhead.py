"""What a window costs beside a model that is not ours: `python benchmarks/embed_overhead.py`.

The model is a plain PyTorch decoder with the layers of a 7B model (width 4096, 32 heads, SwiGLU of 11008, an image
vocabulary of 8192) and a cache of its own, but only few of them, so that it fits: a deeper model takes longer, the
window does not. Measured is a real decode of one picture with guidance: `window.inputs()` and `window.step()` on one
side, the model's own forward pass on the other, in turns. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd2_engine import DecodeConfig, JacobiWindow, TokenLayout
from sjd2_engine.evaluation.machine import commit, device_name, versions
from sjd2_kernels import dispatch

WIDTH, HEADS, INNER, VOCAB = 4096, 32, 11008, 8192
GRID = 24
DECODERS: dict[str, dict[str, Any]] = {
    "jacobi": {},
    "sjd": {"top_k": 2000},
    "coupled": {"top_k": 2000, "coupling": "maximal"},
    "sjd2": {"top_k": 2000, "verification": "ratio"},
}


class Layer(nn.Module):
    """A Llama layer; its cache is two tensors [R, H, S, d] that grow, and are cut by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(norm(x)).chunk(3, -1))
        cache[:] = [k, v] if not cache else [torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True)]
        seen = torch.ones(x.shape[1], cache[0].shape[2], dtype=torch.bool).tril(cache[0].shape[2] - x.shape[1])
        attended = F.scaled_dot_product_attention(q, *cache, attn_mask=seen)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class Model(nn.Module):
    """Embeddings [R, T, D] in, logits over image ids [R, T, V] out."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor, caches: list[list[Tensor]]) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        return self.head(norm(x))


def timed(into: list[float], work: Callable[..., Any], *args: Any) -> Any:
    """Do the work and note its milliseconds."""
    start = time.perf_counter()
    result = work(*args)
    into.append(1e3 * (time.perf_counter() - start))
    return result


def measure(model: Model, decoder: str, width: int, steps: int, prompt: int) -> dict[str, Any]:
    """Medians over the steps of one decode, after a first step that is not counted."""
    config = DecodeConfig(decoder=decoder, window=width, guidance_scale=3.0, **DECODERS[decoder])
    layout = TokenLayout.raster(GRID, GRID, image_vocab=VOCAB)
    make = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB + 1, WIDTH, generator=make)
    window = JacobiWindow(config, layout, embedding, torch.randn(1, WIDTH, generator=make), seeds=[0])
    caches: list[list[Tensor]] = [[] for _ in model.layers]
    model(torch.randn(2, prompt, WIDTH, generator=make), caches)
    times: dict[str, list[float]] = {"inputs": [], "forward": [], "step": []}
    for _ in range(steps + 1):
        embeds = timed(times["inputs"], window.inputs).embeds.expand(2, -1, -1)
        logits = timed(times["forward"], model, embeds, caches)
        timed(times["step"], window.step, logits[:, None])
        for cache in caches:  # the rollback
            cache[:] = [part[:, :, : prompt + int(window.lengths)] for part in cache]
    ms = {name: statistics.median(values[1:]) for name, values in times.items()}
    overhead = ms["inputs"] + ms["step"]
    return {
        "decoder": decoder, "inputs_ms": ms["inputs"], "step_ms": ms["step"], "forward_ms": ms["forward"],
        "overhead_ms": overhead, "percent_of_forward": 100.0 * overhead / ms["forward"],
        "tokens_accepted": int(window.lengths),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What a window costs beside a model's own forward pass.")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (a 7B model has 32)")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per decoder")
    parser.add_argument("--prompt", type=int, default=32, help="entries of the prompt")
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        model = Model(given.layers).eval()
        for _ in range(2):
            model(torch.randn(2, given.window, WIDTH), [[] for _ in model.layers])  # warm-up
        rows = [measure(model, name, given.window, given.steps, given.prompt) for name in DECODERS]
    for row in rows:
        forward, overhead, percent = row["forward_ms"], row["overhead_ms"], row["percent_of_forward"]
        print(f"{row['decoder']:8}  forward {forward:8.2f} ms  window {overhead:5.2f} ms  {percent:.2f} %")
    print(json.dumps({
        "device": device_name(torch.device("cpu")), "dtype": "float32", "threads": torch.get_num_threads(),
        "versions": versions(), "commit": commit(),
        "ops": dispatch.choice("sample_window", "cpu")[0],
        "model": {
            "layers": given.layers, "width": WIDTH, "vocabulary": VOCAB,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        "window": given.window, "rows": 2, "steps": given.steps, "decoders": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
