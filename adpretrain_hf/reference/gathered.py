"""Reference images that come batch by batch -> what a bank is made of."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import PreparedImage
from adpretrain_hf.matching import to_rows
from adpretrain_hf.reference.bank import ReferenceImage
from adpretrain_hf.scoring import Area, encode_region

Batches = Iterator[tuple[list[PreparedImage], list[Tensor]]]


class Gathered(NamedTuple):
    """Reference images of one product, encoded.

    Attributes:
        patches: L tensors (K, C); with a grid, those of one window of all images come before those of the next.
        images: what is known of each.
        counts: how many patches each has.
        region: what counts of them, see ``encode_region``.
        grid: rows and columns of their windows, where each is compared with those of its own place alone.
    """

    patches: list[Tensor]
    images: list[ReferenceImage]
    counts: list[int]
    region: str | None
    grid: tuple[int, ...]


def gather(batches: Batches, areas: tuple[Area | None, Area | None], *, by_window: bool) -> Gathered:
    """Takes encoded batches together.

    Args:
        batches: images, or their windows, and L maps (B, C, h, w).
        areas: the region of interest and what is to be ignored of it, or None.
        by_window: whether windows are compared with those of their own place.

    Raises:
        InputError: no images, or areas that do not fit them.
        ImageError: an image has other windows than the first one.
    """
    encoded, known, counts, places = [], list[ReferenceImage](), list[int](), list[int]()
    size: tuple[int, int] | None = None
    region: str | None = None
    grid: tuple[int, ...] = ()
    for batch, features in batches:
        each = features[0][0, 0].numel()
        encoded.append([to_rows(maps).split(each) for maps in features])
        for image in batch:
            if image.place == 0:
                known.append(ReferenceImage.of(image))
                counts.append(0)
                if image.size != size:
                    if size is not None and any(areas):
                        found = f"got {size} and {image.size} (H, W)"
                        raise InputError(f"a region of interest needs images of one size, {found}")
                    size, region = image.size, encode_region(*areas, image.size)
            counts[-1] += each
            if image.windows and by_window:
                grid = grid or image.windows.grid
                image.windows.check_grid(image.name, grid)
            places.append(image.place if grid else 0)
    if not encoded:
        raise InputError("no reference images were given: expected at least one normal image")
    order = sorted(range(len(places)), key=places.__getitem__)
    levels = (list(chain.from_iterable(level)) for level in zip(*encoded, strict=True))
    patches = [torch.cat([rows[number] for number in order]) for rows in levels]
    return Gathered(patches, known, counts, region, grid)
