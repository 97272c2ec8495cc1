"""The C core on CPU tensors, through ctypes: one function per op, with the reference's name and signature.

Each checks layout, dtype and shape of every tensor (`NotSupported` before anything is touched), allocates the
outputs and makes one call. What the core itself refuses, such as a token outside the table, is a ValueError.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from . import build
from .dispatch import NotSupported

VERSION = 10000  # SJD2_VERSION of the header that the layouts below were written for

_I32, _I64, _F32 = torch.int32, torch.int64, torch.float32
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MATCH = 0


def _load() -> ctypes.CDLL:
    reason = build.why_unusable()
    if reason is not None:
        raise ImportError(reason)
    try:
        library = ctypes.CDLL(str(build.PACKAGE / build.LIBRARY))
    except OSError as error:
        raise ImportError(f"the C core does not load ({error}): `{build.COMMAND}` builds it anew") from error
    library.sjd2_version.restype = ctypes.c_int64
    if library.sjd2_version() != VERSION:
        raise ImportError(
            f"the C core has version {library.sjd2_version()}, expected {VERSION}: `{build.COMMAND}` builds it anew"
        )
    for name in ("sjd2_status_string", "sjd2_instruction_set"):
        getattr(library, name).restype = ctypes.c_char_p
    library.sjd2_status_string.argtypes = [ctypes.c_int64]
    for name, count in (("sjd2_sample_window_workspace", 2), ("sjd2_refine_workspace", 3)):
        getattr(library, name).restype = ctypes.c_int64
        getattr(library, name).argtypes = [ctypes.c_int64] * count
    return library


_library = _load()


class Function:
    """A function of the library; `layout` are the struct's fields after `size`: q integers, d doubles, P pointers."""

    def __init__(self, library: ctypes.CDLL, name: str, layout: str) -> None:
        self.name = f"sjd2_{name}"
        self._struct = struct.Struct(f"@N{layout}")
        self._call = getattr(library, self.name)
        self._call.restype, self._call.argtypes = ctypes.c_int64, [ctypes.c_char_p]

    def status(self, *values: float) -> int:
        """Fill the struct and call."""
        return self._call(self._struct.pack(self._struct.size, *values))

    def __call__(self, *values: float) -> None:
        status = self.status(*values)
        if status:
            raise ValueError(f"{self.name}: {_library.sjd2_status_string(status).decode()} (status {status})")


LAYOUTS = {
    "random": "qqqqqqqPPP",
    "embed_window": "qqqqqqPPPPPPPP",
    "perturb": "qqqqqqqqPPPPPPPP",
    "sample_window": "qqqqqqqqqqdddPPPPPPPPPPq",
    "verify": "qqqqqqqPPPPPPPPPPPPPPPP",
    "commit": "qqqqqPPPPPPPPPPP",
    "refine": "qqqqqqqqqqPPPPPPPPPPPPPPPPPPPPq",
}


def functions(library: ctypes.CDLL) -> dict[str, Function]:
    """The functions of a loaded core by name."""
    return {name: Function(library, name, layout) for name, layout in LAYOUTS.items()}


_call = functions(_library)


