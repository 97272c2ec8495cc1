"""The ops on arrays of other libraries: `dlpack.sample_window(logits, seeds, …)` with NumPy, CuPy or JAX arrays.

Every op of `torch.ops.sjd2` is a function here, with its arguments in the same order or by name, and so are the random
numbers `uniforms`, `gumbel` and `normals` of `rng`. Whatever has `__dlpack__` may be an argument; results are arrays of
the library that the first array came from. Nothing is copied, but for arrays that are marked read-only.

Ops that write into their arguments return what they wrote, in the order of the arguments: of libraries whose arrays can
be written (NumPy, CuPy, PyTorch) the very arrays, of JAX new ones. On a GPU the ops run on PyTorch's current stream:
arrays that another stream works on must be waited for before they are written into.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import ops, rng

RANDOM = {"uniforms": rng.uniforms, "gumbel": rng.gumbel, "normals": rng.normals}
NAMES = (*ops.NAMES, *RANDOM)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KINDS: dict[tuple[torch.dtype, ...], tuple[str, ...]] = {
    (torch.int64,): (
        "tokens", "drafts", "decided", "forced", "initial", "positions", "histogram", "seeds",
    ),
    (torch.int32,): (
        "levels", "lengths", "steps", "done", "failed", "failed_step", "status", "accepted", "settled", "fault",
        "kv_lengths", "counts", "source",
    ),
    (torch.float32,): ("p", "q", "noisy", "mean", "std", "ratios", "noise", "directions", "times", "cos", "sin"),
    (torch.bool,): ("bad",),
    _FLOATS: (
        "logits", "table", "start", "x", "weight", "residual", "gate_up", "qkv", "keys", "values", "q_weight", "q_bias",
        "k_weight", "k_bias",
    ),
}  # fmt: skip
DTYPES = {name: kinds for kinds, names in _KINDS.items() for name in names}
# Elsewhere `q` is a distribution, here the queries of a model.
QUERIES = {("window_attention", "q"): _FLOATS}
IMMUTABLE = ("jax", "jaxlib")
HOMES = ("numpy", "cupy", "torch", *IMMUTABLE)


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in NAMES:
        raise AttributeError(f"sjd2_kernels.dlpack has no op {name!r}: it has {', '.join(NAMES)}")
    return partial(call, name)


def __dir__() -> list[str]:
    return [*globals(), *NAMES]


def call(name: str, *args: Any, **named: Any) -> Any:
    """Run the op `name`; raises TypeError for what is no array or has another dtype, ValueError where it cannot be
    written, and what the op itself raises."""
    parameters, written = _signature(name)
    given = _in_order(name, parameters, args, named)
    home = next((_home(value) for value in given if _is_array(value)), "numpy")
    if home not in HOMES:
        raise TypeError(f"{name}: arrays of {home!r} cannot be returned; the first must be of {', '.join(HOMES)}")
    tensors, results = list(given), []
    for index, (label, value) in enumerate(zip(parameters, given, strict=True)):
        if not _is_array(value):
            continue
        tensors[index] = _tensor(name, label, value, label in written)
        if label in written:
            results.append(index)
    function = RANDOM.get(name) or getattr(torch.ops.sjd2, name)
    out = function(*tensors)
    if not written:
        return _array(out, home) if isinstance(out, Tensor) else tuple(_array(part, home) for part in out)
    # Ops that write return nothing of their own, or one tensor: that one comes first.
    own = [_array(out, home)] if isinstance(out, Tensor) else []
    return tuple(own + [_array(tensors[i], home) if _home(given[i]) in IMMUTABLE else given[i] for i in results])


@cache
def _signature(name: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the arguments, and those that the op writes into."""
    if name in RANDOM:
        return tuple(inspect.signature(RANDOM[name]).parameters), frozenset()
    arguments = getattr(torch.ops.sjd2, name).default._schema.arguments
    written = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return tuple(a.name for a in arguments), frozenset(written)


def _in_order(name: str, parameters: Sequence[str], args: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    try:
        bound = inspect.Signature(
            [inspect.Parameter(label, inspect.Parameter.POSITIONAL_OR_KEYWORD) for label in parameters]
        ).bind(*args, **named)
    except TypeError as error:
        raise TypeError(f"{name}: {error}; expected ({', '.join(parameters)})") from None
    return list(bound.arguments.values())


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__")


def _home(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _tensor(name: str, label: str, array: Any, written: bool) -> Tensor:
    """The array's memory as a tensor; a copy where it must not be written, or is marked read-only."""
    if label not in DTYPES:
        raise TypeError(f"{name}: `{label}` is an array, expected a number")
    read_only = getattr(getattr(array, "flags", None), "writeable", True) is False
    if read_only and written:
        raise ValueError(f"{name} writes into `{label}`, which is read-only: pass a copy that can be written")
    try:
        tensor = torch.from_dlpack(array.copy() if read_only else array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: `{label}` ({type(array).__name__}) cannot be handed over: {error}") from error
    expected = QUERIES.get((name, label), DTYPES[label])
    if tensor.dtype not in expected:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in expected)
        hint = "convert it"
        if _home(array) in IMMUTABLE and tensor.dtype == torch.int32:
            hint = 'JAX has 64 bits after jax.config.update("jax_enable_x64", True)'
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: `{label}` is {got}, expected {wanted}: {hint}")
    return tensor.clone() if written and _home(array) in IMMUTABLE else tensor


def _array(tensor: Tensor, home: str) -> Any:
    """The tensor's memory as an array of a library."""
    if home == "torch":
        return tensor
    if home == "numpy":
        return tensor.numpy()
    if home == "cupy":
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.from_dlpack(tensor)
    import jax.dlpack  # pyright: ignore[reportMissingImports]

    return jax.dlpack.from_dlpack(tensor.contiguous())
