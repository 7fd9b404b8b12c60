"""Where a drawn defect lies: soft masks of blobs, strokes, cracks, dots and shards, each in a window of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from training.synthetic.noise import Field, log_uniform, noise, smoothstep

_FINE = 2  # lines and dots are drawn this many times finer and then averaged: soft edges
_BORDER = 4  # px kept free around what is drawn, for shadows and rims

Point = tuple[float, float]  # (y, x) in px


@dataclass(frozen=True)
class Shape:
    """A soft mask: ``alpha`` (h, w) in [0, 1], and where its window lies in the image."""

    top: int
    left: int
    alpha: Field

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The window of ``image`` (H, W, 3), as float32 (h, w, 3)."""
        height, width = self.alpha.shape
        return image[self.top : self.top + height, self.left : self.left + width].astype(np.float32)


def blob(
    rng: np.random.Generator,
    size: tuple[int, int],
    centre: Point,
    radius: float,
    *,
    feather: float,
    roughness: float = 0.3,
    stretch: float = 2.0,
) -> Shape:
    """An irregular, turned ellipse of about ``radius`` px, in an image of ``size`` (H, W).

    ``feather``: px over which the edge goes from 0 to 1; ``roughness``: 0 for an ellipse, 0.5 for a splash;
    ``stretch``: greatest ratio of its axes.
    """
    ratio = math.sqrt(rng.uniform(1.0, stretch))
    top, left, rows, columns = _window(size, centre, radius * (1.15 + 1.6 * roughness) * ratio + feather)
    turn = rng.uniform(0, math.pi)
    along = columns * math.cos(turn) + rows * math.sin(turn)
    across = rows * math.cos(turn) - columns * math.sin(turn)
    distance = np.sqrt((along / (radius * ratio)) ** 2 + (across * ratio / radius) ** 2)
    wobble = roughness * noise(rng, distance.shape, max(radius * 0.9, 2.0))
    # Beyond twice the radius it ends, whatever the noise says.
    inside = (1.0 + np.clip(wobble, -0.7, 1.0) - distance) * radius
    return _trimmed(top, left, smoothstep(0.5 + inside / feather).astype(np.float32))


def _trimmed(top: int, left: int, alpha: Field) -> Shape:
    """Without the empty rows and columns around it, but for a border: all later work is in proportion to the window."""
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if not rows.size:
        return Shape(top, left, alpha)
    first, start = max(int(rows[0]) - _BORDER, 0), max(int(columns[0]) - _BORDER, 0)
    return Shape(top + first, left + start, alpha[first : rows[-1] + _BORDER + 1, start : columns[-1] + _BORDER + 1])


def _window(size: tuple[int, int], centre: Point, reach: float) -> tuple[int, int, Field, Field]:
    top, left = max(int(centre[0] - reach), 0), max(int(centre[1] - reach), 0)
    bottom, right = min(int(centre[0] + reach) + 2, size[0]), min(int(centre[1] + reach) + 2, size[1])
    rows = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[0])
    columns = np.arange(left, right, dtype=np.float32)[None] - np.float32(centre[1])
    return top, left, rows, columns


