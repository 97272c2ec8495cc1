"""Pictures and captions in bulk, drawn by a pool of processes, the same for the same seed."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
from tqdm import tqdm

from ..scenes.captions import sample_training_pair
from ..scenes.render import render
from ..scenes.world import SIDE

CHUNK = 500


def _draw(args: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    seed, chunk = args
    rng = np.random.default_rng([seed, chunk])
    pairs = [sample_training_pair(rng) for _ in range(CHUNK)]
    return np.stack([render(scene) for _, scene in pairs]), [prompt.text for prompt, _ in pairs]


def draw_chunks(count: int, seed: int, label: str = "drawing", first: int = 0):
    """Yields (pictures uint8 [500, 128, 128, 3], captions) from chunk `first` on until `count` pictures are drawn."""
    jobs = [(seed, chunk) for chunk in range(first, -(-count // CHUNK))]
    # Spawned workers would import torch again; drawing needs none of it, so plain forks are safe and quick.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        yield from tqdm(pool.imap(_draw, jobs), total=len(jobs), desc=label, unit="chunk")


def draw_pictures(count: int, seed: int) -> np.ndarray:
    """`count` pictures, uint8 [count, 128, 128, 3]."""
    pictures = np.empty((-(-count // CHUNK) * CHUNK, SIDE, SIDE, 3), dtype=np.uint8)
    for index, (chunk, _) in enumerate(draw_chunks(count, seed)):
        pictures[index * CHUNK : (index + 1) * CHUNK] = chunk
    return pictures[:count]
