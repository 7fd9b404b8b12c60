"""The region of interest of a product: the part of its images that counts."""

import base64
import binascii
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import read_mask


class Area(NamedTuple):
    """A part of a product's images, as it was told: before their size is known.

    Attributes:
        told: a mask (H, W), bool, or the corners (K, 2) of a polygon, (x, y) in pixels.
        name: what errors call it.
    """

    told: np.ndarray
    name: str

    @classmethod
    def read(cls, given: Any, what: str) -> "Area | None":
        """Reads a mask (a path, a PIL image or an array, 0 outside) or corners; None stays None.

        Raises:
            InputError: it is neither, as where there are several masks.
            ImageError: a mask that cannot be read.
        """
        if given is None or isinstance(given, cls):
            return given
        is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        is_array = isinstance(given, np.ndarray) and given.dtype != bool
        if is_list or (is_array and given.shape[1:] in ((2,), (1, 2))):  # the latter is OpenCV's
            return cls(_corners(given, what), f"the {what}")
        name = str(given) if isinstance(given, (str, Path)) else "the mask"
        return cls(read_mask(given, name), f"the {what} ({name})")

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """The mask of images of H and W pixels, bool.

        Raises:
            InputError: a mask of another size, or one without a pixel.
        """
        mask = self.told
        if mask.dtype != bool:
            image = Image.new("1", (size[1], size[0]))
            ImageDraw.Draw(image).polygon([(x, y) for x, y in mask.tolist()], fill=1, outline=1)
            mask = np.array(image)
        if mask.shape != size:
            raise InputError(
                f"{self.name} is {mask.shape[1]} x {mask.shape[0]} pixels, the images {size[1]} x {size[0]}: give a "
                "mask of their size"
            )
        if not mask.any():
            raise InputError(f"{self.name} is empty: it has no pixel of the images")
        return mask


def encode_region(region: Any, ignore: Any, size: tuple[int, int]) -> str | None:
    """What counts, as a bank keeps it: a PNG of 1 bit in base 64; None where all does.

    Args:
        region: what ``Area.read`` takes, or None for all of the image.
        ignore: the same of what does not count.
        size: H and W of the images, in pixels.

    Raises:
        InputError: see ``Area``, or nothing is left.
        ImageError: a mask that cannot be read.
    """
    region, ignore = Area.read(region, "region of interest"), Area.read(ignore, "area to ignore")
    if region is None and ignore is None:
        return None
    counts = np.ones(size, dtype=bool) if region is None else region.pixels(size)
    if ignore is not None:
        counts = counts & ~ignore.pixels(size)
    if not counts.any():
        raise InputError("the region of interest is empty: no pixel of the images would count")
    file = io.BytesIO()
    Image.fromarray(counts).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


@lru_cache(maxsize=64)
def region_mask(region: str) -> Tensor:
    """What ``encode_region`` encoded: (H, W), bool.

    Raises:
        InputError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(region, validate=True)), formats=["PNG"]) as image:
            return torch.from_numpy(np.array(image.convert("1")))
    except (OSError, ValueError, SyntaxError, binascii.Error) as error:
        raise InputError(f"the region of interest is damaged: {error}") from error


def region_at(region: str, size: tuple[int, ...]) -> Tensor:
    """The region of the whole image at a size (H, W), bool."""
    mask = region_mask(region)
    if tuple(mask.shape) == size:
        return mask
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0


@lru_cache(maxsize=64)
def network_mask(region: str, box: tuple[int, int, int, int], network_size: tuple[int, int]) -> Tensor:
    """The region as the network sees it, (H', W'), bool: the pixels of which at least half counts.

    Args:
        region: see ``encode_region``.
        box: top, left, height and width of the part of the image that the network sees.
        network_size: H' and W' of its input.

    Raises:
        InputError: nothing of the region is seen.
    """
    top, left, height, width = box
    seen = region_mask(region)[top : top + height, left : left + width].float()
    mask = F.interpolate(seen[None, None], size=network_size, mode="area")[0, 0] >= 0.5
    if not mask.any():
        raise InputError(
            f"the region of interest has no pixel in the part of the image that is looked at, top, left, height and "
            f"width {box} at {network_size[0]} x {network_size[1]} pixels: make it larger, or take a larger image_size"
        )
    return mask


def check_size(region: str, size: tuple[int, int], name: str) -> None:
    """Raises ImageError if an image of H x W pixels has not the region's size."""
    if size != (expected := tuple(region_mask(region).shape)):
        raise ImageError(
            f"{name} is {size[1]} x {size[0]} pixels, the region of interest {expected[1]} x {expected[0]}: a region "
            "is of one size of image; make a bank with a region for this size"
        )


def _corners(given: Any, what: str) -> np.ndarray:
    try:
        corners = np.asarray(given)
    except ValueError:  # not all of one length
        corners = np.empty(0)
    corners = corners[:, 0] if corners.shape[1:] == (1, 2) else corners
    is_polygon = corners.dtype.kind in "iuf" and corners.shape[1:] == (2,) and len(corners) > 2
    if not is_polygon or not np.isfinite(corners).all():
        expected = "one mask, or at least 3 corners (x, y) of a polygon, all finite"
        raise InputError(f"the {what} is {', '.join(map(str, given))[:200]}: expected {expected}")
    return corners.astype(float)
