"""Procedural materials that are woven, braided, tufted or sewn."""

from __future__ import annotations

import math

import numpy as np

from training.synthetic.materials import Recipe, axes, periodic_distance, wave
from training.synthetic.noise import log_uniform, noise, smoothstep
from training.synthetic.surface import Surface, colour, mix, near


def _weave(rng: np.random.Generator, side: int, unit: float, *, over: int, shift: int) -> Surface:
    """Cloth whose weft goes over ``over`` threads and then under as many, moved by ``shift`` threads every row."""
    pitch = rng.uniform(6, 11) * unit
    rows, columns = axes(side)
    rows = rows + 0.8 * unit * noise(rng, (side, side), 60 * unit)
    columns = columns + 0.8 * unit * noise(rng, (side, side), 60 * unit)
    row, column = np.floor(rows / pitch), np.floor(columns / pitch)
    weft_on_top = ((column + shift * row) % (2 * over)) < over
    round_weft = np.sqrt(1 - (2 * (rows / pitch - row) - 1) ** 2 * 0.98)
    round_warp = np.sqrt(1 - (2 * (columns / pitch - column) - 1) ** 2 * 0.98)
    bulge = np.where(weft_on_top, round_weft, round_warp)
    fibres = np.where(
        weft_on_top, noise(rng, (side, side), (1.2 * unit, 9 * unit)), noise(rng, (side, side), (9 * unit, 1.2 * unit))
    )
    warp = colour(rng, (0.05, 0.6), (0.25, 0.85))
    weft = colour(rng, (0.05, 0.6), (0.25, 0.85)) if rng.random() < 0.5 else warp * 0.85
    body = mix(warp, weft, weft_on_top.astype(np.float32)) * (0.75 + 0.3 * bulge + 0.06 * fibres)[..., None]
    return Surface(body, bulge * pitch * 0.28 + 0.25 * unit * fibres, 0.08)


def linen(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Plain weave."""
    return _weave(rng, side, unit, over=1, shift=1)


def twill(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Diagonal weave."""
    return _weave(rng, side, unit, over=2, shift=1)


def basket(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Braid of broad bands."""
    pitch = rng.uniform(22, 34) * unit
    rows, columns = axes(side)
    row, column = np.floor(rows / pitch), np.floor(columns / pitch)
    flat = (row + column) % 2 < 1
    along = np.where(flat, columns / pitch - column, rows / pitch - row)
    across = np.where(flat, rows / pitch - row, columns / pitch - column)
    grain = np.where(
        flat, noise(rng, (side, side), (2 * unit, 30 * unit)), noise(rng, (side, side), (30 * unit, 2 * unit))
    )
    band = smoothstep(np.minimum(across, 1 - across) * 9)
    height = band * (2 + 5 * np.sin(np.pi * along)) * unit + 0.3 * unit * grain
    tone = near(rng, (0.62, 0.46, 0.28), 0.08)
    shades = 1 + 0.12 * np.sin(7.1 * row + 3.3 * column)
    return Surface(tone * ((0.35 + 0.65 * band) * shades * (1 + 0.09 * grain))[..., None], height, 0.12)


def stripes(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Fabric with stripes of three widths, ribbed along them."""
    _, columns = axes(side)
    period = rng.uniform(40, 80) * unit
    place = (columns + 0.6 * unit * noise(rng, (side, side), 90 * unit)) % period / period
    ground, first, second = (colour(rng, (0.1, 0.7), (0.25, 0.9)) for _ in range(3))
    a, b = rng.uniform(0.15, 0.35), rng.uniform(0.05, 0.15)
    soft = 1.2 * unit / period
    body = mix(ground, first, smoothstep((a / 2 - np.abs(place - 0.3)) / soft + 0.5))
    body = mix(body, second, smoothstep((b / 2 - np.abs(place - 0.75)) / soft + 0.5))
    ribs = wave(columns / (4 * unit))
    fuzz = noise(rng, (side, side), 1.6 * unit, 2)
    return Surface(body * (0.9 + 0.1 * ribs + 0.05 * fuzz)[..., None], (0.8 * ribs + 0.3 * fuzz) * unit)


def carpet(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Tufted pile with mottled yarn."""
    tufts = noise(rng, (side, side), rng.uniform(3.5, 7) * unit, 3)
    first, second = colour(rng, (0.1, 0.7), (0.2, 0.7)), colour(rng, (0.1, 0.6), (0.3, 0.8))
    mottle = noise(rng, (side, side), rng.uniform(4, 20) * unit, 4)
    body = mix(first, second, smoothstep(0.5 + 0.5 * mottle))
    return Surface(body * np.clip(0.85 + 0.22 * tufts, 0.25, 1.3)[..., None], 1.5 * unit * tufts)


def quilt(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Padded cloth or leatherette with seams in a lozenge pattern."""
    pitch = log_uniform(rng, 30, 56) * unit
    rows, columns = axes(side)
    first = periodic_distance((rows + columns) * math.sqrt(0.5), pitch)
    second = periodic_distance((rows - columns) * math.sqrt(0.5), pitch)
    pad = np.sqrt(np.clip(np.minimum(first, second) / (pitch / 2), 0, 1))
    stitches = (wave((rows - columns) / (5 * unit)) > 0.4) & (np.minimum(first, second) < 1.0 * unit)
    grain = noise(rng, (side, side), 3 * unit, 3)
    tone = colour(rng, (0.1, 0.7), (0.15, 0.75))
    body = mix(
        tone * (0.75 + 0.25 * pad + 0.03 * grain)[..., None], np.array([0.85, 0.82, 0.75], np.float32), 0.8 * stitches
    )
    return Surface(body, pad * pitch * 0.22 + 0.25 * unit * grain, 0.3)


CLOTH: dict[str, Recipe] = {recipe.__name__: recipe for recipe in (linen, twill, carpet, stripes, basket, quilt)}
