"""What every painter of defects is given, what it gives back, and looks that several of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from training.synthetic.defects.shapes import Point, Shape, blob
from training.synthetic.noise import Field, log_uniform, slopes


@dataclass(frozen=True)
class Job:
    """One defect to paint: where, how large, how plain.

    ``image`` and ``other``: (H, W, 3) uint8; ``centre``: (y, x) px; ``radius``: px, of a disc with the area that the
    defect is to have; ``contrast``: 0 (invisible) to 1 (black on white).
    """

    image: np.ndarray
    other: np.ndarray
    centre: Point
    radius: float
    contrast: float
    rng: np.random.Generator

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def unit(self) -> float:
        """How many px of this image are one px of an image of 256 px: what fine strokes are measured in."""
        return max(min(self.size) / 256, 0.5)

    def blob(self, *, feather: float, roughness: float = 0.3, stretch: float = 2.0, scale: float = 1.0) -> Shape:
        """An irregular patch at the job's centre; ``feather`` in units, ``scale`` times the job's radius."""
        soft = min(feather * self.unit, self.radius * scale)
        radius = self.radius * scale
        return blob(
            self.rng, self.size, self.centre, radius, feather=max(soft, 1.0), roughness=roughness, stretch=stretch
        )

    def line_width(self, low: float, high: float) -> float:
        """A width in px, between ``low`` and ``high`` units."""
        return log_uniform(self.rng, low, high) * self.unit

    def length(self, low: float, high: float) -> float:
        """The length in px of a stroke, ``low`` to ``high`` times the radius, and not beyond the image."""
        return min(max(self.radius * self.rng.uniform(low, high), 8.0), 0.85 * min(self.size))

    def tone(self, window: np.ndarray) -> float:
        """A change of brightness in grey levels, away from the nearer end of the range, more on busy ground."""
        spread = float(window[..., 1].std())
        sign = -1.0 if self.rng.random() < float(window.mean()) / 255 else 1.0
        return sign * (8 + 0.3 * spread + 130 * self.contrast)

    def tint(self) -> np.ndarray:
        """A colour cast (3,): factors that average to 0, the greatest between 0.1 (dirt) and 1 (paint)."""
        cast = self.rng.normal(size=3)
        cast -= cast.mean()
        return (cast / np.abs(cast).max() * log_uniform(self.rng, 0.1, 1.0)).astype(np.float32)


@dataclass(frozen=True)
class Layer:
    """New pixels ``content`` (h, w, 3) in grey levels, laid over the image as much as ``shape.alpha`` says."""

    shape: Shape
    content: np.ndarray


def relief(height: Field, turn: float) -> Field:
    """Light and shade (H, W) on a height map in px, lit from the direction ``turn``; 0 where it is flat."""
    down, across = slopes(height)
    return down * math.sin(turn) + across * math.cos(turn)


def near_mean(job: Job, window: np.ndarray) -> np.ndarray:
    """The window without its detail: what a worn-off, filled or wet surface looks like from afar."""
    reach = max(min(window.shape[:2]) / 4, 2.0)
    return np.stack([ndimage.uniform_filter(window[..., c], int(reach)) for c in range(3)], axis=-1)


def piece_of(rng: np.random.Generator, source: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random window (height, width, 3) of ``source``, turned or mirrored; a small source is repeated."""
    rows = (int(rng.integers(0, source.shape[0])) + np.arange(height)) % (2 * source.shape[0])
    columns = (int(rng.integers(0, source.shape[1])) + np.arange(width)) % (2 * source.shape[1])
    # Mirrored at its borders: repeating it as it is would leave seams.
    rows = np.where(rows < source.shape[0], rows, 2 * source.shape[0] - 1 - rows)
    columns = np.where(columns < source.shape[1], columns, 2 * source.shape[1] - 1 - columns)
    piece = source[rows[:, None], columns[None]].astype(np.float32)
    down, across = (1 if rng.random() < 0.5 else -1 for _ in range(2))
    return piece[::down, ::across]
