"""The demo photographs: enough references, a mask of the size of every defect's tile, and no stretch shown twice."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.conftest import PHOTOS

CLASSES = sorted(path.name for path in PHOTOS.iterdir() if (path / "train").is_dir())
SIDE, PATCH, STEP = 102, 32, 23


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def tiles_of(name: str) -> list[Path]:
    return sorted((PHOTOS / name).glob("t*/*/*.jpg"))


def kind_of(tile: Path) -> str:
    return tile.relative_to(tile.parents[2]).parent.as_posix()


def likeness(tiles: Tensor) -> Tensor:
    """How well the best patch of each tile (n, h, w) is found again in later ones: correlations (n, n), 1 is equal."""
    count, height, width = tiles.shape
    grain = tiles - F.avg_pool2d(F.pad(tiles[:, None], [2] * 4, mode="reflect"), 5, 1)[:, 0]
    patches = grain.unfold(1, PATCH, STEP).unfold(2, PATCH, STEP).reshape(count, -1, PATCH, PATCH)
    patches = patches - patches.mean((-1, -2), keepdim=True)
    patches = patches / patches.flatten(2).norm(dim=-1)[..., None, None]
    mean, square = (F.avg_pool2d(part[:, None], PATCH, 1)[:, 0] for part in (grain, grain**2))
    norms = PATCH * (square - mean**2).sqrt()
    spectra = torch.fft.rfft2(grain)
    best = torch.zeros(count, count)
    for number, own in enumerate(patches[:-1], start=1):
        products = spectra[number:] * torch.fft.rfft2(own, s=(height, width)).conj()[:, None]
        sums = torch.fft.irfft2(products, s=(height, width))[..., : norms.shape[1], : norms.shape[2]]
        best[number - 1, number:] = (sums / norms[number:]).amax((0, 2, 3))
    return best


def test_readme_counts_the_photographs() -> None:
    text = (PHOTOS / "README.md").read_text(encoding="utf-8")
    for name in CLASSES:
        counts = Counter(map(kind_of, tiles_of(name)))
        references, normal = counts.pop("train/good"), counts.pop("test/good")
        defects = ", ".join(f"{kind.removeprefix('test/')} {number}" for kind, number in sorted(counts.items()))
        assert re.search(rf"^\| {name} +\| +{references} \| +{normal} \| {defects} +\|$", text, re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_eight_references(name: str) -> None:
    assert len(list((PHOTOS / name / "train" / "good").glob("*.jpg"))) >= 8


@pytest.mark.parametrize("name", CLASSES)
def test_every_defect_has_a_mask_of_its_tile(name: str) -> None:
    defects = [path for path in tiles_of(name) if path.parent.name != "good"]
    masks = {path: PHOTOS / name / "ground_truth" / path.parent.name / f"{path.stem}_mask.png" for path in defects}
    assert set(masks.values()) == set((PHOTOS / name / "ground_truth").rglob("*.png"))
    for tile, path in masks.items():
        mask = pixels(path)
        assert mask.shape == pixels(tile).shape
        assert set(np.unique(mask)) == {0, 255}
        assert 0.01 <= (mask > 0).mean() <= 0.06


@pytest.mark.parametrize("name", CLASSES)
def test_tiles_are_square_but_for_one(name: str) -> None:
    for tile in tiles_of(name):
        taller = tile.relative_to(PHOTOS).as_posix() == "gravel/test/wire/002.jpg"
        assert pixels(tile).shape == (140 if taller else SIDE, SIDE)


# Joints of brick resemble each other, so only its pixels can be told to be the same; of grass and gravel also copies
# that were turned or softened a little.
@pytest.mark.parametrize(("name", "most"), [("brick", 0.96), ("grass", 0.6), ("gravel", 0.6)])
def test_no_tile_repeats_another(name: str, most: float) -> None:
    paths = tiles_of(name)
    tiles = [np.pad(tile, ((0, 140 - len(tile)), (0, 0)), "reflect") for tile in map(pixels, paths)]
    best = likeness(torch.from_numpy(np.stack(tiles)).float())
    first, second = divmod(int(best.argmax()), len(paths))
    assert best.max() < most, f"{paths[first]} shows a part of {paths[second]}"
