"""Which mask belongs to which image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from adpretrain_hf.images import find_images
from training.refusal import refuse


def paired_masks(base: Path, normal: str = "good") -> dict[Path, Path]:
    """The mask of each anomalous test image: ``<stem>_mask`` or ``<stem>`` at the same place in ``ground_truth``.

    Args:
        base: with ``test`` and ``ground_truth`` in it.
        normal: the folder in ``test`` whose images have none.

    Raises:
        InputError: an anomalous image without a mask, a mask without an image, or images of one stem, which would share
            a mask.
    """
    images = {path: _stem(path, base / "test") for path in find_images(base / "test")}
    truth = base / "ground_truth"
    masks = {path: _stem(path, truth) for path in (find_images(truth) if truth.is_dir() else ())}
    of_stem = {stem: path for path, stem in masks.items()}
    anomalous = {path: stem for path, stem in images.items() if not stem.startswith(f"{normal}/")}
    number = Counter(anomalous.values())
    alike = sorted(str(path) for path, stem in anomalous.items() if number[stem] > 1)
    refuse(alike, "images differ in their suffix alone and would share a mask", "give each a name of its own")
    found = {path: of_stem.get(f"{stem}_mask") or of_stem.get(stem) for path, stem in anomalous.items()}
    pairs = {path: mask for path, mask in found.items() if mask is not None}
    remedy = f"expected one in {base}/ground_truth for each anomalous image in {base}/test, and no other"
    refuse(sorted(str(path) for path in anomalous.keys() - pairs.keys()), "images have no mask", remedy)
    refuse(sorted(str(path) for path in masks.keys() - set(pairs.values())), "masks have no image", remedy)
    return pairs


def _stem(path: Path, below: Path) -> str:
    return path.relative_to(below).with_suffix("").as_posix()
