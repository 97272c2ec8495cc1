"""Draws a scene with exact anti-aliasing from signed distances (negative inside, in pixels)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .world import COLOURS, SIDE, TONES, Item, Scene

TILE = 16  # background patterns repeat on the token grid, so they cost few distinct tokens


def _polygon(points: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon, points [n, 2]: nearest edge, sign by crossing number."""
    best = np.full(px.shape, np.inf)
    inside = np.zeros(px.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, px - ax, py - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        best = np.minimum(best, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ay != by:
            inside ^= ((ay > py) != (by > py)) & (px < ex * (py - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


def _regular(radii: list[float]) -> np.ndarray:
    """Vertices at equal angles, the first on top, at the given distances from the centre."""
    angles = -math.pi / 2 + 2 * math.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]


def signed_distance(shape: str, radius: float, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Distance of points (relative to the centre, pixels) to the outline of a shape."""
    r = radius
    if shape == "circle":
        return np.hypot(px, py) - r
    if shape == "ring":
        return np.abs(np.hypot(px, py) - 0.76 * r) - 0.26 * r
    if shape == "square":
        return _polygon(0.88 * r * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), px, py)
    if shape == "triangle":
        return _polygon(_regular([1.18 * r] * 3) + np.array([0, 0.22 * r]), px, py)
    if shape == "star":
        return _polygon(_regular([1.16 * r, 0.46 * r] * 5) + np.array([0, 0.06 * r]), px, py)
    a, b = 1.02 * r, 0.34 * r
    corners = [
        [-b, -a],
        [b, -a],
        [b, -b],
        [a, -b],
        [a, b],
        [b, b],
        [b, a],
        [-b, a],
        [-b, b],
        [-a, b],
        [-a, -b],
        [-b, -b],
    ]
    return _polygon(np.array(corners), px, py)


def _background(texture: str, tone: str) -> np.ndarray:
    ground, pattern = TONES[tone]
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    if texture == "striped":
        mask = (y // (TILE // 2)) % 2 == 1
    elif texture == "checkered":
        mask = (x // TILE + y // TILE) % 2 == 1
    elif texture == "dotted":
        distance = np.hypot(x % TILE - (TILE - 1) / 2, y % TILE - (TILE - 1) / 2)
        mask = np.clip(4.0 - distance, 0.0, 1.0)
    else:
        mask = np.zeros((SIDE, SIDE))
    plane = ground + (pattern - ground) * mask.astype(np.float64)
    return np.repeat(plane[..., None], 3, axis=2)


def _paint(canvas: np.ndarray, item: Item) -> None:
    reach = int(1.3 * item.radius) + 2
    x0, x1 = max(item.x - reach, 0), min(item.x + reach, SIDE)
    y0, y1 = max(item.y - reach, 0), min(item.y + reach, SIDE)
    py, px = np.mgrid[y0:y1, x0:x1] + 0.5
    cover = np.clip(0.5 - signed_distance(item.shape, item.radius, px - item.x, py - item.y), 0.0, 1.0)[..., None]
    box = canvas[y0:y1, x0:x1]
    box += cover * (np.asarray(COLOURS[item.colour], dtype=np.float64) - box)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [128, 128, 3]."""
    canvas = _background(scene.texture, scene.tone)
    for item in scene.items:
        _paint(canvas, item)
    return np.round(canvas).astype(np.uint8)


def render_image(scene: Scene) -> Image.Image:
    """The picture of a scene as a PIL image."""
    return Image.fromarray(render(scene))
