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

_TILE, _GAP, _QUALITY = 128, 2, 75


@dataclass(frozen=True)
class Strip:
    """One strip.

    Attributes:
        picture: its address.
        width, height: in pixels.
        caption: which image it is.
        rank: ``"best"`` or ``"worst"``.
    """

    picture: str
    width: int
    height: int
    caption: str
    rank: str


def strips(result: Result, shown: Shown, each: int) -> Iterator[Strip]:
    """The best and the worst found anomalies of a cell; all maps have one range of colours.

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
        yield Strip(_written(picture), *picture.size, caption, "best" if place < best else "worst")


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