def walk(
    rng: np.random.Generator, start: Point, length: float, angle: float, *, bend: float, step: float
) -> list[Point]:
    """A path of ``length`` px from ``start`` whose direction drifts by about ``bend`` radians in all."""
    count = max(int(length / step), 2)
    # The drift has a mean of its own, so that long paths are arcs rather than trembling straight lines.
    drift = rng.normal(0, bend) / count + rng.normal(0, 0.5 * bend / math.sqrt(count), count)
    angles = angle + np.cumsum(drift)
    rows = start[0] + np.concatenate([[0.0], np.cumsum(np.sin(angles) * step)])
    columns = start[1] + np.concatenate([[0.0], np.cumsum(np.cos(angles) * step)])
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def centred(path: list[Point], centre: Point) -> list[Point]:
    """The path moved so that its middle point is ``centre``."""
    down, across = (c - p for c, p in zip(centre, path[len(path) // 2], strict=True))
    return [(row + down, column + across) for row, column in path]


def strokes(size: tuple[int, int], paths: list[tuple[list[Point], float, float]]) -> Shape:
    """Lines: each (path, width in px at its start, width at its end)."""
    canvas = Image.new("L", (size[1] * _FINE, size[0] * _FINE))
    draw = ImageDraw.Draw(canvas)
    for path, first, last in paths:
        widths = np.linspace(first, last, len(path) - 1) * _FINE
        for (y0, x0), (y1, x1), width in zip(path, path[1:], widths.tolist(), strict=False):
            draw.line([(x0 * _FINE, y0 * _FINE), (x1 * _FINE, y1 * _FINE)], fill=255, width=max(round(width), 1))
    return _shape_of(canvas)


def branches(
    rng: np.random.Generator, centre: Point, length: float, width: float
) -> list[tuple[list[Point], float, float]]:
    """The paths of a crack: a jagged trunk through ``centre`` and boughs that leave it and grow thinner."""
    step = max(length / 24, 2.0)
    turn = rng.uniform(0, 2 * math.pi)
    trunk = centred(walk(rng, centre, length, turn, bend=1.6, step=step), centre)
    paths = [(trunk, width, width * 0.4)]
    for _ in range(int(rng.integers(0, 5))):
        start = trunk[int(rng.integers(1, len(trunk)))]
        side = turn + rng.choice([-1, 1]) * rng.uniform(0.4, 1.2)
        bough = walk(rng, start, length * rng.uniform(0.15, 0.45), side, bend=1.6, step=step)
        paths.append((bough, width * 0.6, width * 0.2))
    return paths


def dots(rng: np.random.Generator, size: tuple[int, int], centre: Point, radius: float) -> Shape:
    """A cluster of round spots within about ``radius`` px of ``centre``, many small and a few large."""
    canvas = Image.new("L", (size[1] * _FINE, size[0] * _FINE))
    draw = ImageDraw.Draw(canvas)
    for index in range(int(log_uniform(rng, 1, 30))):
        far = 0.0 if index == 0 else radius * 0.6  # the first lies in the middle: inside the image
        y, x = rng.normal(centre[0], far) * _FINE, rng.normal(centre[1], far) * _FINE
        half = max(log_uniform(rng, 0.08, 0.4) * radius, 1.5) * _FINE
        flat = half * rng.uniform(0.7, 1.0)
        draw.ellipse([x - half, y - flat, x + half, y + flat], fill=int(rng.integers(150, 256)))
    return _shape_of(canvas)


def shard(rng: np.random.Generator, size: tuple[int, int], centre: Point, radius: float) -> Shape:
    """A jagged polygon of about ``radius`` px."""
    corners = int(rng.integers(4, 12))
    angles = (np.arange(corners) + rng.uniform(0, 0.8, corners)) * 2 * math.pi / corners
    reach = radius * rng.uniform(0.55, 1.35, corners)
    squash, turn = rng.uniform(0.5, 1.0), rng.uniform(0, math.pi)
    along, across = reach * np.cos(angles), reach * np.sin(angles) * squash
    x = (centre[1] + along * math.cos(turn) - across * math.sin(turn)) * _FINE
    y = (centre[0] + along * math.sin(turn) + across * math.cos(turn)) * _FINE
    canvas = Image.new("L", (size[1] * _FINE, size[0] * _FINE))
    ImageDraw.Draw(canvas).polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255)
    return _shape_of(canvas)


def _shape_of(canvas: Image.Image) -> Shape:
    small = canvas.reduce(_FINE)
    width, height = small.size
    left, top, right, bottom = small.getbbox() or (0, 0, width, height)
    left, top = max(left - _BORDER, 0), max(top - _BORDER, 0)
    box = (left, top, min(right + _BORDER, width), min(bottom + _BORDER, height))
    return Shape(top, left, np.asarray(small.crop(box), dtype=np.float32) / 255)
