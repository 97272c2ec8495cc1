"""Finds the things in a picture: what is coloured, what hue it has, and which drawn shape it fits best.

The backgrounds are grey, and mixing with grey (anti-aliasing, blur) keeps a hue. So everything happens in the
plane orthogonal to the grey axis, where a colour's length says how much of a pixel the thing covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ..errors import BackendError, ConfigError
from .render import signed_distance
from .world import COLOURS, RADII, SHAPES, SIDE

UNKNOWN = "unknown"
COVER = 0.35  # share of a full colour from which a pixel may belong to a thing
HOLE = 25  # pixels; smaller holes are artefacts (the hole of a small ring has 113)
SPECK = 60  # pixels; smaller blobs are artefacts (a small star has 226)
MIN_FIT = 0.8  # intersection over union below which a blob is no known shape
SOFTNESS = 0.12  # radii; small shapes are also tried with tips and corners rounded by such a blur
CLOSE_RACE = 0.15  # shapes this far behind the best first fit are still worth refining

_PLANE = np.array([[2.0, -1.0, -1.0], [0.0, 3.0**0.5, -(3.0**0.5)]]) / 6.0**0.5  # orthonormal, both grey-free
_NAMES = tuple(COLOURS)
_HUES = np.array(list(COLOURS.values()), dtype=np.float64) @ _PLANE.T  # [8, 2]
_LENGTHS = np.linalg.norm(_HUES, axis=1)
_DISC = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5

_STEP = 0.01  # grid of the unit masks, in radii
_HALF = 150  # their half side, in steps: no shape reaches 1.5 radii
_MOVES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])  # radius, x, y


@dataclass(frozen=True)
class Detection:
    """One thing seen: `x`, `y`, `radius` in pixels (of the best fitting drawn shape), `area` in pixels."""

    shape: str  # one of SHAPES, or "unknown"
    colour: str
    size: str
    x: float
    y: float
    radius: float
    area: int
    confidence: float  # intersection over union with the drawn shape, 0 .. 1


@dataclass(frozen=True)
class _Template:
    """A shape of radius 1: its mask [301, 301] on a grid of 0.01, its area and centroid."""

    mask: np.ndarray
    area: float
    x: float
    y: float


@cache
def _template(shape: str, soft: bool = False) -> _Template:
    ticks = np.arange(-_HALF, _HALF + 1) * _STEP
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    mask = signed_distance(shape, 1.0, x, y) <= 0
    if soft:
        mask = _ndimage().gaussian_filter(mask.astype(np.float32), SOFTNESS / _STEP) > 0.5
    # The rim stays empty: pixels beyond the grid are clipped onto it and must not count as covered.
    mask[[0, -1], :] = mask[:, [0, -1]] = False
    return _Template(mask, float(mask.sum()) * _STEP**2, float(x[mask].mean()), float(y[mask].mean()))


@cache
def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise BackendError(
            "Scoring pictures needs scipy, which is not installed: `pip install sjd2-engine[eval]`."
        ) from error
    return ndimage


def as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as uint8 [128, 128, 3]; anything else is a ConfigError."""
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.shape != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ConfigError(
            f"SceneEval got a picture of shape {list(pixels.shape)} and type {pixels.dtype}; it expects "
            f"uint8 [{SIDE}, {SIDE}, 3]. Resize it to {SIDE}x{SIDE}, or scale values to 0 .. 255."
        )
    return pixels


