"""Procedural materials: sheets, cloth, and what grows or is cast."""

import colorsys
import math

import numpy as np
from numpy.typing import ArrayLike

from training.synthetic.camera import Field, Rng, Surface, mix, noise, smoothstep

Range = tuple[float, float]  # the least and the greatest value


def wave(phase: Field) -> Field:
    """A wave (H, W) in [0, 1] of period 1."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * phase)


def periodic_distance(values: Field, period: float) -> Field:
    """The distance of each value to the nearest multiple of ``period``."""
    return np.abs((values + period / 2) % period - period / 2)


class Sheet:
    """A square of ``side`` px to draw on. ``unit`` px are one px of a photograph of 256 px: details keep their size."""

    def __init__(self, rng: Rng, side: int, unit: float) -> None:
        self.rng, self.side, self.unit = rng, side, unit
        self.rows, self.columns = np.mgrid[0:side, 0:side].astype(np.float32)

    def noise(self, cell: float | tuple[float, float], octaves: int = 3) -> Field:
        """``noise`` (side, side) with cells in units."""
        down, across = cell if isinstance(cell, tuple) else (cell, cell)
        return noise(self.rng, (self.side, self.side), (down * self.unit, across * self.unit), octaves)

    def length(self, low: float, high: float) -> float:
        """A length in px, between ``low`` and ``high`` units."""
        return self.rng.uniform(low, high) * self.unit

    def colour(self, saturation: Range, value: Range) -> np.ndarray:
        """A colour (3,) in [0, 1] of any hue, with a saturation and a value within the given bounds."""
        rng = self.rng
        return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), np.float32)

    def near(self, colour: ArrayLike, spread: float = 0.05) -> np.ndarray:
        """A colour (3,) close to ``colour``: lighter or darker by about ``spread``, and of nearly the same hue."""
        tone = np.array(colour) + self.rng.normal(0, spread) + self.rng.normal(0, spread * 0.3, 3)
        return np.clip(tone, 0.02, 0.98).astype(np.float32)

    def cells(self, pitch: float) -> tuple[Field, Field, Field]:
        """Voronoi cells of about ``pitch`` px around jittered seeds, as three fields (side, side).

        They are how much farther the second nearest seed is than the nearest, the distance to the nearest, both in px,
        and a random number in [0, 1) for each cell.
        """
        count = int(self.side / pitch) + 4
        corners = np.indices((count, count), dtype=np.float32).transpose(1, 2, 0) - 1
        seeds = (corners + self.rng.random((count, count, 2), dtype=np.float32)) * np.float32(pitch)
        values = self.rng.random((count, count), dtype=np.float32)
        first, second = np.full((2, self.side, self.side), np.inf, np.float32)
        value = np.zeros_like(first)
        for down, across in np.ndindex(3, 3):
            cell = (self.rows / pitch).astype(int) + down, (self.columns / pitch).astype(int) + across
            seed = seeds[cell]
            far = np.sqrt((seed[..., 0] - self.rows) ** 2 + (seed[..., 1] - self.columns) ** 2)
            value = np.where(far < first, values[cell], value)
            first, second = np.minimum(first, far), np.where(far < first, first, np.minimum(second, far))
        return second - first, first, value


class Material(Sheet):
    """The recipes of materials: each draws one that fills the square."""

    def brushed_metal(self) -> Surface:
        """Steel, brass or copper with fine strokes of one direction."""
        strokes = self.noise((1.0, 120), 2) + 0.5 * self.noise((1.5, 25))
        metals = ((0.66, 0.67, 0.68), (0.78, 0.66, 0.42), (0.76, 0.54, 0.42), (0.45, 0.47, 0.5))
        body = (
            self.near(self.rng.choice(metals), 0.03)
            * (1 + 0.085 * strokes + 0.05 * self.noise((60, 300), 2))[..., None]
        )
        return Surface(body, 0.1 * self.unit * strokes, 0.25, 0.7)

    def printed(self) -> Surface:
        """Paper or foil printed with a repeated motif in two inks."""
        rng, pitch = self.rng, self.length(26, 44)
        row = np.floor(self.rows / pitch)
        y, x = (self.rows / pitch - row) - 0.5, (self.columns / pitch + 0.5 * (row % 2)) % 1 - 0.5
        radius, angle = np.sqrt(x**2 + y**2), np.arctan2(y, x)
        petals, depth = int(rng.integers(3, 8)), rng.uniform(0, 0.45)
        soft, outline = 1.2 * self.unit / pitch, 0.34 * (1 + depth * np.cos(petals * angle)) / (1 + depth)
        ink = smoothstep((outline - radius) / soft + 0.5)
        heart = smoothstep((rng.uniform(0.06, 0.14) - radius) / soft + 0.5)
        body = mix(self.colour((0.02, 0.25), (0.75, 0.95)), self.colour((0.4, 0.9), (0.2, 0.8)), ink)
        body = mix(body, self.colour((0.3, 0.9), (0.4, 0.95)), heart)
        fibre = self.noise(3, 3)
        return Surface(body * (1 + 0.025 * fibre)[..., None], 0.2 * self.unit * fibre, rng.uniform(0, 0.3))

    def mesh(self) -> Surface:
        """Wire grid over a dark ground."""
        pitch, wire = self.length(16, 30), self.length(2.2, 4)
        rows, columns = self.rows, self.columns
        if self.rng.random() < 0.5:
            rows, columns = (rows + columns) * math.sqrt(0.5), (rows - columns) * math.sqrt(0.5)
        distances = periodic_distance(rows, pitch), periodic_distance(columns, pitch)
        lift = 1.2 * self.unit * np.cos(np.pi * np.floor(rows / pitch + 0.5)) * np.cos(np.pi * columns / pitch)
        first, second = (np.sqrt(np.clip(wire**2 - distance**2, 0, None)) for distance in distances)
        height = np.maximum(first + lift * (distances[0] < wire), second - lift * (distances[1] < wire))
        there = smoothstep(wire + 0.7 - np.minimum(*distances))
        ground = self.near((0.16, 0.16, 0.17), 0.03) * (1 + 0.2 * self.noise(12))[..., None]
        body = mix(ground, self.near((0.68, 0.68, 0.67), 0.06), there)
        return Surface(body, height * there, 0.5 * there, 0.5 * there)

    def corrugated_sheet(self) -> Surface:
        """Painted sheet with round or angular waves."""
        period = self.length(18, 40)
        bend = wave((self.columns + 0.5 * self.unit * self.noise(120)) / period)
        profile = smoothstep(bend * 1.6 - 0.3) if self.rng.random() < 0.5 else bend
        dirt, tone = self.noise((60, 6), 4), self.colour((0.05, 0.55), (0.45, 0.85))
        body = mix(tone, tone * 0.72, smoothstep(0.3 + 0.3 * dirt))
        return Surface(body, profile * period * 0.2 + 0.1 * self.unit * dirt, 0.3, 0.2)

    def perforated(self) -> Surface:
        """Sheet metal with rows of round holes."""
        pitch, unit = self.length(18, 30), self.unit
        line = np.floor(self.rows / (pitch * 0.866) + 0.5)
        across = periodic_distance(self.columns + (line % 2) * pitch / 2, pitch)
        hole = np.sqrt((self.rows - line * pitch * 0.866) ** 2 + across**2) - pitch * self.rng.uniform(0.22, 0.34)
        metal = smoothstep(0.5 + hole / (1.2 * unit))
        tone = (1 + 0.05 * self.noise((1.2, 40), 2))[..., None] * self.near((0.62, 0.63, 0.64), 0.08)
        body = mix(np.array([0.05, 0.05, 0.06], np.float32), tone, metal)
        return Surface(body, 2.5 * unit * smoothstep(hole / (2.5 * unit)), 0.3 * metal, 0.5 * metal)

    def cardboard(self) -> Surface:
        """Brown or grey board with fibres and faint flutes."""
        fibres = self.noise((1.5, 12), 2) + self.noise((7, 1.5), 2)
        flutes = wave(self.rows / self.length(9, 16))
        specks, tone = smoothstep(self.noise(1.5, 1) * 1.5 - 3), self.near((0.68, 0.55, 0.4), 0.06)
        body = mix(tone * (1 + 0.035 * fibres + 0.03 * flutes)[..., None], tone * 0.5, specks)
        return Surface(body, (0.15 * fibres + 0.6 * flutes) * self.unit)

    def paint(self) -> Surface:
        """Coated sheet with the texture of an orange's peel."""
        peel, slow = self.noise(self.rng.uniform(5, 12), 2), self.noise(200, 2)
        body = self.colour((0.1, 0.8), (0.2, 0.8)) * (1 + 0.03 * slow)[..., None]
        return Surface(body, 0.5 * self.unit * peel, self.rng.uniform(0.15, 0.5))

    def linen(self, over: int = 1) -> Surface:
        """Plain weave; the weft goes over ``over`` threads and then under as many, one thread further in every row."""
        pitch = self.length(6, 11)
        rows, columns = (axis + 0.8 * self.unit * self.noise(60) for axis in (self.rows, self.columns))
        row, column = np.floor(rows / pitch), np.floor(columns / pitch)
        weft_on_top = ((column + row) % (2 * over)) < over
        across = np.where(weft_on_top, rows / pitch - row, columns / pitch - column)
        bulge = np.sqrt(1 - (2 * across - 1) ** 2 * 0.98)
        fibres = np.where(weft_on_top, self.noise((1.2, 9)), self.noise((9, 1.2)))
        warp = self.colour((0.05, 0.6), (0.25, 0.85))
        weft = self.colour((0.05, 0.6), (0.25, 0.85)) if self.rng.random() < 0.5 else warp * 0.85
        body = mix(warp, weft, weft_on_top.astype(np.float32)) * (0.75 + 0.3 * bulge + 0.06 * fibres)[..., None]
        return Surface(body, bulge * pitch * 0.28 + 0.25 * self.unit * fibres, 0.08)

    def twill(self) -> Surface:
        """Diagonal weave."""
        return self.linen(over=2)

    def carpet(self) -> Surface:
        """Tufted pile with mottled yarn."""
        tufts = self.noise(self.rng.uniform(3.5, 7), 3)
        first, second = self.colour((0.1, 0.7), (0.2, 0.7)), self.colour((0.1, 0.6), (0.3, 0.8))
        body = mix(first, second, smoothstep(0.5 + 0.5 * self.noise(self.rng.uniform(4, 20), 4)))
        return Surface(body * np.clip(0.85 + 0.22 * tufts, 0.25, 1.3)[..., None], 1.5 * self.unit * tufts)

    def stripes(self) -> Surface:
        """Fabric with stripes of three widths, ribbed along them."""
        rng, unit, period = self.rng, self.unit, self.length(40, 80)
        place = (self.columns + 0.6 * unit * self.noise(90)) % period / period
        ground, first, second = (self.colour((0.1, 0.7), (0.25, 0.9)) for _ in range(3))
        wide, narrow, soft = rng.uniform(0.15, 0.35), rng.uniform(0.05, 0.15), 1.2 * unit / period
        body = mix(ground, first, smoothstep((wide / 2 - np.abs(place - 0.3)) / soft + 0.5))
        body = mix(body, second, smoothstep((narrow / 2 - np.abs(place - 0.75)) / soft + 0.5))
        ribs, fuzz = wave(self.columns / (4 * unit)), self.noise(1.6, 2)
        return Surface(body * (0.9 + 0.1 * ribs + 0.05 * fuzz)[..., None], (0.8 * ribs + 0.3 * fuzz) * unit)

    def basket(self) -> Surface:
        """Braid of broad bands."""
        pitch = self.length(22, 34)
        rows, columns = self.rows / pitch, self.columns / pitch
        row, column = np.floor(rows), np.floor(columns)
        flat = (row + column) % 2 < 1
        along, across = np.where(flat, (columns - column, rows - row), (rows - row, columns - column))
        grain = np.where(flat, self.noise((2, 30)), self.noise((30, 2)))
        band = smoothstep(np.minimum(across, 1 - across) * 9)
        height = band * (2 + 5 * np.sin(np.pi * along)) * self.unit + 0.3 * self.unit * grain
        shades = (0.35 + 0.65 * band) * (1 + 0.12 * np.sin(7.1 * row + 3.3 * column)) * (1 + 0.09 * grain)
        return Surface(self.near((0.62, 0.46, 0.28), 0.08) * shades[..., None], height, 0.12)

    def wood(self) -> Surface:
        """Planed boards: rings cut lengthwise, pores, and seams."""
        width, unit = self.length(60, 110), self.unit
        board = np.floor(self.rows / width)
        bend = self.noise((50, 260), 3)
        rings = wave((self.rows + 40 * unit * np.sin(board * 12.9)) / self.length(9, 18) + 1.3 * bend) ** 2
        pores = self.noise((1.1, 28), 2)
        seam = smoothstep(1.5 - periodic_distance(self.rows, width) / unit)
        light = self.near((0.68, 0.5, 0.33), 0.08)
        shades = (1 + 0.07 * pores + 0.06 * np.sin(board * 5.3)) * (1 - 0.6 * seam)
        body = mix(light, light * np.array([0.66, 0.6, 0.55], np.float32), rings) * shades[..., None]
        return Surface(body, (0.3 * pores - 0.4 * rings - 2 * seam) * unit, 0.12)

    def tiles(self) -> Surface:
        """Square glazed tiles with grout."""
        size, unit = self.length(36, 60), self.unit
        wobble = 0.125 * unit * self.noise(12)
        row, column = np.floor(self.rows / size), np.floor(self.columns / size)
        down = np.abs((self.rows / size - row) - 0.5) * size
        across = np.abs(self.columns / size % 1 - 0.5) * size
        edge = size / 2 - np.maximum(down, across) + wobble - 1.6 * unit
        tile, own = smoothstep(edge / (2.2 * unit)), np.sin(row * 127.1 + column * 311.7) * 43758.5
        grain = self.noise(14, 5)
        body = self.colour((0.02, 0.5), (0.5, 0.9)) * (0.8 + 0.35 * (own - np.floor(own)) + 0.0175 * grain)[..., None]
        joint = self.near((0.6, 0.58, 0.55), 0.06) * (1 + 0.08 * self.noise(2))[..., None]
        return Surface(mix(joint, body, tile), (3 * tile + 0.1 * grain * tile) * unit, 0.5 * tile)

    def leather(self) -> Surface:
        """Grained hide."""
        pitch = self.length(6, 12)
        gap, _, value = self.cells(pitch)
        dome, folds = smoothstep(gap / (0.7 * pitch)), self.noise(40, 4)
        body = self.near((0.42, 0.26, 0.17), 0.12) * (0.78 + 0.22 * dome + 0.06 * value + 0.05 * folds)[..., None]
        return Surface(body, (0.7 * dome + 0.9 * folds) * self.unit, 0.3)

    def gravel(self) -> Surface:
        """Round pebbles lying close together."""
        pitch = self.length(13, 26)
        gap, _, value = self.cells(pitch)
        dome, grain = np.sqrt(np.clip(gap / pitch, 0, 1)), self.noise(4, 3)
        tint = 1 + 0.05 * np.stack([np.sin(value * k) for k in (61, 64, 68)], -1)
        body = self.near((0.56, 0.52, 0.48), 0.07) * tint * (0.65 + 0.6 * value[..., None])
        body = body * (0.3 + 0.75 * dome + 0.05 * grain)[..., None]
        return Surface(body, dome * pitch * 0.45 + 0.3 * self.unit * grain, 0.06)

    def concrete(self) -> Surface:
        """Cast concrete with clouds and air pores."""
        unit, cloud, grain = self.unit, self.noise(110, 6), self.noise(2.5, 3)
        _, first, value = self.cells(24 * unit)
        pore = smoothstep((value**4 * 4.5 * unit - first) / (1.1 * unit))
        shades = (1 + 0.07 * cloud + 0.035 * grain) * (1 - 0.6 * pore)
        body = self.near((0.58, 0.57, 0.55), 0.05) * shades[..., None]
        return Surface(body, (0.5 * grain + 0.8 * cloud - 3 * pore) * unit)
