"""Smooth random fields and the small operations on them that drawn materials and drawn defects share."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

Field = np.ndarray  # (H, W) float32, or (H, W, 3) where it is said

_SEED_WORDS = 2**32


def generator(*keys: int | str) -> np.random.Generator:
    """A random generator of its own for every tuple of keys (text, and whole numbers from 0), the same on every run."""
    words: list[int] = []
    for key in keys:
        # Text by its bytes: Python's own hash() of a string is another one in every process.
        numbers = [key % _SEED_WORDS, key // _SEED_WORDS] if isinstance(key, int) else [*key.encode(), _SEED_WORDS]
        words += numbers
    return np.random.default_rng(words)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: float | tuple[float, float], octaves: int = 3
) -> Field:
    """Fractal noise (H, W) float32 of mean about 0 and standard deviation about 1.

    ``cell``: px from one random value to the next in the coarsest octave, one number or (down, across); every further
    octave has half the cells and 0.55 of the height.
    """
    down, across = cell if isinstance(cell, tuple) else (cell, cell)
    total = np.zeros(shape, np.float32)
    power = 0.0
    for octave in range(octaves):
        weight = 0.55**octave
        total += weight * _octave(rng, shape, max(down / 2**octave, 1.0), max(across / 2**octave, 1.0))
        power += weight**2
    return total / np.float32(math.sqrt(power))


def _octave(rng: np.random.Generator, shape: tuple[int, int], down: float, across: float) -> Field:
    height, width = shape
    if down == across == 1.0:
        return rng.standard_normal(shape, dtype=np.float32)
    rows, columns = math.ceil(height / down) + 3, math.ceil(width / across) + 3
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    x, y = 1 + rng.random(), 1 + rng.random()
    box = (x, y, x + width / across, y + height / down)
    smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(smooth) * np.float32(1.45)  # interpolation takes about a third of the deviation away


def smoothstep(values: Field) -> Field:
    """0 below 0, 1 above 1, and a slope without corners between."""
    clipped = np.clip(values, 0.0, 1.0)
    return clipped * clipped * (3.0 - 2.0 * clipped)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between ``low`` and ``high`` whose logarithm is uniform: as many small ones as large ones."""
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def slopes(height: Field) -> tuple[Field, Field]:
    """The differences (H, W) down and across of a height map (H, W), both in height per px."""
    down, across = np.empty_like(height), np.empty_like(height)
    down[1:-1] = (height[2:] - height[:-2]) * 0.5
    across[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * 0.5
    down[0], down[-1] = height[1] - height[0], height[-1] - height[-2]
    across[:, 0], across[:, -1] = height[:, 1] - height[:, 0], height[:, -1] - height[:, -2]
    return down, across