def coloured(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much colour covers each pixel [128, 128], the nearest colours [128, 128], the hue plane [.., 2]."""
    plane = pixels.astype(np.float64) @ _PLANE.T
    along = plane @ (_HUES / _LENGTHS[:, None]).T  # projection on each colour's direction
    nearest = along.argmax(2)
    return along.max(2) / _LENGTHS[nearest], nearest, plane


def _without_holes(mask: np.ndarray) -> np.ndarray:
    labels, count = _ndimage().label(~mask)
    small = np.bincount(labels.ravel(), minlength=count + 1) < HOLE
    small[0] = False
    return mask | small[labels]


def _parts(mask: np.ndarray, nearest: np.ndarray) -> list[np.ndarray]:
    """Masks of one-coloured connected things.

    Where two things touch, blended pixels may have a third hue: only the solid core of a hue counts, and
    every other pixel goes to the nearest core.
    """
    ndimage = _ndimage()
    cores = np.full(mask.shape, -1)
    for colour in range(len(_NAMES)):
        own = mask & (nearest == colour)
        if own.sum() >= SPECK // 2:
            cores[ndimage.binary_opening(own, _DISC)] = colour
    if (cores < 0).all():
        return []
    if len(np.unique(cores)) > 2:  # one core colour needs no distances
        rows, columns = ndimage.distance_transform_edt(cores < 0, return_distances=False, return_indices=True)
        cores = cores[rows, columns]
    else:
        cores[:] = cores.max()
    parts = []
    for colour in np.unique(cores):
        labels, count = ndimage.label(mask & (cores == colour))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        parts += [labels == k for k in range(1, count + 1) if sizes[k] >= SPECK]
    return parts


def _overlap(template: _Template, part: np.ndarray, pose: np.ndarray) -> float:
    """Intersection over union of a mask [h, w] with a shape at pose [radius, x, y]."""
    scale = 1.0 / (pose[0] * _STEP)
    height, width = part.shape
    columns = (np.arange(width) + 0.5 - pose[1]) * scale + (_HALF + 0.5)
    rows = (np.arange(height) + 0.5 - pose[2]) * scale + (_HALF + 0.5)
    columns, rows = (np.clip(ticks.astype(np.int64), 0, 2 * _HALF) for ticks in (columns, rows))
    drawn = template.mask[rows[:, None], columns]
    return float(np.count_nonzero(drawn & part) / np.count_nonzero(drawn | part))


def _first_pose(template: _Template, part: np.ndarray) -> np.ndarray:
    """The pose at which the shape has the same area and centroid as a mask [h, w]."""
    rows, columns = np.nonzero(part)
    radius = (rows.size / template.area) ** 0.5
    return np.array([radius, columns.mean() + 0.5 - radius * template.x, rows.mean() + 0.5 - radius * template.y])


def _refine(template: _Template, part: np.ndarray, pose: np.ndarray, fit: float) -> tuple[np.ndarray, float]:
    """Climbs in radius and centre, first by a twentieth of the radius, then by half of that."""
    for step in (0.05 * pose[0], 0.025 * pose[0]):
        for move in step * _MOVES:
            while (better := _overlap(template, part, pose + move)) > fit:
                pose, fit = pose + move, better
    return pose, fit


def fit_shape(part: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Best shape for a mask [h, w]: its name, intersection over union, and pose [radius, x, y]."""
    rows, columns = np.nonzero(part)
    top, left = rows.min(), columns.min()
    # Enough room around it for a shape that fits badly to be seen sticking out.
    room = 4 + max(rows.max() - top, columns.max() - left) // 4
    crop = np.pad(part[top : rows.max() + 1, left : columns.max() + 1], room)
    firsts = []
    for shape in SHAPES:
        for soft in (False, True):
            template = _template(shape, soft)
            pose = _first_pose(template, crop)
            if not soft or size_of(pose[0]) == "small":
                firsts.append((shape, template, pose, _overlap(template, crop, pose)))
    bar = max(fit for *_, fit in firsts) - CLOSE_RACE
    fits = [(shape, *_refine(template, crop, pose, fit)) for shape, template, pose, fit in firsts if fit >= bar]
    shape, pose, fit = max(fits, key=lambda item: item[2])
    return shape, fit, pose + np.array([0, left - room, top - room])


def _colour_of(plane: np.ndarray) -> str:
    """Nearest named hue of the median of hue-plane vectors [n, 2]."""
    middle = np.median(plane, axis=0)
    return _NAMES[int((_HUES / _LENGTHS[:, None] @ middle).argmax())]


def size_of(radius: float) -> str:
    """Nearest size name, by ratio of radii."""
    return min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))


def detect(image: Image.Image | np.ndarray) -> list[Detection]:
    """The coloured things in a picture (PIL, or uint8 [128, 128, 3]), best fit first."""
    cover, nearest, plane = coloured(as_pixels(image))
    found = []
    for loose in _parts(_without_holes(cover > COVER), nearest):
        # The outline is where a thing covers half as much as in its middle: pale things keep their size.
        part = loose & _without_holes(cover > 0.5 * min(1.0, float(np.percentile(cover[loose], 75))))
        shape, fit, pose = fit_shape(part)
        radius, x, y = (round(float(value), 2) for value in pose)
        found.append(
            Detection(
                shape=shape if fit >= MIN_FIT else UNKNOWN,
                colour=_colour_of(plane[part]),
                size=size_of(radius),
                x=x,
                y=y,
                radius=radius,
                area=int(part.sum()),
                confidence=round(fit, 4),
            )
        )
    return sorted(found, key=lambda thing: -thing.confidence)
