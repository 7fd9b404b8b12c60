"""Painters of thin defects: scratch, crack, thread, pits."""

from __future__ import annotations

import math

import numpy as np

from training.synthetic.defects.job import Job, Layer, relief
from training.synthetic.defects.shapes import Shape, branches, centred, dots, strokes, walk
from training.synthetic.noise import noise


def scratch(job: Job) -> Layer:
    """One or several parallel strokes: a light or dark groove with an edge of the opposite shade."""
    rng = job.rng
    path = walk(rng, job.centre, job.length(2.5, 7), rng.uniform(0, 2 * math.pi), bend=rng.uniform(0, 1.2), step=3.0)
    path = centred(path, job.centre)
    width = job.line_width(0.7, 2.6)
    lines = [(path, width, width * 0.5)]
    for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.35 else 0):
        gap_y, gap_x = rng.normal(0, 7 * job.unit, 2).tolist()
        first = int(rng.integers(0, len(path) // 2 + 1))
        lines.append(([(y + gap_y, x + gap_x) for y, x in path[first:]], width * 0.8, width * 0.3))
    shape = strokes(job.size, lines)
    core = shape.alpha
    edge = np.roll(core, (1, 1), (0, 1)) * (1 - core)
    pressure = np.clip(0.85 + 0.25 * noise(rng, core.shape, 9 * job.unit, 2), 0.35, 1.0)
    window = shape.cut(job.image)
    amount = job.tone(window) * 1.2
    change = amount * pressure * (core > 0) - 0.6 * amount * edge * (core == 0)
    return Layer(Shape(shape.top, shape.left, np.maximum(core, 0.7 * edge)), window + change[..., None])


def crack(job: Job) -> Layer:
    """A dark, jagged, branching line with one lit lip."""
    width = job.line_width(0.8, 2.4)
    shape = strokes(job.size, branches(job.rng, job.centre, job.length(2.5, 6), width))
    core = shape.alpha
    lip = np.roll(core, (1, 1), (0, 1)) * (1 - core)
    window = shape.cut(job.image)
    depth = 0.25 + 0.7 * job.contrast**0.5
    content = window * (1 - depth) + (lip > core)[..., None] * (window * depth + 25 + 50 * job.contrast)
    return Layer(Shape(shape.top, shape.left, np.maximum(core, 0.5 * lip)), content)


def thread(job: Job) -> Layer:
    """A hair or a fibre: a long thin curve of one colour with a faint shadow."""
    rng = job.rng
    path = walk(rng, job.centre, job.length(4, 10), rng.uniform(0, 2 * math.pi), bend=rng.uniform(1.5, 6), step=2.0)
    width = job.line_width(0.7, 2.2)
    shape = strokes(job.size, [(centred(path, job.centre), width, width)])
    window = shape.cut(job.image)
    light = window.mean() < 110 or (rng.random() < 0.2 and window.mean() < 190)
    colour = (215 if light else 40) + 40 * job.tint() * rng.random()
    opacity = 0.45 + 0.5 * job.contrast**0.5
    shift = max(round(1.5 * job.unit), 1)
    shadow = 0.45 * np.roll(shape.alpha, (shift, shift), (0, 1)) * opacity
    alpha = np.maximum(shape.alpha * opacity, shadow)
    content = np.where((shape.alpha * opacity >= shadow)[..., None], colour, window * 0.45)
    return Layer(Shape(shape.top, shape.left, alpha), content)


def pits(job: Job) -> Layer:
    """A cluster of small pits or specks, each with a lit and a shaded side."""
    shape = dots(job.rng, job.size, job.centre, job.radius * 1.2)
    window = shape.cut(job.image)
    change = job.tone(window) * 1.2 * (1 + 0.3 * job.tint() * job.rng.random())
    rim = relief(shape.alpha, job.rng.uniform(0, 2 * math.pi)) * (30 + 90 * job.contrast)
    return Layer(shape, window + change + rim[..., None])
