"""Parts drawn from outlines: signed distances to simple shapes, and a board on which bodies are stacked up."""

from __future__ import annotations

import math

import numpy as np

from training.synthetic.materials import axes
from training.synthetic.noise import Field, noise, smoothstep
from training.synthetic.surface import Surface

# A signed distance field (N, N): px to the outline of a shape, negative inside.


class Board:
    """A square on which a part is drawn, in a frame that goes from -1 to 1 both ways (y down)."""

    def __init__(self, rng: np.random.Generator, side: int, unit: float) -> None:
        """Args: ``side`` of the board in px; ``unit``: px that are one px of a photograph of 256 px."""
        rows, columns = axes(side)
        self.rng, self.unit, self.half = rng, unit, side / 2
        self.y, self.x = rows / self.half - 1, columns / self.half - 1
        self.radius, self.angle = np.sqrt(self.y**2 + self.x**2), np.arctan2(self.y, self.x)
        self._colour = np.zeros((side, side, 3), np.float32)
        self._height, self._gloss, self._metal, self._inside = np.zeros((4, side, side), np.float32)

    @property
    def surface(self) -> Surface:
        """What has been drawn."""
        return Surface(self._colour, self._height, self._gloss, self._metal, self._inside)

    def disc(self, x: float, y: float, radius: float) -> Field:
        """Signed distance to a circle."""
        return (np.hypot(self.x - x, self.y - y) - radius) * self.half

    def ring(self, inner: float, outer: float) -> Field:
        """Signed distance to a ring around the centre."""
        return np.maximum(self.radius - outer, inner - self.radius) * self.half

    def box(self, x: float, y: float, width: float, height: float, corner: float = 0.0, turn: float = 0.0) -> Field:
        """Signed distance to a rectangle of half sides ``width`` and ``height``, with round corners, turned."""
        dx, dy = self.x - x, self.y - y
        along = np.abs(dx * math.cos(turn) + dy * math.sin(turn)) - width + corner
        across = np.abs(dy * math.cos(turn) - dx * math.sin(turn)) - height + corner
        outside = np.hypot(np.clip(along, 0, None), np.clip(across, 0, None))
        return (outside + np.minimum(np.maximum(along, across), 0) - corner) * self.half

    def polygon(self, corners: int, radius: float, turn: float = 0.0) -> Field:
        """Signed distance to a regular polygon around the centre; ``radius`` of the inscribed circle."""
        sector = 2 * math.pi / corners
        folded = (self.angle - turn + sector / 2) % sector - sector / 2
        return (self.radius * np.cos(folded) - radius) * self.half

    def rosette(self, radius: float, teeth: int, depth: float, sharpness: float = 1.0) -> Field:
        """About the signed distance to a toothed or waved circle; ``sharpness`` 1 for waves, 4 for a gear."""
        swing = np.clip(np.cos(self.angle * teeth) * sharpness, -1, 1)
        return (self.radius - radius - depth * swing) * self.half

    def dome(self, distance: Field, radius: float) -> Field:
        """The height (N, N) in [0, 1] of a round body over an outline that is ``radius`` away from its middle line."""
        return np.sqrt(np.clip(1 - (1 + np.minimum(distance, 0) / (radius * self.half)) ** 2, 0, 1))

    def add(
        self,
        distance: Field,
        colour: np.ndarray,
        *,
        rise: float = 4.0,
        bevel: float = 3.0,
        gloss: float = 0.2,
        metal: float = 0.0,
        grain: float = 0.02,
        relief: Field | float = 0.0,
    ) -> None:
        """Puts a body on what is there.

        Args:
            distance: its outline.
            colour: (3,) or (N, N, 3) in [0, 1].
            rise: its height in units over what is below (negative: a recess).
            bevel: width of its rounded edge in units.
            gloss: see ``Surface``.
            metal: see ``Surface``.
            grain: unevenness of its colour and surface.
            relief: a height of its own in units, (N, N).
        """
        cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)
        uneven = noise(self.rng, cover.shape, 6 * self.unit, 4) * grain
        self._colour += (colour * (1 + uneven)[..., None] - self._colour) * cover[..., None]
        edge = smoothstep(-distance / (bevel * self.unit) * 0.5 + 0.5 * (bevel > 0)) if bevel else 1.0
        profile = np.sqrt(np.clip(edge, 0, 1)) if rise > 0 else edge
        self._height += cover * (rise * profile + relief + 2 * uneven) * self.unit
        self._gloss += (gloss - self._gloss) * cover
        self._metal += (metal - self._metal) * cover
        self._inside = np.maximum(self._inside, cover)

    def cut(self, distance: Field) -> None:
        """Makes a hole through everything."""
        self._inside *= np.clip(0.5 + distance, 0, 1)
