"""Procedural materials that grow or are cast: wood, stone, leather, foam, brick and tile."""

from __future__ import annotations

import numpy as np

from training.synthetic.materials import Recipe, axes, periodic_distance, wave
from training.synthetic.noise import Field, noise, smoothstep
from training.synthetic.surface import Surface, colour, mix, near


def cells(rng: np.random.Generator, side: int, pitch: float) -> tuple[Field, Field, Field]:
    """Voronoi cells of about ``pitch`` px around jittered seeds.

    Returns:
        Distances to the nearest and to the second nearest seed in px, and a random number in [0, 1) for each cell;
        all (side, side).
    """
    count = int(side / pitch) + 4
    corners = np.indices((count, count), dtype=np.float32).transpose(1, 2, 0) - 1
    seeds = (corners + rng.random((count, count, 2), dtype=np.float32)) * np.float32(pitch)
    values = rng.random((count, count), dtype=np.float32)
    rows, columns = axes(side)
    row, column = (rows / pitch).astype(int) + 1, (columns / pitch).astype(int) + 1
    first, second = np.full((2, side, side), np.inf, np.float32)
    value = np.zeros((side, side), np.float32)
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            seed = seeds[row + down, column + across]
            far = np.sqrt((seed[..., 0] - rows) ** 2 + (seed[..., 1] - columns) ** 2)
            nearer = far < first
            second = np.where(nearer, first, np.minimum(second, far))
            value = np.where(nearer, values[row + down, column + across], value)
            first = np.minimum(first, far)
    return first, second, value


