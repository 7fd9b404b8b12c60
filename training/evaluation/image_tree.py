"""The images below a folder, and which mask belongs to which image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from training.refusal import refuse

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
EXTENSIONS = tuple(sorted(_SUFFIXES | {suffix.upper() for suffix in _SUFFIXES}))


def images_below(*folders: Path) -> Iterator[Path]:
    """Images below folders, links followed; hidden ones, such as a Mac leaves, are passed over."""
    for folder in folders:
        for at, inner, names in os.walk(folder, followlinks=True):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in names:
                if Path(name).suffix.lower() in _SUFFIXES and not name.startswith("."):
                    yield Path(at, name)


def paired_masks(base: Path, normal: str = "good") -> dict[Path, Path]:
    """The mask of each anomalous test image: ``<stem>_mask`` or ``<stem>`` at the same place in ``ground_truth``.

    Args:
        base: with ``test`` and ``ground_truth`` in it.
        normal: the folder in ``test`` whose images have none.

    Raises:
        InputError: an anomalous image without a mask, or a mask without an image.
    """
    images = {path: _stem(path, base / "test") for path in images_below(base / "test")}
    masks = {path: _stem(path, base / "ground_truth") for path in images_below(base / "ground_truth")}
    of_stem = {stem: path for path, stem in masks.items()}
    anomalous = {path: stem for path, stem in images.items() if not stem.startswith(f"{normal}/")}
    found = {path: of_stem.get(f"{stem}_mask") or of_stem.get(stem) for path, stem in anomalous.items()}
    pairs = {path: mask for path, mask in found.items() if mask is not None}
    remedy = f"expected one in {base}/ground_truth for each anomalous image in {base}/test, and no other"
    refuse(sorted(anomalous[path] for path in anomalous.keys() - pairs.keys()), "images have no mask", remedy)
    refuse(sorted(masks[path] for path in masks.keys() - pairs.values()), "masks have no image", remedy)
    return pairs


def _stem(path: Path, below: Path) -> str:
    return path.relative_to(below).with_suffix("").as_posix()
