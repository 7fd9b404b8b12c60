"""Painters of defects that alter a surface in place: stain, abrasion, fade, smear, dent."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from training.synthetic.defects.job import Job, Layer, near_mean, relief
from training.synthetic.noise import noise, smoothstep

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # shares of red, green and blue in brightness


def stain(job: Job) -> Layer:
    """A spill: the surface seen through a coloured film, often with a darker rim, sometimes opaque."""
    rng = job.rng
    shape = job.blob(feather=rng.uniform(2, 12), roughness=rng.uniform(0.15, 0.5))
    window = shape.cut(job.image)
    strength = 0.12 + 0.7 * job.contrast
    film = np.clip(1 - strength * (0.6 + 0.55 * job.tint()), 0, 1.5)
    if window.mean() < 70 or rng.random() < 0.2:  # a light film: dust, mould, lime
        wet = window + strength * (235 + 20 * job.tint() - window)
    else:
        wet = window * film
    rim = 4 * shape.alpha * (1 - shape.alpha) * (rng.random() < 0.5)
    cloud = 1 + 0.22 * noise(rng, shape.alpha.shape, max(job.radius * 0.6, 3))
    depth = np.clip(cloud + 0.8 * rim, 0, 1.4)[..., None]
    return Layer(shape, window + (wet - window) * depth)


def abrasion(job: Job) -> Layer:
    """A worn patch: its detail rubbed away and fine streaks of one direction left in it."""
    rng = job.rng
    shape = job.blob(feather=10, roughness=0.4, stretch=3)
    window = shape.cut(job.image)
    long, fine = 14 * job.unit, max(1.2 * job.unit, 1.0)
    streaks = noise(rng, shape.alpha.shape, (long, fine) if rng.random() < 0.5 else (fine, long), 2)
    patches = noise(rng, shape.alpha.shape, max(job.radius * 0.5, 3))
    wear = smoothstep(0.75 + 0.35 * patches + 0.3 * streaks)[..., None]
    worn = 0.5 * window + 0.5 * near_mean(job, window) + 0.8 * job.tone(window) * (1 + 0.25 * job.tint())
    return Layer(shape, window + (worn + 9 * streaks[..., None] - window) * wear)


def fade(job: Job) -> Layer:
    """A patch whose colour has gone: paler, darker, or of another hue."""
    rng = job.rng
    shape = job.blob(feather=rng.uniform(4, 14), roughness=0.35)
    window = shape.cut(job.image)
    gray = (window @ GRAY)[..., None]
    faded = gray + (window - gray) * rng.uniform(0, 0.6)
    spread = 0.8 * abs(job.tone(window))
    return Layer(shape, faded * (1 - 0.4 * job.contrast) + job.tone(window) * 0.6 + spread * 0.5 * job.tint())


def smear(job: Job) -> Layer:
    """A print, paint or glue that was wiped: the pixels dragged in one direction, with some colour of their own."""
    rng = job.rng
    shape = job.blob(feather=6, roughness=0.35, stretch=4)
    window = shape.cut(job.image)
    reach = max(int(job.radius * rng.uniform(0.5, 1.5)), 5)
    dragged = ndimage.uniform_filter1d(window, reach, axis=int(rng.integers(0, 2)))
    streaks = noise(rng, shape.alpha.shape, (max(1.5 * job.unit, 1.0), 12 * job.unit), 2)
    colour = job.tone(window) * (0.7 + 0.7 * job.tint())
    return Layer(shape, dragged + colour * np.clip(0.8 + 0.35 * streaks, 0, 1.5)[..., None])


def dent(job: Job) -> Layer:
    """A bulge, dimple or twist: the surface's own pixels displaced, and shaded as the slope turns to the light."""
    rng = job.rng
    shape = job.blob(feather=8, roughness=0.1)
    height, width = shape.alpha.shape
    window = shape.cut(job.image)
    soft = ndimage.uniform_filter(ndimage.uniform_filter(shape.alpha, max(int(job.radius * 0.7), 3)), 3)
    y, x = job.centre[0] - shape.top, job.centre[1] - shape.left
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    power = rng.choice([-1, 1]) * (0.2 + 0.5 * job.contrast) * soft
    twist = rng.uniform(-1, 1) * (0.3 + job.contrast) * soft
    offsets = rows - y, columns - x
    bent_rows = rows + power * offsets[0] + twist * offsets[1]
    bent_columns = columns + power * offsets[1] - twist * offsets[0]
    where = (
        np.clip(np.rint(bent_rows), 0, height - 1).astype(int),
        np.clip(np.rint(bent_columns), 0, width - 1).astype(int),
    )
    shade = relief(soft * job.radius, rng.uniform(0, 2 * math.pi)) * (25 + 110 * job.contrast)
    return Layer(shape, window[where] + shade[..., None])
