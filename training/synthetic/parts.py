"""Procedural parts seen from above: turned, cast or pressed ones, and devices that are moulded or assembled."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from training.synthetic.camera import Field, Rng, Surface, mix, noise, smoothstep
from training.synthetic.materials import Range, Sheet, wave

_STEEL, _BRASS, _BLACK = (0.68, 0.69, 0.71), (0.78, 0.65, 0.38), (0.12, 0.12, 0.13)
_METALS = (_STEEL, _BRASS, (0.6, 0.62, 0.62), (0.72, 0.5, 0.4))
_TIN, _PRINT, _GOLD = np.array([(0.74, 0.75, 0.75), (0.6, 0.6, 0.6), (0.84, 0.68, 0.32)], np.float32)


def bulge(place: Field) -> Field:
    """The height (H, W) in [0, 1] of a round body, at ``place`` 0 over its middle line and at 1 on its outline."""
    return np.sqrt(np.clip(1 - place**2, 0, 1))


class Part(Sheet):
    """The recipes of parts, which stack up a ``surface`` from bodies, in a frame from -1 to 1 both ways (y down).

    An outline is a signed distance field (N, N): px to the outline of a shape, negative inside.
    """

    def __init__(self, rng: Rng, side: int, unit: float) -> None:
        super().__init__(rng, side, unit)
        self.half = side / 2
        self.y, self.x = self.rows / self.half - 1, self.columns / self.half - 1
        self.radius, self.angle = np.sqrt(self.y**2 + self.x**2), np.arctan2(self.y, self.x)
        self._colour = np.zeros((side, side, 3), np.float32)
        self._height, self._gloss, self._metal, self._inside = np.zeros((4, side, side), np.float32)
        self.surface = Surface(self._colour, self._height, self._gloss, self._metal, self._inside)

    def disc(self, x: float, y: float, radius: float) -> Field:
        """Outline of a circle."""
        return (np.hypot(self.x - x, self.y - y) - radius) * self.half

    def discs(self, count: int, far: float, radius: float, start: float = 0.0) -> Iterator[Field]:
        """Outlines of circles around the centre, ``far`` from it, from ``start`` gaps on."""
        for k in range(count):
            turn = 2 * math.pi * (k + start) / count
            yield self.disc(far * math.cos(turn), far * math.sin(turn), radius)

    def ring(self, inner: float, outer: float) -> Field:
        """Outline of a ring around the centre."""
        return np.maximum(self.radius - outer, inner - self.radius) * self.half

    def box(self, x: float, y: float, width: float, height: float, corner: float = 0.0, turn: float = 0.0) -> Field:
        """Outline of a rectangle of half sides ``width`` and ``height``, with round corners, turned."""
        dx, dy = self.x - x, self.y - y
        along = np.abs(dx * math.cos(turn) + dy * math.sin(turn)) - width + corner
        across = np.abs(dy * math.cos(turn) - dx * math.sin(turn)) - height + corner
        outside = np.hypot(np.clip(along, 0, None), np.clip(across, 0, None))
        return (outside + np.minimum(np.maximum(along, across), 0) - corner) * self.half

    def rosette(self, radius: float, teeth: int, depth: float, sharpness: float = 1.0) -> Field:
        """About the outline of a toothed or waved circle; ``sharpness`` 1 for waves, 4 for a gear."""
        swing = np.clip(np.cos(self.angle * teeth) * sharpness, -1, 1)
        return (self.radius - radius - depth * swing) * self.half

    def dome(self, outline: Field, radius: float) -> Field:
        """``bulge`` over an outline that is ``radius`` away from its middle line."""
        return bulge(1 + np.minimum(outline, 0) / (radius * self.half))

    def metal(self) -> np.ndarray:
        """A colour (3,) of one of the common metals."""
        return self.near(self.rng.choice(_METALS), 0.04)

    def turned(self, colour: np.ndarray, depth: float = 0.05) -> np.ndarray:
        """``colour`` (3,) with the fine rings (N, N, 3) that a lathe leaves."""
        rings = noise(self.rng, (1, 512), 3, 2)[0][np.clip(self.radius * 300, 0, 511).astype(int)]
        return colour * (1 + depth * rings)[..., None]

    def add(
        self, outline: Field, colour: np.ndarray, *, rise: float = 4.0, bevel: float = 3.0, gloss: float = 0.2,
        metal: float = 0.0, grain: float = 0.02, relief: Field | float = 0.0,
    ) -> None:  # fmt: skip
        """Puts a body on what is there.

        ``colour``: (3,) or (N, N, 3) in [0, 1]; ``rise``: its height in units over what is below (negative: a recess);
        ``bevel``: width of its rounded edge in units; ``gloss`` and ``metal``: see ``Surface``; ``grain``: unevenness
        of its colour and surface; ``relief``: a height of its own in units, (N, N).
        """
        cover = np.clip(0.5 - outline, 0, 1).astype(np.float32)
        uneven = self.noise(6, 4) * grain
        edge = smoothstep(-outline / (bevel * self.unit) * 0.5 + 0.5) if bevel else 1.0
        profile = np.sqrt(np.clip(edge, 0, 1)) if rise > 0 else edge
        self._colour += (colour * (1 + uneven)[..., None] - self._colour) * cover[..., None]
        self._height += cover * (rise * profile + relief + 2 * uneven) * self.unit
        self._gloss += (gloss - self._gloss) * cover
        self._metal += (metal - self._metal) * cover
        np.maximum(self._inside, cover, out=self._inside)

    def cut(self, *outlines: Field) -> None:
        """Makes holes through everything."""
        for outline in outlines:
            self._inside *= np.clip(0.5 + outline, 0, 1)

    def gear(self) -> None:
        """Gear wheel with hub, keyhole and sometimes openings."""
        metal, outline = self.metal(), self.rosette(0.68, int(self.rng.integers(14, 30)), 0.06, 2.5)
        self.add(outline, self.turned(metal), rise=6, gloss=0.3, metal=0.65)
        self.add(self.ring(0.3, 0.54), metal * 0.85, rise=-3, bevel=4, metal=0.55)
        self.cut(*self.discs(int(self.rng.integers(0, 7)), 0.42, 0.085))
        self.cut(np.minimum(self.disc(0, 0, 0.14), self.box(0, -0.15, 0.04, 0.06)))

    def screw(self) -> None:
        """Screw lying on its side: head, shank, thread and point."""
        metal, rng = self.metal(), self.rng
        thread_from, pitch = rng.uniform(-0.3, 0.05), rng.uniform(0.045, 0.07)
        round_shank, threaded = bulge(self.y / 0.15) * 14, self.x > thread_from
        taper = np.clip((self.x - 0.55) / 0.25, 0, 1) * 0.13
        turns = wave((self.x + 0.25 * self.y) / pitch) * threaded
        rod = np.maximum(self.box(0.1, 0, 0.72, 0.13), (np.abs(self.y) - 0.13 + taper) * self.half)
        shades = metal * (0.75 + 0.25 * np.where(threaded, turns, 0.8))[..., None]
        self.add(rod - 0.022 * self.half * turns, shades, rise=1, gloss=0.45, metal=0.7, relief=round_shank + 3 * turns)
        head = self.box(-0.66, 0, rng.uniform(0.09, 0.13), 0.3, rng.uniform(0.01, 0.09))
        dome = bulge(self.y / 0.32) * 18 - round_shank * (self.x > -0.62)
        self.add(head, metal, rise=3, gloss=0.45, metal=0.7, relief=dome)

    def washer(self) -> None:
        """Flat or toothed ring of metal."""
        metal, rng = self.metal(), self.rng
        outer, inner = rng.uniform(0.6, 0.72), rng.uniform(0.26, 0.38)
        ring = self.ring(inner, outer)
        if rng.random() < 0.5:
            ring = np.maximum(ring, self.rosette(outer, int(rng.integers(10, 22)), 0.045, 3))
        self.add(ring, self.turned(metal, 0.07), rise=5, bevel=4, gloss=0.35, metal=0.7)

    def bottle_cap(self) -> None:
        """Crown cap with 21 teeth and a print."""
        ink = self.colour((0.5, 0.9), (0.35, 0.85))
        skirt = 5 * wave(self.angle * 21 / (2 * math.pi)) * smoothstep((self.radius - 0.5) * 6)
        self.add(self.rosette(0.7, 21, 0.03), ink, rise=6, bevel=10, gloss=0.5, metal=0.25, relief=skirt)
        second = self.colour((0.1, 0.8), (0.6, 0.95))
        self.add(self.ring(0.4, self.rng.uniform(0.44, 0.5)), second, rise=0.5, gloss=0.5)
        self.add(self.rosette(0.2, int(self.rng.integers(3, 9)), 0.09), second, rise=0.5, gloss=0.5)

    def bearing(self) -> None:
        """Ball bearing: two rings, a cage and balls."""
        metal = self.near(_STEEL, 0.04)
        shine = self.turned(metal)
        self.add(self.ring(0.25, 0.72), self.near((0.2, 0.2, 0.21), 0.03), rise=1, gloss=0.1)
        cage = self.near(_BRASS, 0.06) if self.rng.random() < 0.5 else metal * 0.8
        self.add(self.ring(0.43, 0.55), cage, rise=3, gloss=0.3, metal=0.5)
        for ball in self.discs(int(self.rng.integers(7, 13)), 0.49, 0.085):
            self.add(ball, metal, rise=1, gloss=0.7, metal=0.6, relief=9 * self.dome(ball, 0.085))
        for ring in (self.ring(0.25, 0.38), self.ring(0.6, 0.74)):
            self.add(ring, shine, rise=6, bevel=3, gloss=0.4, metal=0.7)

    def circuit_board(self) -> None:
        """Printed circuit board with traces, vias, chips and small components."""
        rng = self.rng
        resist = self.near(self.rng.choice(((0.05, 0.3, 0.16), (0.06, 0.16, 0.36), (0.1, 0.1, 0.11))), 0.03)
        self.add(self.box(0, 0, 0.78, 0.74, 0.04), resist, rise=3, gloss=0.3)
        for _ in range(26):
            x, y = rng.uniform(-0.7, 0.7), rng.uniform(-0.66, 0.66)
            turn = float(rng.choice([0, math.pi / 2, math.pi / 4]))
            reach = min(rng.uniform(0.08, 0.4), 0.74 - abs(x), 0.7 - abs(y))
            self.add(self.box(x, y, reach, 0.009, 0.0, turn), resist * 1.7 + 0.02, rise=0.3, gloss=0.3)
            self.add(self.disc(x, y, 0.018), _GOLD, rise=0.3, gloss=0.4, metal=0.5)
        for y, x in product((-0.66, 0.66), (-0.7, 0.7)):
            self.add(self.disc(x, y, 0.06), _TIN, rise=0.4, gloss=0.4, metal=0.5)
            self.cut(self.disc(x, y, 0.035))
        for _ in range(12):
            x, y = rng.uniform(-0.6, 0.6), rng.uniform(-0.58, 0.58)
            wide = rng.random() < 0.5
            width, height = (0.055, 0.028) if wide else (0.028, 0.055)
            self.add(self.box(x, y, width, height, 0.01), _TIN, rise=2, gloss=0.4, metal=0.5)
            body = self.near(self.rng.choice(((0.13, 0.13, 0.13), (0.5, 0.38, 0.26))), 0.04)
            self.add(self.box(x, y, width * (0.6 if wide else 1), height * (1 if wide else 0.6)), body, rise=1.5)
        self._chip(rng.uniform(-0.35, -0.1), rng.uniform(-0.25, 0.25), (0.18, 0.26), (6, 10))
        self._chip(rng.uniform(0.35, 0.45), rng.uniform(-0.35, 0.35), (0.1, 0.15), (3, 6))

    def capsule(self) -> None:
        """Gelatine capsule of two colours."""
        halves = self.colour((0.3, 0.9), (0.4, 0.9)), self.colour((0.05, 0.6), (0.6, 0.95))
        joint = (self.x > self.rng.uniform(-0.1, 0.15)).astype(np.float32)
        outline = self.box(0, 0, 0.7, 0.26, 0.26)
        barrel = 24 * self.dome(outline, 0.26) * (1 + 0.04 * joint)
        self.add(outline, mix(*halves, joint), rise=1, gloss=0.8, relief=barrel, grain=0.01)

    def connector(self) -> None:
        """Plastic housing with two rows of contacts."""
        shell = self.near((0.86, 0.84, 0.78), 0.04) if self.rng.random() < 0.5 else self.colour((0.1, 0.8), (0.15, 0.6))
        self.add(self.box(0, 0, 0.78, 0.36, 0.05), shell, rise=7, bevel=4, gloss=0.25)
        self.add(self.box(0, 0, 0.68, 0.25, 0.03), shell * 0.45, rise=-6, bevel=3)
        self.add(self.box(0, -0.4, 0.18, 0.06, 0.02), shell, rise=5, gloss=0.25)
        contact = _GOLD if self.rng.random() < 0.6 else _TIN
        count = int(self.rng.integers(5, 10))
        for k, y in product(range(count), (-0.11, 0.11)):
            pin = self.box((k + 0.5) / count * 1.24 - 0.62, y, 0.03, 0.045, 0.01)
            self.add(pin, contact, rise=6, bevel=2, gloss=0.5, metal=0.6)

    def button(self) -> None:
        """Sewing button with a rim and two or four holes."""
        tone = self.colour((0.1, 0.8), (0.2, 0.9))
        tone = mix(tone, tone * 0.8, wave(self.x * 2 + 0.4 * np.sin(self.y * 5 + self.rng.uniform(0, 6))))
        self.add(self.disc(0, 0, 0.66), tone, rise=6, bevel=9, gloss=0.6)
        self.add(self.disc(0, 0, 0.46), tone, rise=-4, bevel=8, gloss=0.6)
        self.cut(*self.discs(int(self.rng.choice([2, 4])), 0.17, 0.075, start=0.5))

    def plug(self) -> None:
        """Mains plug: body with grip ribs, two pins, a cable."""
        rng = self.rng
        body = self.near((0.85, 0.85, 0.83), 0.04) if rng.random() < 0.5 else self.near(_BLACK, 0.03) + np.float32(0.06)
        self.add(self.box(-0.62, 0, 0.3, 0.08, 0.02), body * 0.9, rise=1, relief=5 * bulge(self.y / 0.09))
        for y in (-0.17, 0.17):
            rod = 5 * bulge((self.y - y) / 0.05)
            self.add(self.box(0.5, y, 0.28, 0.05, 0.03), _TIN, rise=1, gloss=0.5, metal=0.6, relief=rod)
        barrel = 8 * bulge(self.y / 0.4) + 2.5 * wave(self.x * rng.uniform(9, 14)) * (np.abs(self.x + 0.15) < 0.22)
        self.add(self.box(-0.05, 0, 0.38, 0.36, 0.12), body, rise=4, bevel=6, gloss=0.25, relief=barrel)

    def _chip(self, x: float, y: float, sizes: Range, leads: tuple[int, int]) -> None:
        """One packaged circuit at (x, y), of a size and a number of leads on two sides within the given bounds."""
        half, count = self.rng.uniform(*sizes), int(self.rng.integers(*leads))
        for k in range(count):
            lead = self.box(x, y + ((k + 0.5) / count * 2 - 1) * half, half * 1.28, half * 0.4 / count)
            self.add(lead, _TIN, rise=1, bevel=1, gloss=0.5, metal=0.6)
        self.add(self.box(x, y, half, half * 1.08, 0.01), self.near(_BLACK, 0.02), rise=5, bevel=2, gloss=0.12)
        self.add(self.disc(x - half * 0.7, y - half * 0.78, half * 0.1), self.near((0.3, 0.3, 0.3)), rise=-1)
        for line, k in product(range(2), range(6)):
            letter = self.box(x + half * (k * 0.22 - 0.55), y + half * (0.1 + 0.3 * line), half * 0.07, half * 0.08)
            self.add(letter, _PRINT, rise=0, bevel=0)
