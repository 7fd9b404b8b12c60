"""Procedural parts that are moulded or assembled, seen from above: circuit board, connector, plug, button, ..."""

from __future__ import annotations

import math

import numpy as np

from training.synthetic.drawing import Board
from training.synthetic.materials import Recipe, wave
from training.synthetic.surface import Surface, colour, mix, near

_TIN = np.array([0.74, 0.75, 0.75], np.float32)
_PRINT = np.array([0.6, 0.6, 0.6], np.float32)
_GOLD = np.array([0.84, 0.68, 0.32], np.float32)
_BLACK = (0.12, 0.12, 0.13)


def circuit_board(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Printed circuit board with traces, vias, chips and small components."""
    board = Board(rng, side, unit)
    resist = near(rng, ((0.05, 0.3, 0.16), (0.06, 0.16, 0.36), (0.1, 0.1, 0.11))[int(rng.integers(3))], 0.03)
    board.add(board.box(0, 0, 0.78, 0.74, 0.04), resist, rise=3, gloss=0.3)
    for _ in range(26):
        x, y = rng.uniform(-0.7, 0.7), rng.uniform(-0.66, 0.66)
        turn = float(rng.choice([0, math.pi / 2, math.pi / 4]))
        reach = min(rng.uniform(0.08, 0.4), 0.74 - abs(x), 0.7 - abs(y))
        board.add(board.box(x, y, reach, 0.009, 0.0, turn), resist * 1.7 + 0.02, rise=0.3, gloss=0.3)
        board.add(board.disc(x, y, 0.018), _GOLD, rise=0.3, gloss=0.4, metal=0.5)
    for x, y in ((-0.7, -0.66), (0.7, -0.66), (-0.7, 0.66), (0.7, 0.66)):
        board.add(board.disc(x, y, 0.06), _TIN, rise=0.4, gloss=0.4, metal=0.5)
        board.cut(board.disc(x, y, 0.035))
    for _ in range(12):
        _small_component(board, rng.uniform(-0.6, 0.6), rng.uniform(-0.58, 0.58))
    _chip(board, rng.uniform(-0.35, -0.1), rng.uniform(-0.25, 0.25), rng.uniform(0.18, 0.26), int(rng.integers(6, 10)))
    _chip(board, rng.uniform(0.35, 0.45), rng.uniform(-0.35, 0.35), rng.uniform(0.1, 0.15), int(rng.integers(3, 6)))
    return board.surface


def _small_component(board: Board, x: float, y: float) -> None:
    wide = board.rng.random() < 0.5
    width, height = (0.055, 0.028) if wide else (0.028, 0.055)
    board.add(board.box(x, y, width, height, 0.01), _TIN, rise=2, gloss=0.4, metal=0.5)
    body = near(board.rng, ((0.13, 0.13, 0.13), (0.5, 0.38, 0.26))[int(board.rng.integers(2))], 0.04)
    board.add(board.box(x, y, width * (0.6 if wide else 1), height * (1 if wide else 0.6)), body, rise=1.5)


def _chip(board: Board, x: float, y: float, half: float, pins: int) -> None:
    for k in range(pins):
        at = (k + 0.5) / pins * 2 - 1
        leads = board.box(x, y + at * half, half * 1.28, half * 0.4 / pins)
        board.add(leads, _TIN, rise=1, bevel=1, gloss=0.5, metal=0.6)
    board.add(board.box(x, y, half, half * 1.08, 0.01), near(board.rng, _BLACK, 0.02), rise=5, bevel=2, gloss=0.12)
    board.add(board.disc(x - half * 0.7, y - half * 0.78, half * 0.1), near(board.rng, (0.3, 0.3, 0.3)), rise=-1)
    for line in range(2):
        row = y + half * (0.1 + 0.3 * line)
        for k in range(6):
            at = x + half * (k * 0.22 - 0.55)
            board.add(board.box(at, row, half * 0.07, half * 0.08), _PRINT, rise=0, bevel=0)


def chip(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """One packaged circuit with leads on two sides."""
    board = Board(rng, side, unit)
    _chip(board, 0.0, 0.0, rng.uniform(0.42, 0.52), int(rng.integers(6, 11)))
    return board.surface


def connector(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Plastic housing with two rows of contacts."""
    board = Board(rng, side, unit)
    shell = near(rng, (0.86, 0.84, 0.78), 0.04) if rng.random() < 0.5 else colour(rng, (0.1, 0.8), (0.15, 0.6))
    board.add(board.box(0, 0, 0.78, 0.36, 0.05), shell, rise=7, bevel=4, gloss=0.25)
    board.add(board.box(0, 0, 0.68, 0.25, 0.03), shell * 0.45, rise=-6, bevel=3)
    board.add(board.box(0, -0.4, 0.18, 0.06, 0.02), shell, rise=5, gloss=0.25)
    contact = _GOLD if rng.random() < 0.6 else _TIN
    for k in range(count := int(rng.integers(5, 10))):
        x = (k + 0.5) / count * 1.24 - 0.62
        for y in (-0.11, 0.11):
            board.add(board.box(x, y, 0.03, 0.045, 0.01), contact, rise=6, bevel=2, gloss=0.5, metal=0.6)
    return board.surface


def plug(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Mains plug: body with grip ribs, two pins, a cable."""
    board = Board(rng, side, unit)
    body = near(rng, (0.85, 0.85, 0.83), 0.04) if rng.random() < 0.5 else near(rng, _BLACK, 0.03) + np.float32(0.06)
    barrel = 8 * np.sqrt(np.clip(1 - (board.y / 0.4) ** 2, 0, 1))
    cable = 5 * np.sqrt(np.clip(1 - (board.y / 0.09) ** 2, 0, 1))
    board.add(board.box(-0.62, 0, 0.3, 0.08, 0.02), body * 0.9, rise=1, gloss=0.2, relief=cable)
    for y in (-0.17, 0.17):
        rod = 5 * np.sqrt(np.clip(1 - ((board.y - y) / 0.05) ** 2, 0, 1))
        board.add(board.box(0.5, y, 0.28, 0.05, 0.03), _TIN, rise=1, gloss=0.5, metal=0.6, relief=rod)
    ribs = 2.5 * wave(board.x * rng.uniform(9, 14)) * (np.abs(board.x + 0.15) < 0.22)
    board.add(board.box(-0.05, 0, 0.38, 0.36, 0.12), body, rise=4, bevel=6, gloss=0.25, relief=barrel + ribs)
    return board.surface


def capsule(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Gelatine capsule of two colours."""
    board = Board(rng, side, unit)
    halves = colour(rng, (0.3, 0.9), (0.4, 0.9)), colour(rng, (0.05, 0.6), (0.6, 0.95))
    joint = (board.x > rng.uniform(-0.1, 0.15)).astype(np.float32)
    outline = board.box(0, 0, 0.7, 0.26, 0.26)
    barrel = 24 * board.dome(outline, 0.26) * (1 + 0.04 * joint)
    board.add(outline, mix(halves[0], halves[1], joint), rise=1, gloss=0.8, relief=barrel, grain=0.01)
    return board.surface


def tablet(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Pressed pill with a score line and an embossed mark."""
    board, chalk = Board(rng, side, unit), colour(rng, (0.02, 0.35), (0.7, 0.95))
    outline = board.disc(0, 0, 0.6) if rng.random() < 0.6 else board.box(0, 0, 0.68, 0.4, 0.36)
    board.add(outline, chalk, rise=10, bevel=16, gloss=0.1, grain=0.04)
    board.add(np.maximum(board.box(0, 0, 0.8, 0.03), outline), chalk * 0.85, rise=-3, bevel=3, gloss=0.05)
    corners = int(rng.integers(3, 7))
    mark = np.maximum(board.polygon(corners, 0.24), -board.polygon(corners, 0.18))
    board.add(mark, chalk * 0.9, rise=-2, bevel=2, gloss=0.05)
    return board.surface


def button(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Sewing button with a rim and two or four holes."""
    board, tone = Board(rng, side, unit), colour(rng, (0.1, 0.8), (0.2, 0.9))
    swirl = wave(board.x * 2 + 0.4 * np.sin(board.y * 5 + rng.uniform(0, 6)))
    board.add(board.disc(0, 0, 0.66), mix(tone, tone * 0.8, swirl), rise=6, bevel=9, gloss=0.6)
    board.add(board.disc(0, 0, 0.46), mix(tone, tone * 0.8, swirl), rise=-4, bevel=8, gloss=0.6)
    holes = int(rng.choice([2, 4]))
    for k in range(holes):
        turn = 2 * math.pi * (k + 0.5) / holes
        board.cut(board.disc(0.17 * math.cos(turn), 0.17 * math.sin(turn), 0.075))
    return board.surface


def switch(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Rocker switch in a frame, with a printed mark."""
    board, frame = Board(rng, side, unit), near(rng, _BLACK, 0.02) + np.float32(0.03)
    board.add(board.box(0, 0, 0.66, 0.46, 0.06), frame, rise=6, bevel=4, gloss=0.25)
    board.add(board.box(0, 0, 0.54, 0.34, 0.03), frame * 0.5, rise=-4, bevel=2)
    rocker = colour(rng, (0.1, 0.9), (0.35, 0.8))
    board.add(board.box(0, 0, 0.52, 0.32, 0.03), rocker, rise=5, bevel=3, gloss=0.45, relief=14 * np.abs(board.x))
    white = np.array([0.92, 0.92, 0.9], np.float32)
    ring = np.maximum(board.disc(0.28, 0, 0.1), -board.disc(0.28, 0, 0.065))
    board.add(ring, white, rise=0, bevel=0, gloss=0.3)
    board.add(board.box(-0.28, 0, 0.02, 0.1), white, rise=0, bevel=0, gloss=0.3)
    return board.surface


def battery(rng: np.random.Generator, side: int, unit: float) -> Surface:
    """Round cell lying on its side: sleeve with a printed band, terminal."""
    board = Board(rng, side, unit)
    sleeve, band = colour(rng, (0.2, 0.9), (0.15, 0.7)), colour(rng, (0.3, 0.9), (0.6, 0.95))
    barrel = 26 * np.sqrt(np.clip(1 - (board.y / 0.3) ** 2, 0, 1))
    board.add(board.box(0.72, 0, 0.06, 0.1, 0.02), _TIN, rise=2, gloss=0.5, metal=0.6)
    place = rng.uniform(-0.4, 0.3)
    printed = ((board.x > place) & (board.x < place + 0.25)).astype(np.float32)
    board.add(
        board.box(0, 0, 0.68, 0.29, 0.03), mix(sleeve, band, printed), rise=1, gloss=0.7, metal=0.2, relief=barrel
    )
    for k in range(5):
        x = -0.5 + 0.09 * k
        board.add(board.box(x, 0.02, 0.025, 0.06), band, rise=0, bevel=0, gloss=0.6)
    return board.surface


DEVICES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (circuit_board, capsule, connector, button, plug, tablet, switch, chip, battery)
}  # fmt: skip
