"""A miniature data set in MVTecAD's layout: coloured noise, with a bright square where it is anomalous."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 40  # pixels
CATEGORIES = ("bolt", "nut")


def make_tree(root: Path, *, train: int = 6, good: int = 3, broken: int = 4) -> Path:
    """Makes the tree, of categories "bolt" and "nut", and returns its root.

    Args:
        root: where.
        train: normal training images of each category.
        good, broken: test images of each category.
    """
    random = np.random.default_rng(0)
    for number, category in enumerate(CATEGORIES):
        colour = np.array([60 + 60 * number, 120, 90])
        for place in range(train):
            _save(root / category / "train/good" / f"{place:03}.png", _normal(random, colour))
        for place in range(good):
            _save(root / category / "test/good" / f"{place:03}.png", _normal(random, colour))
        for place in range(broken):
            pixels, mask = _normal(random, colour), np.zeros((SIDE, SIDE), dtype=np.uint8)
            top, left = random.integers(4, SIDE - 20, 2)
            mask[top : top + 14, left : left + 14] = 255
            pixels[mask > 0] = random.integers(150, 256, 3)
            _save(root / category / "test/dent" / f"{place:03}.png", pixels)
            _save(root / category / "ground_truth/dent" / f"{place:03}_mask.png", mask)
    return root


def _normal(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return (colour + random.integers(0, 40, (SIDE, SIDE, 3))).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
