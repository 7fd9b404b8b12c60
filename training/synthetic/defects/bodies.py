"""Painters of defects that hide the surface: foreign body, missing part, damage, misplaced patch."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from training.synthetic.defects.job import Job, Layer, near_mean, piece_of, relief
from training.synthetic.defects.shapes import Shape, shard
from training.synthetic.noise import noise


def foreign(job: Job) -> Layer:
    """A piece of another material lying on the surface: its own texture and colour, lit, with a shadow."""
    rng = job.rng
    smooth = rng.random() < 0.5
    body = job.blob(feather=1.5, roughness=0.15) if smooth else shard(rng, job.size, job.centre, job.radius)
    window, alpha = body.cut(job.image), body.alpha
    turn = rng.uniform(0, 2 * math.pi)
    bulk = ndimage.uniform_filter(alpha, max(int(job.radius * 0.5), 2))
    shade = relief(bulk, turn) * job.radius * rng.uniform(20, 70)
    material = _material(job, window) + shade[..., None]
    shift = tuple(round(-s * rng.uniform(1.5, 4) * job.unit) for s in (math.sin(turn), math.cos(turn)))
    shadow = 0.6 * ndimage.uniform_filter(ndimage.shift(alpha, shift, order=0), max(round(2 * job.unit), 2))
    shadow[shadow < 0.08] = 0
    total = alpha + shadow * (1 - alpha)
    mix = (alpha / np.maximum(total, 1e-6))[..., None]
    return Layer(Shape(body.top, body.left, total), mix * material + (1 - mix) * window * 0.35)


def _material(job: Job, window: np.ndarray) -> np.ndarray:
    """A texture (h, w, 3) unlike the window: from another photograph, from the same one transformed, or drawn."""
    rng = job.rng
    height, width = window.shape[:2]
    kind = rng.random()
    ground = window.mean((0, 1))
    if kind < 0.45:
        colour = ground + job.tone(window) * (1 + 0.8 * job.tint())
        grain = noise(rng, (height, width), rng.uniform(1, 8) * job.unit)
        return colour + grain[..., None] * rng.uniform(3, 25)
    source = job.other if kind < 0.8 else job.image
    piece = piece_of(rng, source, height, width)
    if source is job.image:
        piece = 255 - piece if rng.random() < 0.5 else piece[..., rng.permutation(3)]
    return piece + 0.3 * job.tone(window)


def missing(job: Job) -> Layer:
    """A part that is not there: its place filled with what is around it, or a hole in shadow."""
    rng = job.rng
    hole = rng.random() < 0.4
    shape = job.blob(feather=rng.uniform(1, 4), roughness=rng.uniform(0, 0.3), stretch=3)
    window = shape.cut(job.image)
    around = shape.alpha < 0.05
    ground = window[around].mean(0) if around.any() else window.mean((0, 1))
    grain = rng.uniform(1.5, 5) * noise(rng, shape.alpha.shape, 1.5, 2)[..., None]
    if not hole:
        drift = ground + 0.15 * (near_mean(job, window) - ground)
        return Layer(shape, drift + 0.25 * job.tone(window) + grain)
    depth = ndimage.uniform_filter(shape.alpha, max(int(job.radius * 0.4), 2))
    dark = ground * (1 - (0.3 + 0.6 * job.contrast) * (0.55 + 0.45 * depth[..., None]))
    wall = relief(depth, rng.uniform(0, 2 * math.pi)) * job.radius * 45
    return Layer(shape, dark + wall[..., None] + grain)


def damage(job: Job) -> Layer:
    """A chipped or torn place: jagged, rough inside, with one bright edge."""
    rng = job.rng
    shape = shard(rng, job.size, job.centre, job.radius)
    window = shape.cut(job.image)
    rough = noise(rng, shape.alpha.shape, max(job.radius * 0.35, 3), 4)
    bed = near_mean(job, window) + job.tone(window) * (1 + 0.2 * job.tint())
    facets = relief(rough * 2 + ndimage.uniform_filter(shape.alpha, 3) * 4, rng.uniform(0, 2 * math.pi))
    return Layer(shape, bed + (10 + 35 * job.contrast) * facets[..., None])


def misplaced(job: Job) -> Layer:
    """A patch of the same photograph in a place where it does not belong."""
    rng = job.rng
    shape = job.blob(feather=2, roughness=0.2) if rng.random() < 0.6 else shard(rng, job.size, job.centre, job.radius)
    window = shape.cut(job.image)
    pieces = [piece_of(rng, job.image, *shape.alpha.shape) for _ in range(3)]
    # Of three candidates the one that differs most: on an even ground most pieces look like what they cover.
    piece = max(pieces, key=lambda p: float((np.abs(p - window).mean(-1) * shape.alpha).sum()))
    return Layer(shape, piece + rng.normal(0, 12))
