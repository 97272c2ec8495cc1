"""Where the time of a step goes: kernels by kind, and the gaps between them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .decoding import loop
from .geometry import Geometry, RandomModel, mid_picture, seek
from .run import Run

# First match wins; names of kernels on CUDA, of operators on the CPU.
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"window_attention|_combine_kernel|merge_extra|flash|fmha|scaled_dot_product|attention_kernel"),
    ("ops of the window", r"sample|_chunk_kernel|_row_kernel|_draw_kernel|verify|_replace_kernel|_scan_kernel|commit"
     r"|refine|_denoise_kernel|_shift_kernel|embed_window|perturb"),
    ("ops of the model", r"rms_norm|swiglu|qk_norm_rope|kv_compact"),
    ("matrix products", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|matmul|aten::(mm|bmm|addmm|linear)|mkldnn"),
)  # fmt: skip
REST, GAPS = "other kernels", "gaps"
GAPS_GOAL = 0.03
Span = tuple[str, float, float]
"""Name, begin and end in microseconds."""


def kind_of(name: str) -> str:
    """What a kernel or operator belongs to."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), REST)


def shares(spans: Sequence[Span]) -> dict[str, float]:
    """Parts of the time from the first begin to the last end, by kind; gaps are when nothing ran.

    Where kernels overlap, the time is that of the one that began first.
    """
    begin, end = min(span[1] for span in spans), max(span[2] for span in spans)
    parts = defaultdict(float, {GAPS: 0.0})
    reached = begin
    for name, start, stop in sorted(spans, key=lambda span: span[1]):
        parts[GAPS] += max(0.0, start - reached)
        parts[kind_of(name)] += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return {kind: part / (end - begin) for kind, part in sorted(parts.items(), key=lambda item: -item[1])}


def breakdown(
    run: Run, geometry: Geometry, model: RandomModel, cells: Iterable[tuple[int, int]], count: int = 10
) -> None:
    """Shares, kernels per step and the dearest kernels for each (batch, window)."""
    found: list[dict[str, Any]] = []
    run.results.append({"model": geometry.name, "weights": "random", "cells": found})
    for batch, window in cells:
        decoder = "ar" if window == 1 else "jacobi"
        what = f"{geometry.name} (random weights) {decoder} B={batch} W={window}"
        if not run.has_time_for(f"profile of {what}", 60):
            continue
        spans = profiled(run, geometry, model, decoder, batch, window, count)
        if not spans:
            run.skip(f"profile of {what}", "the profiler saw nothing; it may need rights that this machine denies")
            continue
        entry = {"decoder": decoder, "batch": batch, "window": window, "steps": count, "shares": shares(spans)}
        entry["kernels_per_step"] = len(spans) / count
        entry["step_ms"] = (max(s[2] for s in spans) - min(s[1] for s in spans)) / 1e3 / count
        entry["dearest"] = dearest(spans, count)
        found.append(entry)
        run.say(f"{what}: " + ", ".join(f"{kind} {part:.1%}" for kind, part in entry["shares"].items()))
        run.goal(f"{what}: share of gaps between kernels", entry["shares"][GAPS], at_most=GAPS_GOAL)
        run.save()
        run.free()


def profiled(
    run: Run, geometry: Geometry, model: RandomModel, decoder: str, batch: int, window: int, count: int
) -> list[Span]:
    """What `count` steps of the engine's loop ran, in mid-picture and after a warm-up."""
    slots = mid_picture(geometry, model, geometry.config(decoder, window), batch, run.attention)
    loop(slots, 3)
    seek(slots, geometry)
    return recorded(run, lambda: loop(slots, count))


def recorded(run: Run, call: Any) -> list[Span]:
    """What ran on the device during a call; on the CPU, the outermost operators of a kind and the innermost others."""
    cuda = run.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        call()
        run.settle()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events() or []
        if event.device_type == wanted
        and _counts(event)
        and not getattr(event, "is_user_annotation", False)
        and event.time_range.end > event.time_range.start
    ]


def _counts(event: Any) -> bool:
    """Whether an operator counts as one, and not as a part of another or as several; kernels always do."""
    above = event.cpu_parent
    while above is not None:
        if kind_of(above.name) != REST:
            return False
        above = above.cpu_parent
    return kind_of(event.name) != REST or not event.cpu_children


def dearest(spans: Sequence[Span], count: int, most: int = 12) -> list[dict[str, Any]]:
    """The kernels that take most time: microseconds and calls per step."""
    times: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for name, begin, end in spans:
        times[name] += end - begin
        calls[name] += 1
    return [
        {"name": name[:120], "kind": kind_of(name), "us_per_step": time / count, "calls_per_step": calls[name] / count}
        for name, time in sorted(times.items(), key=lambda item: -item[1])[:most]
    ]
