"""Floats as integers of the same order: argmax with the first of equal values, and exact bisection."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_IDS = 2**30  # ids must fit the lower bits of `packed`

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-(2**63))  # below every `packed` value
KEY_OF_MINUS_INF = tl.constexpr(-2139095041)  # `ordered` of −inf
KEY_OF_ONE = tl.constexpr(0x3F800000)  # of 1.0; that of 0.0 is 0
_ID_BITS = tl.constexpr(30)
_LAST_ID = tl.constexpr(2**30 - 1)


@triton.jit
def ordered(x):
    """i32 that sort as the floats do; −0 is 0, and NaN is above everything, as torch.argmax has it."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def unordered(key):
    """The float of an `ordered` value."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(x, ids):
    """i64 whose maximum holds the largest x and, where several are equal, the first of their ids."""
    return (ordered(x).to(tl.int64) << _ID_BITS) | (ids ^ _LAST_ID).to(tl.int64)


@triton.jit
def id_of(best):
    """The id inside a `packed` value."""
    return (best & _LAST_ID) ^ _LAST_ID


@triton.jit
def value_of(best):
    """The float inside a `packed` value."""
    return unordered((best >> _ID_BITS).to(tl.int32))


@triton.jit
def middle_of(low, high):
    """The float halfway, in order, between two `ordered` values held as i64 (their distance overflows i32)."""
    return unordered(((low + high) >> 1).to(tl.int32))


@triton.jit
def halve(low, high, found):
    """The half that starts, or else ends, in the middle of two `ordered` values."""
    middle = (low + high) >> 1
    return tl.where(found, middle, low), tl.where(found, high, middle)
