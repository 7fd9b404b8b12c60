"""Image, mask and map of a test image side by side, as small pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from adpretrain_hf.overlays import colour_range, overlay
from training.evaluation.figures import jpeg
from training.evaluation.results import Result, Shown
from training.metrics import pixel_auroc

_TILE, _GAP, _QUALITY = 128, 2, 75


@dataclass(frozen=True)
class Strip:
    """One strip.

    Attributes:
        picture: its address.
        width, height: in pixels.
        caption: which image it is.
        rank: ``"best"`` or ``"worst"`` of the cell, which says nothing of how well: see ``found``.
        found: how well its anomaly is found, as a text; empty where the mask is not known.
    """

    picture: str
    width: int
    height: int
    caption: str
    rank: str
    found: str


def strips(result: Result, shown: Shown, each: int) -> Iterator[Strip]:
    """The anomalies of a cell that are found best and worst; all maps have one range of colours.

    Args:
        result: of the cell.
        shown: its images, best first.
        each: how many of the best, and of the worst, at most.
    """
    number = len(shown.indices)
    if not number:
        return
    best, worst = min(each, (number + 1) // 2), min(each, number // 2)
    colours = colour_range(shown.maps.astype(np.float32))
    for place in [*range(best), *range(number - worst, number)]:
        image = Image.fromarray(shown.images[place])
        tiles = [image, Image.fromarray(shown.masks[place]), overlay(image, shown.maps[place], colours)]
        picture = _joined([tile.convert("RGB").resize(_size(image), Image.Resampling.BILINEAR) for tile in tiles])
        index = int(shown.indices[place])
        caption = f"{result.names[index]}, score {result.scores[index]:.4g}"
        rank = "best" if place < best else "worst"
        yield Strip(_written(picture), *picture.size, caption, rank, _found(shown, place))


def _found(shown: Shown, place: int) -> str:
    mask = shown.masks[place][None]
    if mask.all() or not mask.any():
        return ""
    return f"pixel AUROC {100 * pixel_auroc(shown.maps[place][None].astype(np.float32), mask):.1f}"


def _size(image: Image.Image) -> tuple[int, int]:
    scale = _TILE / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _joined(tiles: list[Image.Image]) -> Image.Image:
    width, height = tiles[0].size
    joined = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, height), "white")
    for place, tile in enumerate(tiles):
        joined.paste(tile, (place * (width + _GAP), 0))
    return joined


def _written(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return jpeg(file.getvalue())
