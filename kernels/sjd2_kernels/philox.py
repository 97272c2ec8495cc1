"""Random numbers inside Triton kernels: the draws of `rng`, uniforms bit for bit, the rest to an ulp or two.

One Philox call gives the words of four consecutive indices, so everything here takes `lanes` = index // 4
(i32 [..., n]) and returns values of indices 4·lanes … 4·lanes + 3, interleaved: [..., 4n].
`seed` i64, `position` and `iteration` are scalars, or blocks that broadcast against `lanes`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rng

SAMPLE = tl.constexpr(rng.SAMPLE)
ACCEPT = tl.constexpr(rng.ACCEPT)
RESIDUAL = tl.constexpr(rng.RESIDUAL)
NOISE = tl.constexpr(rng.NOISE)

_SMALLEST = tl.constexpr(2.0**-33)  # stands for a uniform of exactly 0
_TWO_PI = tl.constexpr(6.283185307179586)
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# π/2 in two parts; the first has 18 bits, so that its multiples up to 4 are exact in float32.
_HALF_PI_HIGH = tl.constexpr(1.5707931518554688)
_HALF_PI_LOW = tl.constexpr(3.174939427807999e-06)


@triton.jit
def words(seed, position, iteration, purpose: tl.constexpr, lanes):
    """Four blocks of 32 random bits, for indices 4·lanes + 0, 1, 2, 3."""
    position = tl.cast(position, tl.int32)
    iteration = tl.cast(iteration, tl.int32)
    return tl.philox(seed, lanes.to(tl.int32), position, iteration, purpose)


@triton.jit
def interleave4(a, b, c, d):
    """[..., n] × 4 → [..., 4n]: a0 b0 c0 d0 a1 …"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniforms(seed, position, iteration, purpose: tl.constexpr, lanes):
    """Uniforms in [0, 1) f32 [..., 4n], bit for bit `rng.uniforms`."""
    a, b, c, d = words(seed, position, iteration, purpose, lanes)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.uint_to_uniform_float(interleave4(a, b, c, d))


@triton.jit
def exponential(u):
    """−log1p(−u) of uniforms, exact to an ulp or two also where u is tiny.

    With w = 1 − u rounded, log(1 − u) = log(w) + log(1 + c/w) for the rounding error c, and c/w ≈ c: c is 0
    where w is below ½. (`tl.log` alone loses small u; libdevice's log1p does not run in the interpreter.)
    """
    u = tl.maximum(u, _SMALLEST)
    w = 1.0 - u
    return -(tl.log(w) + ((1.0 - w) - u))


@triton.jit
def gumbels(seed, position, iteration, purpose: tl.constexpr, lanes):
    """Standard Gumbel noise f32 [..., 4n], as `rng.gumbel`."""
    return -tl.log(exponential(uniforms(seed, position, iteration, purpose, lanes)))


@triton.jit
def _box_muller(u, v):
    """√(−2·log1p(−u)) · (cos, sin)(2πv).

    The angle is at most 2π, so two subtractions reduce it to [−π/4, π/4], where Taylor's series are exact in
    float32; `tl.cos` brings a reduction for huge arguments that takes stack memory.
    """
    radius = tl.sqrt(2.0 * exponential(u))
    angle = v * _TWO_PI
    quadrant = tl.floor(angle * _TWO_OVER_PI + 0.5)
    r = (angle - quadrant * _HALF_PI_HIGH) - quadrant * _HALF_PI_LOW
    s = r * r
    cos = 1.0 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320))))
    sin = r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))))
    turn = quadrant.to(tl.int32) & 3
    odd = (turn & 1) != 0
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    x = tl.where((turn == 1) | (turn == 2), -x, x)
    y = tl.where(turn >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(seed, position, epoch, lanes):
    """Standard normal noise f32 [..., 4n], as `rng.normals` (purpose NOISE)."""
    a, b, c, d = words(seed, position, epoch, NOISE, lanes)  # pyright: ignore[reportGeneralTypeIssues]
    x0, x1 = _box_muller(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    x2, x3 = _box_muller(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
    return interleave4(x0, x1, x2, x3)