def instruction_set() -> str:
    """What the core was chosen for on this processor: "avx512", "avx2" or "baseline"."""
    return _library.sjd2_instruction_set().decode()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _need(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise NotSupported unless `tensor` is dense, on the CPU, and of this dtype and shape."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous():
        return
    layout = "" if tensor.is_contiguous() else " non-contiguous"
    raise NotSupported(
        f"{name} is{layout} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: the C core takes dense {dtype} "
        f"{shape} on the CPU"
    )


def _type(name: str, tensor: Tensor) -> int:
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise NotSupported(f"{name} is {tensor.dtype}: the C core takes float32, float16 and bfloat16")
    return kind


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def embed_window(
    tokens: Tensor,
    levels: Tensor,
    table: Tensor,
    start: Tensor,
    noisy: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """`reference.embed_window` in C; table and start may also be float16 or bfloat16."""
    (batch, window), (rows, dim), kind = tokens.shape, table.shape, _type("table", table)
    tokens, levels = tokens.contiguous(), levels.contiguous()
    _need("tokens", tokens, _I64, batch, window)
    _need("levels", levels, _I32, batch, window)
    _need("table", table, table.dtype, rows, dim)
    _need("start", start, table.dtype, batch, dim)
    if noisy is None or mean is None or std is None:
        noisy = None
    else:
        _need("noisy", noisy, _F32, batch, window - 1, dim)
        _need("mean", mean, _F32, dim)
        _need("std", std, _F32, dim)
    out = _empty(table.dtype, batch, window, dim)
    _call["embed_window"](
        batch, window, dim, rows, kind, torch.get_num_threads(), tokens.data_ptr(), levels.data_ptr(),
        table.data_ptr(), start.data_ptr(), _at(noisy), _at(mean), _at(std), out.data_ptr(),
    )  # fmt: skip
    return out


def perturb(
    x: Tensor,
    levels: Tensor,
    positions: Tensor,
    seeds: Tensor,
    mean: Tensor,
    std: Tensor,
    times: Tensor,
    epoch: int,
    denormalize: bool,
) -> Tensor:
    """`reference.perturb` in C; x may also be float16 or bfloat16."""
    (batch, length, dim), kind = x.shape, _type("x", x)
    levels, positions = levels.contiguous(), positions.contiguous()
    _need("x", x, x.dtype, batch, length, dim)
    _need("levels", levels, _I32, batch, length)
    _need("positions", positions, _I64, batch, length)
    _need("seeds", seeds, _I64, batch)
    _need("mean", mean, _F32, dim)
    _need("std", std, _F32, dim)
    _need("times", times, _F32, times.numel())
    out = _empty(x.dtype if denormalize else _F32, batch, length, dim)
    _call["perturb"](
        batch, length, dim, kind, times.numel(), epoch, int(denormalize), torch.get_num_threads(), x.data_ptr(),
        levels.data_ptr(), positions.data_ptr(), seeds.data_ptr(), mean.data_ptr(), std.data_ptr(),
        times.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def sample_window(
    logits: Tensor,
    seeds: Tensor,
    lengths: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    legal_begin: int,
    legal_end: int,
    per_position: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.sample_window` in C; logits may also be float16 or bfloat16."""
    kind, (batch, window, vocab) = _type("logits", logits), logits.shape[-3:]
    guided = logits.dim() == 4
    _need("logits", logits, logits.dtype, *((2,) * guided), batch, window, vocab)
    _need("seeds", seeds, _I64, batch)
    _need("lengths", lengths, _I32, batch)
    _need("steps", steps, _I32, batch)
    if noise is not None:
        _need("noise", noise, _F32, batch, noise.shape[1], vocab)
    threads = torch.get_num_threads()
    tokens, bad = _empty(_I64, batch, window), _empty(torch.bool, batch, window)
    p = _empty(_F32, batch, window, vocab if need_p else 0)
    size = _library.sjd2_sample_window_workspace(vocab, threads)
    workspace = _empty(_F32, max(size, 0) // 4)
    at = logits.data_ptr()
    _call["sample_window"](
        batch, window, vocab, kind, 0 if noise is None else noise.shape[1], top_k, legal_begin, legal_end,
        int(per_position), threads, guidance, temperature, top_p, at,
        at + batch * window * vocab * logits.element_size() if guided else 0, seeds.data_ptr(), lengths.data_ptr(),
        steps.data_ptr(), _at(noise), tokens.data_ptr(), p.data_ptr() if need_p else 0, bad.data_ptr(),
        workspace.data_ptr(), size,
    )  # fmt: skip
    return tokens, p, bad


def verify(
    tokens: Tensor,
    p: Tensor,
    bad: Tensor,
    drafts: Tensor,
    q: Tensor,
    status: Tensor,
    levels: Tensor,
    forced: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    seeds: Tensor,
    total: int,
    rule: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.verify` in C."""
    (batch, window), padded = tokens.shape, forced.shape[0]
    vocab = 0 if rule == _MATCH else p.shape[-1]
    _need("tokens", tokens, _I64, batch, window)
    _need("bad", bad, torch.bool, batch, window)
    _need("drafts", drafts, _I64, batch, window - 1)
    _need("status", status, _I32, batch, window - 1)
    _need("levels", levels, _I32, batch, window - 1)
    _need("forced", forced, _I64, padded)
    for name, tensor in (("lengths", lengths), ("steps", steps), ("done", done)):
        _need(name, tensor, _I32, batch)
    _need("seeds", seeds, _I64, batch)
    if rule != _MATCH:
        _need("p", p, _F32, batch, window, vocab)
        _need("q", q, _F32, batch, window - 1, vocab)
    decided = _empty(_I64, batch, window)
    accepted, settled, fault = _empty(_I32, batch), _empty(_I32, batch), _empty(_I32, batch)
    _call["verify"](
        batch, window, vocab, padded, total, rule, torch.get_num_threads(), tokens.data_ptr(), p.data_ptr(),
        bad.data_ptr(), drafts.data_ptr(), q.data_ptr(), status.data_ptr(), levels.data_ptr(), forced.data_ptr(),
        lengths.data_ptr(), steps.data_ptr(), done.data_ptr(), seeds.data_ptr(), decided.data_ptr(),
        accepted.data_ptr(), settled.data_ptr(), fault.data_ptr(),
    )  # fmt: skip
    return decided, accepted, settled, fault


def commit(
    decided: Tensor,
    accepted: Tensor,
    fault: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    failed: Tensor,
    failed_step: Tensor,
    histogram: Tensor,
    kv_lengths: Tensor,
    total: int,
) -> None:
    """`reference.commit` in C."""
    (batch, window), padded = decided.shape, tokens.shape[1]
    _need("decided", decided, _I64, batch, window)
    _need("tokens", tokens, _I64, batch, padded)
    counters = (accepted, fault, lengths, steps, done, failed, failed_step)
    for name, tensor in zip(("accepted", "fault", "lengths", "steps", "done", "failed", "failed_step"), counters):
        _need(name, tensor, _I32, batch)
    _need("histogram", histogram, _I64, batch, window + 1)
    _need("kv_lengths", kv_lengths, _I32, kv_lengths.numel())
    _call["commit"](
        batch, window, padded, total, kv_lengths.numel(), decided.data_ptr(), accepted.data_ptr(), fault.data_ptr(),
        tokens.data_ptr(), lengths.data_ptr(), steps.data_ptr(), done.data_ptr(), failed.data_ptr(),
        failed_step.data_ptr(), histogram.data_ptr(), kv_lengths.data_ptr(),
    )  # fmt: skip


def refine(
    decided: Tensor,
    p: Tensor,
    accepted: Tensor,
    settled: Tensor,
    lengths: Tensor,
    forced: Tensor,
    initial: Tensor,
    drafts: Tensor,
    status: Tensor,
    levels: Tensor,
    q: Tensor,
    noisy: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ratios: Tensor | None,
    noise: Tensor | None,
    directions: Tensor | None,
    seeds: Tensor,
    fresh_level: int,
) -> None:
    """`reference.refine` in C; the table may also be float16 or bfloat16."""
    (batch, window), padded, vocab = decided.shape, forced.shape[0], q.shape[-1]
    _need("decided", decided, _I64, batch, window)
    for name, tensor in (("accepted", accepted), ("settled", settled), ("lengths", lengths)):
        _need(name, tensor, _I32, batch)
    _need("forced", forced, _I64, padded)
    _need("initial", initial, _I64, batch, padded)
    _need("drafts", drafts, _I64, batch, window - 1)
    _need("status", status, _I32, batch, window - 1)
    _need("levels", levels, _I32, batch, window - 1)
    _need("q", q, _F32, batch, window - 1, vocab)
    if vocab:
        _need("p", p, _F32, batch, window, vocab)
    dim = rows = kind = level_count = 0
    workspace, size = None, 0
    if noisy is not None:
        assert table is not None and mean is not None and std is not None and ratios is not None
        (rows, dim), kind, level_count = table.shape, _type("table", table), ratios.numel()
        _need("noisy", noisy, _F32, batch, window - 1, dim)
        _need("table", table, table.dtype, rows, dim)
        _need("mean", mean, _F32, dim)
        _need("std", std, _F32, dim)
        _need("ratios", ratios, _F32, level_count)
        _need("seeds", seeds, _I64, batch)
        if noise is not None:
            _need("noise", noise, _F32, batch, padded, dim)
        if directions is not None:
            if vocab not in (0, directions.shape[0]):
                raise NotSupported(f"directions have {directions.shape[0]} rows, q has {vocab} ids")
            vocab = directions.shape[0]
            _need("directions", directions, _F32, vocab, dim)
            size = _library.sjd2_refine_workspace(batch, window, vocab)
            workspace = _empty(_F32, max(size, 0) // 4)
    keeps_q = q.shape[-1] > 0
    _call["refine"](
        batch, window, padded, vocab, dim, rows, kind, level_count, fresh_level, torch.get_num_threads(),
        decided.data_ptr(), p.data_ptr() if keeps_q else 0, accepted.data_ptr(), settled.data_ptr(),
        lengths.data_ptr(), forced.data_ptr(), initial.data_ptr(), drafts.data_ptr(), status.data_ptr(),
        levels.data_ptr(), q.data_ptr() if keeps_q else 0, _at(noisy), _at(table), _at(mean), _at(std), _at(ratios),
        _at(noise), _at(directions), seeds.data_ptr(), _at(workspace), size,
    )  # fmt: skip