def wood(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Planed boards: rings cut lengthwise, pores, and seams."""
    rows, _ = axes(side)
    width = rng.uniform(60, 110) * unit
    board = np.floor(rows / width)
    shift = 40 * unit * np.sin(board * 12.9)
    bend = noise(rng, (side, side), (50 * unit, 260 * unit), 3)
    rings = wave((rows + shift) / (rng.uniform(9, 18) * unit) + 1.3 * bend) ** 2
    pores = noise(rng, (side, side), (1.1 * unit, 28 * unit), 2)
    seam = smoothstep(1.5 - periodic_distance(rows, width) / unit)
    light = near(rng, (0.68, 0.5, 0.33), 0.08)
    shades = (1 + 0.07 * pores + 0.06 * np.sin(board * 5.3)) * (1 - 0.6 * seam)
    tone = mix(light, light * np.array([0.66, 0.6, 0.55], np.float32), rings) * shades[..., None]
    return Surface(tone, (0.3 * pores - 0.4 * rings - 2 * seam) * unit, 0.12)


def tiles(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Glazed tiles with grout."""
    return _masonry(rng, side, unit, pitch=(36, 60), long=1, offset=0.0, rough=0.25, gloss=0.5)


def brick(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Bricks in a running bond."""
    return _masonry(rng, side, unit, pitch=(22, 32), long=2.4, offset=0.5, rough=1.3, gloss=0.0)


def _masonry(
    rng: np.random.Generator, side: int, unit: float, *, pitch: tuple[float, float], long: float, offset: float,
    rough: float, gloss: float,
) -> Surface:  # fmt: skip
    size = rng.uniform(*pitch) * unit
    rows, columns = axes(side)
    wobble = 0.5 * rough * unit * noise(rng, (side, side), 12 * unit)
    row = np.floor(rows / size)
    down = np.abs((rows / size - row) - 0.5) * size
    place = columns / (size * long) + offset * row
    across = np.abs(place % 1 - 0.5) * size * long
    edge = np.minimum(size / 2 - down, size * long / 2 - across) + wobble - 1.6 * unit
    stone = smoothstep(edge / (2.2 * unit))
    own = np.sin(row * 127.1 + np.floor(place) * 311.7) * 43758.5
    own = own - np.floor(own)
    grain = noise(rng, (side, side), 14 * unit, 5)
    tone = near(rng, (0.6, 0.36, 0.27), 0.1) if rough > 1 else colour(rng, (0.02, 0.5), (0.5, 0.9))
    body = tone * (0.8 + 0.35 * own + 0.07 * rough * grain)[..., None]
    joint = near(rng, (0.6, 0.58, 0.55), 0.06) * (1 + 0.08 * noise(rng, (side, side), 2 * unit))[..., None]
    return Surface(mix(joint, body, stone), (3 * stone + 0.4 * rough * grain * stone) * unit, gloss * stone)


def terrazzo(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Polished chips of several stones in cement."""
    first, second, value = cells(rng, side, rng.uniform(12, 22) * unit)
    gap = second - first + 1.5 * unit * noise(rng, (side, side), 6 * unit)
    chip = smoothstep((gap - 3.5 * unit) / (1.3 * unit)) * (value > 0.25)
    palette = np.stack([colour(rng, (0.05, 0.45), (0.25, 0.9)) for _ in range(5)])
    stones = palette[(value * 997).astype(int) % 5]
    ground = near(rng, (0.78, 0.76, 0.72), 0.06)
    cloud = noise(rng, (side, side), 5 * unit, 3)
    return Surface(mix(ground, stones, chip) * (1 + 0.03 * cloud)[..., None], 0.08 * unit * cloud, 0.3)


def gravel(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Round pebbles lying close together."""
    pitch = rng.uniform(13, 26) * unit
    first, second, value = cells(rng, side, pitch)
    dome = np.sqrt(np.clip((second - first) / pitch, 0, 1))
    grain = noise(rng, (side, side), 4 * unit, 3)
    tone = near(rng, (0.56, 0.52, 0.48), 0.07)
    tint = 1 + 0.05 * np.stack([np.sin(value * k) for k in (61, 64, 68)], -1)
    body = tone * tint * (0.65 + 0.6 * value[..., None]) * (0.3 + 0.75 * dome + 0.05 * grain)[..., None]
    return Surface(body, dome * pitch * 0.45 + 0.3 * unit * grain, 0.06)


def leather(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Grained hide."""
    pitch = rng.uniform(6, 12) * unit
    first, second, value = cells(rng, side, pitch)
    dome = smoothstep((second - first) / (0.7 * pitch))
    folds = noise(rng, (side, side), 40 * unit, 4)
    tone = near(rng, (0.42, 0.26, 0.17), 0.12)
    body = tone * (0.78 + 0.22 * dome + 0.06 * value + 0.05 * folds)[..., None]
    return Surface(body, (0.7 * dome + 0.9 * folds) * unit, 0.3)


def concrete(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Cast concrete with clouds and air pores."""
    cloud, grain = noise(rng, (side, side), 110 * unit, 6), noise(rng, (side, side), 2.5 * unit, 3)
    first, _, value = cells(rng, side, 24 * unit)
    pore = smoothstep((value**4 * 4.5 * unit - first) / (1.1 * unit))
    tone = near(rng, (0.58, 0.57, 0.55), 0.05)
    body = tone * ((1 + 0.07 * cloud + 0.035 * grain) * (1 - 0.6 * pore))[..., None]
    return Surface(body, (0.5 * grain + 0.8 * cloud - 3 * pore) * unit)


def granite(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Polished rock of three minerals."""
    first, second = noise(rng, (side, side), 9 * unit, 4), noise(rng, (side, side), 6 * unit, 4)
    ground, pale, dark = (
        colour(rng, (0.05, 0.35), (0.4, 0.65)),
        near(rng, (0.8, 0.78, 0.76)),
        near(rng, (0.13, 0.12, 0.12), 0.03),
    )
    body = mix(mix(ground, pale, smoothstep(1.6 * first)), dark, smoothstep(2.2 * second - 1.2))
    return Surface(body, 0.1 * unit * first, 0.35)


def marble(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Polished stone with veins."""
    bend = noise(rng, (side, side), 120 * unit, 6)
    other = noise(rng, (side, side), 70 * unit, 5)
    veins = np.exp(-(np.abs(bend) / 0.07)) + 0.5 * np.exp(-(np.abs(other - 0.3) / 0.05))
    ground = near(rng, (0.86, 0.84, 0.82), 0.05)
    body = mix(ground, colour(rng, (0.05, 0.4), (0.25, 0.5)), np.clip(veins, 0, 1) * 0.75)
    return Surface(body * (1 + 0.03 * other)[..., None], 0.05 * unit * bend, 0.35)


def foam(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Open-celled sponge."""
    pitch = rng.uniform(6, 13) * unit
    first, second, value = cells(rng, side, pitch)
    bubble = smoothstep((second - first) / (0.55 * pitch)) * (0.4 + 0.6 * value)
    grain = noise(rng, (side, side), 40 * unit, 3)
    tone = colour(rng, (0.1, 0.7), (0.55, 0.95))
    return Surface(tone * (1 - 0.6 * bubble + 0.03 * grain)[..., None], -3.0 * bubble * unit)


def cork(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Pressed granules of bark."""
    first, second, value = cells(rng, side, rng.uniform(9, 15) * unit)
    gap = smoothstep((second - first) / (2.5 * unit))
    grain = noise(rng, (side, side), 5 * unit, 4)
    tone = near(rng, (0.68, 0.5, 0.34), 0.05)
    body = tone * ((0.7 + 0.5 * value) * (0.65 + 0.35 * gap) + 0.06 * grain)[..., None]
    return Surface(body, (0.9 * gap + 0.5 * grain) * unit)


MINERALS: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (wood, tiles, leather, gravel, terrazzo, concrete, brick, foam, granite, marble, cork)
}
