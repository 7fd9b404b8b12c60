"""Procedural materials in sheets: metal, mesh, board, print, paint; and what all materials are drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from training.synthetic.noise import Field, noise, smoothstep
from training.synthetic.surface import Surface, colour, mix, near

# A recipe draws a square of ``side`` px; ``unit`` px are one px of a photograph of 256 px: details keep their size.
Recipe = Callable[[np.random.Generator, int, float], Surface]


def axes(side: int) -> tuple[Field, Field]:
    """Row and column numbers (side, side) float32."""
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    return rows, columns


def wave(phase: Field) -> Field:
    """A wave (H, W) in [0, 1] of period 1."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * phase)


def periodic_distance(values: Field, period: float) -> Field:
    """The distance of each value to the nearest multiple of ``period``."""
    return np.abs((values + period / 2) % period - period / 2)


def brushed_metal(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Steel, brass or copper with fine strokes of one direction."""
    strokes = noise(rng, (side, side), (1.0 * unit, 120 * unit), 2) + 0.5 * noise(
        rng, (side, side), (1.5 * unit, 25 * unit)
    )
    metals = ((0.66, 0.67, 0.68), (0.78, 0.66, 0.42), (0.76, 0.54, 0.42), (0.45, 0.47, 0.5))
    tone = near(rng, metals[int(rng.integers(len(metals)))], 0.03)
    slow = noise(rng, (side, side), (60 * unit, 300 * unit), 2)
    return Surface(tone * (1 + 0.085 * strokes + 0.05 * slow)[..., None], 0.1 * unit * strokes, 0.25, 0.7)


def corrugated_sheet(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Painted sheet with round or angular waves."""
    period = rng.uniform(18, 40) * unit
    _, columns = axes(side)
    bend = wave((columns + 0.5 * unit * noise(rng, (side, side), 120 * unit)) / period)
    profile = smoothstep(bend * 1.6 - 0.3) if rng.random() < 0.5 else bend
    dirt = noise(rng, (side, side), (60 * unit, 6 * unit), 4)
    tone = colour(rng, (0.05, 0.55), (0.45, 0.85))
    worn = mix(tone, tone * 0.72, smoothstep(0.3 + 0.3 * dirt))
    return Surface(worn, profile * period * 0.2 + 0.1 * unit * dirt, 0.3, 0.2)


def mesh(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Wire grid over a dark ground."""
    pitch, wire = rng.uniform(16, 30) * unit, rng.uniform(2.2, 4) * unit
    rows, columns = axes(side)
    if rng.random() < 0.5:
        rows, columns = (rows + columns) * math.sqrt(0.5), (rows - columns) * math.sqrt(0.5)
    first, second = periodic_distance(rows, pitch), periodic_distance(columns, pitch)
    lift = 1.2 * unit * np.cos(np.pi * np.floor(rows / pitch + 0.5)) * np.cos(np.pi * columns / pitch)
    height = np.maximum(_rod(first, wire) + lift * (first < wire), _rod(second, wire) - lift * (second < wire))
    there = smoothstep(wire + 0.7 - np.minimum(first, second))
    ground = near(rng, (0.16, 0.16, 0.17), 0.03) * (1 + 0.2 * noise(rng, (side, side), 12 * unit))[..., None]
    steel = near(rng, (0.68, 0.68, 0.67), 0.06)
    return Surface(mix(ground, steel, there), height * there, 0.5 * there, 0.5 * there)


def _rod(distance: Field, radius: float) -> Field:
    return np.sqrt(np.clip(radius**2 - distance**2, 0, None))


def perforated(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Sheet metal with rows of round holes."""
    pitch = rng.uniform(18, 30) * unit
    rows, columns = axes(side)
    line = np.floor(rows / (pitch * 0.866) + 0.5)
    down, across = rows - line * pitch * 0.866, periodic_distance(columns + (line % 2) * pitch / 2, pitch)
    hole = np.sqrt(down**2 + across**2) - pitch * rng.uniform(0.22, 0.34)
    sheet = smoothstep(0.5 + hole / (1.2 * unit))
    grain = noise(rng, (side, side), (1.2 * unit, 40 * unit), 2)
    tone = near(rng, (0.62, 0.63, 0.64), 0.08) * (1 + 0.05 * grain)[..., None]
    return Surface(
        mix(np.array([0.05, 0.05, 0.06], np.float32), tone, sheet),
        2.5 * unit * smoothstep(hole / (2.5 * unit)),
        0.3 * sheet,
        0.5 * sheet,
    )


def checker_plate(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Steel plate with raised lozenges in alternating directions."""
    pitch = rng.uniform(26, 40) * unit
    rows, columns = axes(side)
    row, column = np.floor(rows / pitch), np.floor(columns / pitch)
    y, x = rows - (row + 0.5) * pitch, columns - (column + 0.5) * pitch
    turned = np.where((row + column) % 2 < 1, 1.0, -1.0)
    along, across = (x + turned * y) * math.sqrt(0.5), (x - turned * y) * math.sqrt(0.5)
    lozenge = 1 - np.sqrt((along / (pitch * 0.52)) ** 2 + (across / (pitch * 0.15)) ** 2)
    rust = noise(rng, (side, side), 50 * unit, 5)
    steel = mix(near(rng, (0.55, 0.56, 0.57)), near(rng, (0.5, 0.38, 0.3)), smoothstep(0.25 * rust - 0.05))
    worn = 1 + 0.25 * smoothstep(lozenge * 3) + 0.05 * noise(rng, (side, side), 2 * unit)
    height = 4.5 * unit * smoothstep(lozenge * 2.2) + 0.25 * unit * rust
    return Surface(steel * worn[..., None], height.astype(np.float32), 0.3, 0.35)


def printed(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Paper or foil printed with a repeated motif in two inks."""
    pitch = rng.uniform(26, 44) * unit
    rows, columns = axes(side)
    row = np.floor(rows / pitch)
    y, x = (rows / pitch - row) - 0.5, (columns / pitch + 0.5 * (row % 2)) % 1 - 0.5
    radius, angle = np.sqrt(x**2 + y**2), np.arctan2(y, x)
    petals, depth = int(rng.integers(3, 8)), rng.uniform(0, 0.45)
    outline = 0.34 * (1 + depth * np.cos(petals * angle)) / (1 + depth)
    soft = 1.2 * unit / pitch
    ink = smoothstep((outline - radius) / soft + 0.5)
    heart = smoothstep((rng.uniform(0.06, 0.14) - radius) / soft + 0.5)
    sheet = colour(rng, (0.02, 0.25), (0.75, 0.95))
    body = mix(mix(sheet, colour(rng, (0.4, 0.9), (0.2, 0.8)), ink), colour(rng, (0.3, 0.9), (0.4, 0.95)), heart)
    fibre = noise(rng, (side, side), 3 * unit, 3)
    return Surface(body * (1 + 0.025 * fibre)[..., None], 0.2 * unit * fibre, rng.uniform(0, 0.3))


def cardboard(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Brown or grey board with fibres and faint flutes."""
    fibres = noise(rng, (side, side), (1.5 * unit, 12 * unit), 2) + noise(rng, (side, side), (7 * unit, 1.5 * unit), 2)
    rows, _ = axes(side)
    flutes = wave(rows / (rng.uniform(9, 16) * unit))
    specks = smoothstep(noise(rng, (side, side), 1.5 * unit, 1) * 1.5 - 3)
    tone = near(rng, (0.68, 0.55, 0.4), 0.06)
    return Surface(
        mix(tone * (1 + 0.035 * fibres + 0.03 * flutes)[..., None], tone * 0.5, specks),
        (0.15 * fibres + 0.6 * flutes) * unit,
    )


def paint(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Coated sheet with the texture of an orange's peel."""
    peel = noise(rng, (side, side), rng.uniform(5, 12) * unit, 2)
    slow = noise(rng, (side, side), 200 * unit, 2)
    tone = colour(rng, (0.1, 0.8), (0.2, 0.8))
    return Surface(tone * (1 + 0.03 * slow)[..., None], 0.5 * unit * peel, rng.uniform(0.15, 0.5))


SHEETS: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (brushed_metal, printed, mesh, corrugated_sheet, perforated, checker_plate, cardboard, paint)
}
