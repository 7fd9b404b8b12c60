"""A drawn surface (colour, relief, gloss) and how it looks under a lamp."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from training.synthetic.noise import Field, slopes

_AMBIENT = 0.42  # share of the light that comes from everywhere
_POLISH = 40  # exponent of the highlight: about 10 degrees wide


@dataclass(frozen=True)
class Surface:
    """A square piece of material, or a part seen from above.

    ``colour`` (N, N, 3) in [0, 1]; ``height`` (N, N) in px; ``gloss`` and ``metal``: (N, N) or one number, from 0
    (matt; paint) to 1 (polished; bare metal); ``inside`` (N, N) in [0, 1]: 1 on the part, None where all is material.
    """

    colour: np.ndarray
    height: Field
    gloss: Field | float = 0.0
    metal: Field | float = 0.0
    inside: Field | None = None


@dataclass(frozen=True)
class Lamp:
    """Where the light comes from: ``azimuth`` in radians in the image plane, ``elevation`` in radians above it."""

    azimuth: float
    elevation: float


def colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A colour (3,) in [0, 1] of any hue, with a saturation and a value within the given bounds."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, np.float32)


def near(rng: np.random.Generator, rgb: tuple[float, float, float], spread: float = 0.05) -> np.ndarray:
    """A colour (3,) in [0, 1] close to ``rgb``: lighter or darker by about ``spread``, and of nearly the same hue."""
    return np.clip(np.array(rgb) + rng.normal(0, spread) + rng.normal(0, spread * 0.3, 3), 0.02, 0.98).astype(
        np.float32
    )


def mix(first: np.ndarray, second: np.ndarray, share: Field) -> np.ndarray:
    """From the first colour, (3,) or (H, W, 3), to the second, as ``share`` (H, W) goes from 0 to 1: (H, W, 3)."""
    return first + (second - first) * share[..., None]


def shade(surface: Surface, lamp: Lamp) -> np.ndarray:
    """The surface lit by the lamp, as grey levels (N, N, 3) float32.

    Lambert's law for the body, Blinn and Phong's for the highlight, a striped sky for what metal mirrors, and less
    light in hollows.
    """
    down, across = slopes(surface.height)
    upright = 1 / np.sqrt(1 + down**2 + across**2)
    flat = math.cos(lamp.elevation)
    to_lamp = -(down * math.sin(lamp.azimuth) + across * math.cos(lamp.azimuth)) * upright  # the slope's share of it
    lambert = np.clip(to_lamp * flat + upright * math.sin(lamp.elevation), 0, None) / math.sin(lamp.elevation)
    body = surface.colour * ((_AMBIENT + (1 - _AMBIENT) * lambert) * _openness(surface.height))[..., None]
    mirrored = surface.colour * (0.42 + 0.62 * _sky(to_lamp, lamp))[..., None]
    metal = np.broadcast_to(surface.metal, lambert.shape)[..., None]
    half = (math.pi / 2 + lamp.elevation) / 2  # elevation of the direction between the lamp and the camera above
    glance = np.clip(to_lamp * math.cos(half) + upright * math.sin(half), 0, 1) ** _POLISH
    highlight = (surface.gloss * glance * 0.75)[..., None]
    return ((body + (mirrored - body) * metal + highlight) * 255).astype(np.float32)


def _openness(height: Field) -> Field:
    """1 on a plain, less in a hollow, a little more on a crest."""
    reach = max(height.shape[0] // 60, 3)
    return np.clip(1 + 0.09 * (height - ndimage.uniform_filter(height, reach)), 0.5, 1.12)


def _sky(to_lamp: Field, lamp: Lamp) -> Field:
    """What metal mirrors, in [0, 1]: a bright lamp box, a dark room, and a slow change across the image."""
    rows, columns = (np.linspace(-1, 1, side, dtype=np.float32) for side in to_lamp.shape)
    drift = rows[:, None] * math.sin(lamp.azimuth) + columns[None] * math.cos(lamp.azimuth)
    return 0.5 + 0.5 * np.sin(3.2 * to_lamp + 0.9 * drift + 0.4)
