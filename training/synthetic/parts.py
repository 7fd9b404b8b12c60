"""Procedural parts that are turned, cast or pressed, seen from above: gear, washer, nut, screw, cap, pill, ..."""

from __future__ import annotations

import math

import numpy as np

from training.synthetic.drawing import Board
from training.synthetic.materials import Recipe, wave
from training.synthetic.noise import noise, smoothstep
from training.synthetic.surface import Surface, colour, near

_STEEL, _BRASS, _ZINC = (0.68, 0.69, 0.71), (0.78, 0.65, 0.38), (0.6, 0.62, 0.62)
_METALS = (_STEEL, _BRASS, _ZINC, (0.72, 0.5, 0.4))


def _metal(rng: np.random.Generator) -> np.ndarray:
    return near(rng, _METALS[int(rng.integers(len(_METALS)))], 0.04)


def _turned(board: Board) -> np.ndarray:
    """The fine rings (N, N) in about [-1, 1] that a lathe leaves."""
    rings = noise(board.rng, (1, 512), 3, 2)[0]
    return rings[np.clip(board.radius * 300, 0, 511).astype(int)]


def gear(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Gear wheel with hub, keyhole and sometimes openings."""
    board, metal = Board(rng, side, unit), _metal(rng)
    teeth = int(rng.integers(14, 30))
    body = metal * (1 + 0.05 * _turned(board))[..., None]
    board.add(board.rosette(0.68, teeth, 0.06, 2.5), body, rise=6, gloss=0.3, metal=0.65)
    board.add(board.ring(0.3, 0.54), metal * 0.85, rise=-3, bevel=4, gloss=0.2, metal=0.55)
    for k in range(count := int(rng.integers(0, 7))):
        turn = 2 * math.pi * k / count
        board.cut(board.disc(0.42 * math.cos(turn), 0.42 * math.sin(turn), 0.085))
    board.cut(np.minimum(board.disc(0, 0, 0.14), board.box(0, -0.15, 0.04, 0.06)))
    return board.surface


def washer(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Flat or toothed ring of metal."""
    board, metal = Board(rng, side, unit), _metal(rng)
    outer, inner = rng.uniform(0.6, 0.72), rng.uniform(0.26, 0.38)
    ring = board.ring(inner, outer)
    if rng.random() < 0.5:
        ring = np.maximum(ring, board.rosette(outer, int(rng.integers(10, 22)), 0.045, 3))
    board.add(ring, metal * (1 + 0.07 * _turned(board))[..., None], rise=5, bevel=4, gloss=0.35, metal=0.7)
    return board.surface


def nut(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Hexagon nut with a thread in its bore."""
    board, metal = Board(rng, side, unit), _metal(rng)
    board.add(board.polygon(6, 0.56, rng.uniform(0, 1)), metal * 0.85, rise=10, bevel=3, gloss=0.3, metal=0.7)
    board.add(
        board.disc(0, 0, 0.55), metal * (1 + 0.05 * _turned(board))[..., None], rise=3, bevel=6, gloss=0.4, metal=0.7
    )
    thread = wave(board.radius * 30 + board.angle / (2 * math.pi))
    board.add(board.disc(0, 0, 0.34), metal * 0.45, rise=-10, bevel=5, metal=0.6, relief=1.5 * thread)
    board.add(board.disc(0, 0, 0.25), near(rng, (0.08, 0.08, 0.08), 0.02), rise=-4, gloss=0.0)
    return board.surface


def screw(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Screw lying on its side: head, shank, thread and point."""
    board, metal = Board(rng, side, unit), _metal(rng)
    thread_from, pitch = rng.uniform(-0.3, 0.05), rng.uniform(0.045, 0.07)
    round_shank = np.sqrt(np.clip(1 - (board.y / 0.15) ** 2, 0, 1)) * 14
    taper = np.clip((board.x - 0.55) / 0.25, 0, 1) * 0.13
    shank = np.maximum(board.box(0.1, 0, 0.72, 0.13), (np.abs(board.y) - 0.13 + taper) * board.half)
    turns = wave((board.x + 0.25 * board.y) / pitch) * (board.x > thread_from)
    cut = np.where(board.x > thread_from, shank - 0.022 * board.half * turns, shank)
    shades = metal * (0.75 + 0.25 * np.where(board.x > thread_from, turns, 0.8))[..., None]
    board.add(cut, shades, rise=1, gloss=0.45, metal=0.7, relief=round_shank + 3 * turns)
    dome = np.sqrt(np.clip(1 - (board.y / 0.32) ** 2, 0, 1)) * 18
    head = board.box(-0.66, 0, rng.uniform(0.09, 0.13), 0.3, rng.uniform(0.01, 0.09))
    board.add(head, metal, rise=3, gloss=0.45, metal=0.7, relief=dome - round_shank * (board.x > -0.62))
    return board.surface


def bolt_head(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Screw head from above with a hexagonal, crossed or slotted drive."""
    board, metal = Board(rng, side, unit), _metal(rng)
    dome = 14 * np.sqrt(np.clip(1 - (board.radius / 0.85) ** 2, 0, 1))
    board.add(
        board.disc(0, 0, 0.62),
        metal * (1 + 0.05 * _turned(board))[..., None],
        rise=5,
        gloss=0.5,
        metal=0.65,
        relief=dome,
    )
    turn = rng.uniform(0, math.pi)
    slots = [board.box(0, 0, 0.34, 0.06, 0.02, turn), board.box(0, 0, 0.34, 0.06, 0.02, turn + math.pi / 2)]
    drives = [board.polygon(6, 0.24, turn), np.minimum(*slots), board.box(0, 0, 0.56, 0.06, 0.0, turn)]
    board.add(drives[int(rng.integers(3))], metal * 0.3, rise=-9, bevel=3, metal=0.5)
    return board.surface


def bearing(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Ball bearing: two rings, a cage and balls."""
    board, metal = Board(rng, side, unit), near(rng, _STEEL, 0.04)
    shine = metal * (1 + 0.05 * _turned(board))[..., None]
    board.add(board.ring(0.25, 0.72), near(rng, (0.2, 0.2, 0.21), 0.03), rise=1, gloss=0.1)
    cage = near(rng, _BRASS, 0.06) if rng.random() < 0.5 else metal * 0.8
    board.add(board.ring(0.43, 0.55), cage, rise=3, gloss=0.3, metal=0.5)
    count = int(rng.integers(7, 13))
    for k in range(count):
        turn = 2 * math.pi * k / count
        ball = board.disc(0.49 * math.cos(turn), 0.49 * math.sin(turn), 0.085)
        board.add(ball, metal, rise=1, gloss=0.7, metal=0.6, relief=9 * board.dome(ball, 0.085))
    for inner, outer in ((0.25, 0.38), (0.6, 0.74)):
        board.add(board.ring(inner, outer), shine, rise=6, bevel=3, gloss=0.4, metal=0.7)
    return board.surface


def bottle_cap(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Crown cap with 21 teeth and a print."""
    board, ink = Board(rng, side, unit), colour(rng, (0.5, 0.9), (0.35, 0.85))
    skirt = 5 * wave(board.angle * 21 / (2 * math.pi)) * smoothstep((board.radius - 0.5) * 6)
    board.add(board.rosette(0.7, 21, 0.03), ink, rise=6, bevel=10, gloss=0.5, metal=0.25, relief=skirt)
    second = colour(rng, (0.1, 0.8), (0.6, 0.95))
    board.add(board.ring(0.4, rng.uniform(0.44, 0.5)), second, rise=0.5, gloss=0.5)
    petals = int(rng.integers(3, 9))
    board.add(board.rosette(0.2, petals, 0.09), second, rise=0.5, gloss=0.5)
    return board.surface


def spring(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Coil spring lying on its side."""
    board, metal = Board(rng, side, unit), _metal(rng)
    coils, wire, reach = int(rng.integers(7, 13)), rng.uniform(0.026, 0.04), rng.uniform(0.2, 0.3)
    pitch = 1.3 / coils
    for back in (True, False):  # the far half of each coil lies below the near half
        for k in range(coils + back):
            x0 = -0.65 + pitch * (k - 0.5 * back)
            lean = math.atan2(pitch * (-0.5 if back else 0.5), 2 * reach)
            rod = board.box(x0 + pitch / 4, 0, wire, reach, wire, lean)
            tone = metal * (0.45 if back else 1.0)
            board.add(rod, tone, rise=0.1 if back else 3, gloss=0.5, metal=0.6, relief=6 * board.dome(rod, wire))
    return board.surface


def coin(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Embossed token: rim, dots and a figure."""
    board, metal = Board(rng, side, unit), _metal(rng)
    board.add(board.disc(0, 0, 0.7), metal, rise=4, gloss=0.4, metal=0.7, grain=0.03)
    board.add(board.ring(0.62, 0.7), metal, rise=3, gloss=0.4, metal=0.7)
    for k in range(count := int(rng.integers(20, 40))):
        turn = 2 * math.pi * k / count
        board.add(board.disc(0.57 * math.cos(turn), 0.57 * math.sin(turn), 0.018), metal, rise=2, bevel=2, metal=0.7)
    for k in range(int(rng.integers(2, 4))):
        figure = board.rosette(0.38 - 0.13 * k, int(rng.integers(3, 9)), rng.uniform(0.03, 0.1), rng.uniform(1, 3))
        board.add(figure, metal * (0.95 + 0.05 * k), rise=3, bevel=5, gloss=0.4, metal=0.7)
    return board.surface


TURNED_PARTS: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (gear, screw, washer, bottle_cap, bearing, nut, coin, bolt_head, spring)
}  # fmt: skip
