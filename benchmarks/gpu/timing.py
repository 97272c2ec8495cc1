"""Times of every op in a CUDA graph, beside a copy, PyTorch's flash attention and the compiled reference."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sjd2_kernels import dispatch

from .cases import BATCH, GROUPED, STEP, STEP_OPS, Case, Sizes, traffic

Call = Callable[[], object]
REPEATS = 9  # measurements of which the median counts
LENGTH_OF_ONE = 0.02  # seconds
LARGEST_ROTATION = 32  # copies of an op's arguments,
ROTATED_MEMORY = 12 * 2**30  # and bytes that they may take together
COMPILE_BUDGET = 200  # seconds in which compiled references are timed; the rest of them is left out

# Every op at the sizes of one image, then what has to move much memory in a batch.
TIMED: tuple[tuple[str, Sizes], ...] = (
    *((op, STEP) for op in dispatch.TRITON if op != "perturb"),
    ("window_attention", GROUPED),
    ("window_attention", replace(STEP, window=16)),
    ("window_attention", replace(STEP, window=1)),
    ("perturb", replace(BATCH, length=2400)),
    *((op, BATCH) for op in ("embed_window", "sample_window", "refine", "rms_norm", "swiglu", "qk_norm_rope_cache")),
)


@dataclass(frozen=True)
class Bench:
    """What depends on the device: `measure` gives seconds per call, `compile` is torch.compile, `cache` bytes of L2."""

    device: torch.device
    measure: Callable[[Sequence[Call]], float]
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    cache: int


def graph_seconds(calls: Sequence[Call]) -> float:
    """Seconds per call, captured one after the other in a CUDA graph; results are kept, so each has its own memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kept = [call() for call in calls]
    torch.cuda.current_stream().wait_stream(stream)
    del kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    seconds = _replay_seconds(graph, 1)
    replays = max(1, min(1000, math.ceil(LENGTH_OF_ONE / seconds)))
    times = [_replay_seconds(graph, replays) for _ in range(REPEATS)]
    del kept, graph
    return statistics.median(times) / len(calls)


def _replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / replays


def copy_rate(bench: Bench, size: int = 2**30) -> float:
    """Bytes per second, read and written, of a large copy."""
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=bench.device)
    return 2 * size / bench.measure([lambda: target.copy_(source)])


def time_ops(
    bench: Bench, rate: float, timed: Sequence[tuple[str, Sizes]] = TIMED, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """One entry for each op and size, as they stand in the JSON document."""
    entries, began = [], time.monotonic()
    for op, sizes in timed:
        args = rotation(bench, op, sizes)
        seconds = bench.measure(calls(dispatch.implementation("triton", op), args))
        moved = traffic(op, sizes)
        entry: dict[str, Any] = {
            "name": op,
            "shape": shape(op, sizes),
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "us": seconds * 1e6,
            "gb_s": moved / seconds / 1e9 if moved else None,
            "share_of_copy": moved / seconds / rate if moved else None,
            "copies": len(args),
            "speedup_vs_compile": None,
        }
        if time.monotonic() - began < COMPILE_BUDGET:
            slow = compiled_seconds(bench, op, args, say)
            entry["speedup_vs_compile"] = slow and slow / seconds
        if op == "window_attention":
            entry["speedup_vs_flash"] = flash_seconds(bench, args, sizes) / seconds
        entries.append(entry)
        say(f"timed {op} {entry['shape']}: {entry['us']:.1f} us")
    return entries


def rotation(bench: Bench, op: str, sizes: Sizes) -> list[list[Any]]:
    """Arguments in as many copies as it takes for the L2 cache to hold none of them when its turn comes."""
    args = Case(sizes, bench.device).arguments(op)
    if op == "commit":
        args[1].zero_()  # lengths must stay inside the picture however often it runs
    held = sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))
    wanted = math.ceil(3 * bench.cache / (traffic(op, sizes) or held))
    copies = max(2, min(LARGEST_ROTATION, wanted, ROTATED_MEMORY // held))
    return [args, *([x.clone() if isinstance(x, Tensor) else x for x in args] for _ in range(copies - 1))]


def calls(function: Callable[..., Any], args: list[list[Any]]) -> list[Call]:
    return [lambda own=own: function(*own) for own in args]


def compiled_seconds(bench: Bench, op: str, args: list[list[Any]], say: Callable[[str], None]) -> float | None:
    """Seconds of the reference under torch.compile; None, and the reason said, where it cannot be compiled."""
    torch.compiler.reset()
    try:
        return bench.measure(calls(bench.compile(dispatch.implementation("reference", op)), args))
    except Exception as error:  # whatever the compiler raises is its own
        say(f"torch.compile of {op}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return None


def flash_seconds(bench: Bench, args: list[list[Any]], sizes: Sizes) -> float:
    """PyTorch's flash attention over the same keys: no mask and no timestep keys, which it cannot have."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, levels: Tensor, front: int, scale: float):
        seen = slice(front, front + sizes.length + sizes.window)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys[:, seen], values[:, seen]))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)

    return bench.measure(calls(attend, args))


def step_seconds(bench: Bench, sizes: Sizes = STEP) -> float:
    """All that a step does outside the model, one after the other in one graph; state and logits rotate."""
    copies = max(2, math.ceil(3 * bench.cache / (traffic("sample_window", sizes) or 1)))
    return bench.measure([step(Case(sizes, bench.device, seed)) for seed in range(min(copies, LARGEST_ROTATION))])


def step(case: Case) -> Call:
    """The ops of one step on one state, which they change."""
    embed, sample, verify, commit, refine = (dispatch.implementation("triton", op) for op in STEP_OPS)
    (embed_args, sample_args, verify_args, commit_args, refine_args) = (case.arguments(op) for op in STEP_OPS)
    lengths = case.state["lengths"]

    def run() -> object:
        embeds = embed(*embed_args)
        tokens, p, bad = sample(*sample_args)
        decided, accepted, settled, fault = verify(tokens, p, bad, *verify_args[3:])
        commit(decided, accepted, fault, *commit_args[3:])
        refine(decided, p, accepted, settled, lengths, *refine_args[5:])
        return embeds, p

    return run


def shape(op: str, s: Sizes) -> str:
    """The sizes that matter to an op."""
    if op in ("window_attention", "qk_norm_rope_cache", "kv_compact"):
        return f"{s.rows} rows, {s.window} queries, {s.length} keys, {s.heads}/{s.kv_heads} heads of {s.head}"
    if op in ("rms_norm", "swiglu"):
        return f"{s.rows * s.window} rows of {s.dim if op == 'rms_norm' else 2 * s.feed}"
    if op == "perturb":
        return f"B={s.batch} L={s.length} D={s.dim}"
    return f"B={s.batch} W={s.window} V={s.vocab} D={s.dim}"
