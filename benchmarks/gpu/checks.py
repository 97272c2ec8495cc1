"""Every Triton op on the device against the reference: integers equal, floats within what the dtype allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sjd2_kernels import dispatch, reference, rng

from .cases import GROUPED, MUTATED, STEP, Case, Sizes, plain_attention

SAMPLE_TOP_P = 8  # its place among the arguments of sample_window
NEAR = 1e-5  # two scores so close may change places by rounding
SMALL = Sizes(
    batch=3, window=7, vocab=1000, dim=100, feed=300, heads=6, kv_heads=2, head=80, length=700, layers=2, top_k=50
)
ODD = Sizes(
    batch=2, window=33, vocab=257, dim=1280, feed=516, heads=5, kv_heads=5, head=100, length=40, layers=1,
    norm=reference.RMS_NORM, rule=reference.RATIO, top_k=0, top_p=0.9,
)  # fmt: skip
LONE = Sizes(
    window=2, vocab=16384, dim=64, feed=64, heads=32, kv_heads=1, head=64, length=1, layers=3,
    norm=reference.NO_NORM, rule=reference.COUPLED, top_k=2000, top_p=0.95,
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What one op did in one dtype; `error` as a share of what is allowed, `ties` = draws that rounding may swap."""

    op: str
    dtype: str
    passed: bool
    max_error: float
    error: float
    ties: int
    reason: str


HALF, EVERY = (torch.bfloat16,), (torch.float32, torch.float16, torch.bfloat16)
ALL_OPS, ATTENTION = tuple(dispatch.TRITON), ("window_attention",)
# (sizes, dtypes, ops)
PLAN = (
    *((sizes, EVERY, ALL_OPS) for sizes in (SMALL, ODD, LONE)),
    (STEP, HALF, ALL_OPS),
    *((sizes, HALF, ATTENTION) for sizes in (GROUPED, replace(STEP, window=16), replace(STEP, window=1))),
)


def run_checks(
    device: torch.device, plan: Sequence[tuple[Sizes, Sequence[torch.dtype], Sequence[str]]] = PLAN
) -> Iterator[Check]:
    for sizes, dtypes, ops in plan:
        for dtype in dtypes:
            case = Case(replace(sizes, dtype=dtype), device)
            for op in ops:
                yield check(op, case.arguments(op), dtype)


def check(op: str, args: list[Any], dtype: torch.dtype) -> Check:
    """One call, on copies of `args`."""
    name = str(dtype).removeprefix("torch.")
    expected = outputs("reference", op, args)
    try:
        got = outputs("triton", op, args)
    except dispatch.NotSupported as error:
        return Check(op, name, False, 0.0, 0.0, 0, f"refused: {error}")
    wide = outputs("reference", op, [_widened(x) for x in args])
    plain = [plain_attention(args)] if op == "window_attention" else expected
    ties = near_ties(op, args, expected, got)
    errors, shares, swapped, reason = [0.0], [0.0], 0, ""
    for place, (mine, theirs, exact, own) in enumerate(zip(got, expected, wide, plain, strict=True)):
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            reason = f"output {place} is {mine.dtype} {tuple(mine.shape)}"
        elif mine.is_floating_point():
            if ties is not None:  # a tie at the edge of a nucleus changes a whole row of p
                mine, own, exact = (x[~ties] for x in (mine, own, exact))
            error, share = float_error(mine, own, exact)
            errors.append(error)
            shares.append(share)
            reason = reason if share <= 1.0 else f"output {place} is {error:.3g} from the reference"
        else:
            differs = mine != theirs
            if ties is not None and place == 0:
                swapped = int((differs & ties).sum())
                differs = differs & ~ties
            if bool(differs.any()):
                reason = f"output {place} differs in {int(differs.sum())} places"
    if ties is not None and int(ties.sum()) > 1 + ties.numel() // 50:
        reason = f"{int(ties.sum())} near ties of {ties.numel()} draws: no comparison"
    return Check(op, name, not reason, max(errors), max(shares), swapped, reason)


def outputs(backend: str, op: str, args: list[Any]) -> list[Tensor]:
    """What the op returns and what it changed, from copies of its arguments."""
    own = [x.clone() if isinstance(x, Tensor) else x for x in args]
    returned = dispatch.implementation(backend, op)(*own)
    returned = () if returned is None else (returned,) if isinstance(returned, Tensor) else returned
    return [*returned, *(own[i] for i in MUTATED.get(op, ()) if own[i] is not None)]


def float_error(got: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest error, and it as a share of what is allowed: twice that of plain torch, and no less than 1e-5."""
    if got.numel() == 0:
        return 0.0, 0.0
    exact = exact.double()
    error = (got.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-5 * exact.abs().max().clamp(min=1e-3)
    return error.item(), (error / allowed).nan_to_num(torch.inf).item()


def near_ties(op: str, args: list[Any], expected: list[Tensor], got: list[Tensor]) -> Tensor | None:
    """Draws [B, W] that rounding may swap: two best scores, or a token and the edge of the nucleus, are that close.

    None for ops without draws.
    """
    if op == "sample_window":
        _, seeds, lengths, steps, *_ = args
        p = expected[1]
        positions = lengths[:, None] + torch.arange(p.shape[1], device=p.device)
        close = _close(p.log() + rng.gumbel(seeds, positions, steps + 1, rng.SAMPLE, p.shape[-1]))
        return close | _at_the_edge(args, p, got[1])
    if op == "verify":
        _, p, _, _, q, _, _, _, lengths, steps, _, seeds, *_ = args
        positions = lengths[:, None] + torch.arange(q.shape[1], device=p.device)
        noise = rng.gumbel(seeds, positions, steps + 1, rng.RESIDUAL, p.shape[-1])
        close = _close((p[:, :-1] - q).clamp(min=0).log() + noise)
        return torch.cat((close, torch.zeros_like(close[:, :1])), 1)
    return None


def _at_the_edge(args: list[Any], p: Tensor, other: Tensor) -> Tensor:
    """Rows [B, W] of two p whose nuclei differ, and only in tokens whose mass above reaches top_p within NEAR."""
    untruncated = [*args]
    untruncated[SAMPLE_TOP_P] = 1.0
    whole = reference.sample_window(*untruncated)[1].double()
    order = whole.sort(-1, descending=True)
    above = torch.empty_like(whole).scatter(-1, order.indices, order.values.cumsum(-1) - order.values)
    differs = (p > 0) != (other > 0)
    return differs.any(-1) & ((above - args[SAMPLE_TOP_P]).abs() < NEAR).where(differs, True).all(-1)


def _close(scores: Tensor) -> Tensor:
    best = scores.topk(2).values
    return best[..., 0] - best[..., 1] < NEAR


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
