"""Registration of `torch.ops.sjd2.*`: schemas, what they mutate, fake kernels; `dispatch` picks the implementation.

The schemas hold raw tensors and scalars only, and every op makes a fixed number of random draws, so that each can
be one fused kernel and part of a captured graph.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import dispatch

NAMES = tuple(dispatch.TRITON)

_library = torch.library.Library("sjd2", "DEF")
_library.define(
    "embed_window(Tensor tokens, Tensor levels, Tensor table, Tensor start, Tensor? noisy, Tensor? mean, "
    "Tensor? std) -> Tensor"
)
_library.define(
    "perturb(Tensor x, Tensor levels, Tensor positions, Tensor seeds, Tensor mean, Tensor std, Tensor times, "
    "int epoch, bool denormalize) -> Tensor"
)
_library.define(
    "sample_window(Tensor logits, Tensor seeds, Tensor lengths, Tensor steps, Tensor? noise, float guidance, "
    "float temperature, int top_k, float top_p, int legal_begin, int legal_end, bool per_position, "
    "bool need_p) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "verify(Tensor tokens, Tensor p, Tensor bad, Tensor drafts, Tensor q, Tensor status, Tensor levels, "
    "Tensor forced, Tensor lengths, Tensor steps, Tensor done, Tensor seeds, int total, int rule) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "commit(Tensor decided, Tensor accepted, Tensor fault, Tensor(a!) tokens, Tensor(b!) lengths, "
    "Tensor(c!) steps, Tensor(d!) done, Tensor(e!) failed, Tensor(f!) failed_step, Tensor(g!) histogram, "
    "Tensor(h!) kv_lengths, int total) -> ()"
)
_library.define(
    "refine(Tensor decided, Tensor p, Tensor accepted, Tensor settled, Tensor lengths, Tensor forced, "
    "Tensor initial, Tensor(a!) drafts, Tensor(b!) status, Tensor(c!) levels, Tensor(d!) q, "
    "Tensor(e!)? noisy, Tensor? table, Tensor? mean, Tensor? std, Tensor? ratios, Tensor? noise, "
    "Tensor? directions, Tensor seeds, int fresh_level) -> ()"
)
_library.define("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual) -> Tensor")
_library.define("swiglu(Tensor gate_up) -> Tensor")
_library.define(
    "qk_norm_rope_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor lengths, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, int norm, float eps, int front) -> Tensor"
)
_library.define(
    "window_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, Tensor? levels, int front, "
    "float scale) -> Tensor"
)
_library.define(
    "kv_compact(Tensor(a!) keys, Tensor(b!) values, Tensor lengths, Tensor source, Tensor counts, int front) -> ()"
)
for _name in NAMES:
    _library.impl(_name, partial(dispatch.run, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("sjd2::embed_window", lib=_library)
def _(tokens: Tensor, levels: Tensor, table: Tensor, start: Tensor, noisy: Tensor | None, *_: object) -> Tensor:
    return table.new_empty(*tokens.shape, table.shape[1])


@torch.library.register_fake("sjd2::perturb", lib=_library)
def _(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x) if rest[-1] else x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("sjd2::sample_window", lib=_library)
def _(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, window, vocab = logits.shape[-3:]
    return (
        logits.new_empty(batch, window, dtype=torch.int64),
        logits.new_empty(batch, window, vocab if rest[-1] else 0, dtype=torch.float32),
        logits.new_empty(batch, window, dtype=torch.bool),
    )


@torch.library.register_fake("sjd2::verify", lib=_library)
def _(tokens: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = [tokens.new_empty(tokens.shape[0], dtype=torch.int32) for _ in range(3)]
    return torch.empty_like(tokens), counts[0], counts[1], counts[2]


@torch.library.register_fake("sjd2::commit", lib=_library)
def _(*_: object) -> None: ...


@torch.library.register_fake("sjd2::refine", lib=_library)
def _(*_: object) -> None: ...


@torch.library.register_fake("sjd2::rms_norm", lib=_library)
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sjd2::swiglu", lib=_library)
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.register_fake("sjd2::qk_norm_rope_cache", lib=_library)
def _(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, keys: Tensor, *_: object) -> Tensor:
    rows, width, heads, dim = qkv.shape
    return qkv.new_empty(rows, width, heads - 2 * keys.shape[2], dim)


@torch.library.register_fake("sjd2::window_attention", lib=_library)
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("sjd2::kv_compact", lib=_library)
def _(*_: object) -> None: ...


def _save_levels(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, levels, _, _, _, std, times, _, denormalize = inputs
    ctx.save_for_backward(levels, std, times)
    ctx.denormalize, ctx.dtype = denormalize, x.dtype  # pyright: ignore[reportAttributeAccessIssue]


def _perturb_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    """∂e/∂x = (1 − t)/std; back in model space the std cancels. Mean and std are taken as constants."""
    levels, std, times = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    keep = torch.where(levels >= 0, 1.0 - times[levels.clamp(min=0)], 1.0).unsqueeze(-1)
    scaled = grad.float() * keep
    if not ctx.denormalize:  # pyright: ignore[reportAttributeAccessIssue]
        scaled = scaled / std
    return (scaled.to(ctx.dtype), *[None] * 8)  # pyright: ignore[reportAttributeAccessIssue]


torch.library.register_autograd("sjd2::perturb", _perturb_backward, setup_context=_save_levels, lib=_library)
