"""Images -> normalised tensors, resized as PIL does it.

The released features were made with PIL's bicubic resizing of 8-bit pixels; resizing floats or on a GPU shifts them
measurably. Which images can be read, and how, is in ``decode.py``.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adpretrain_hf.config import ADPretrainConfig, nearest_multiples
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images.ahead import THREADS, prepare_ahead
from adpretrain_hf.images.decode import ImageSource, Picture, read_image, read_picture
from adpretrain_hf.images.sources import name_of, named_sources
from adpretrain_hf.images.tiles import Tiles, Windows
from adpretrain_hf.images.transfer import to_device

MAX_ASPECT_RATIO = 20
# From this reduction on of a JPEG that was reduced before, Hamming's window, of half as many pixels, moves the tokens
# less than bicubic resizing does where there is nothing left to reduce.
_HALF_THE_TAPS = 1.5
_AHEAD = 16 * THREADS  # images that go into one batch anyway: no thread waits for one that is large


@dataclass(frozen=True)
class PreparedImage:
    """An image as the network takes it, and where it comes from.

    Attributes:
        pixels: (3, H', W'), uint8, which take a quarter of the room on their way to a GPU; or as ``tensor``, where they
            were prepared by the caller.
        name: the path, or the place in the list.
        size: H and W of the image.
        box: top, left, height and width of the part of the image that ``pixels`` show, in the image's pixels.
        mean, std: that the pixels are normalised by.
        category: of the product that it shows, if it was told.
        windows: where the windows of an image lie that is cut into tiles; this is one of them.
        place: which, from 0, row by row.
        identity: ``digest`` of the image that this is a window of.
    """

    pixels: Tensor
    name: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    category: str = ""
    windows: Windows | None = None
    place: int = 0
    identity: str = ""

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes of this image."""
        return self.windows is None or self.place == len(self.windows) - 1

    def whole(self) -> "PreparedImage":
        """The image that this is a window of, without pixels: (3, 0, 0)."""
        return replace(self, pixels=self.pixels[:, :0, :0], box=(0, 0, *self.size))

    @property
    def tensor(self) -> Tensor:
        """(3, H', W'), normalised."""
        return self.normalized(self.pixels)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, H, W), of this image or of others that were prepared with it, as the network takes them."""
        return pixels if pixels.is_floating_point() else normalize(pixels, self.mean, self.std)

    @property
    def network_size(self) -> tuple[int, int]:
        """H' and W' of ``pixels``."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def digest(self) -> str:
        """16 hex digits of every eighth pixel, equal for the same picture; empty on a GPU, which is not waited for."""
        return digests([self])[0]

    @property
    def unseen(self) -> float:
        """The share of the image's pixels that ``pixels`` do not show; windows together show all of it."""
        return 0 if self.windows else 1 - self.box[2] * self.box[3] / (self.size[0] * self.size[1])


class Preprocessor:
    """Prepares images for one extractor.

    Args:
        config: gives the size, ``resize_mode``, mean and std. ``"resize"``: the shorter side becomes ``image_size``,
            the longer one follows to the nearest multiple of the patch size; nothing is cut off. ``"crop"``: the
            shorter side is resized to ``image_size``, then the centre square is cut out, as published. With
            ``decode="fast"`` JPEG files are resized from the least size of theirs that libjpeg makes and that has them.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        self.config = config

    def __call__(self, images: Any) -> Tensor:
        """Prepares one image, several, or a folder as one batch (B, 3, H', W').

        Raises:
            InputError: nothing to prepare, or (with ``resize_mode="resize"``) images of different shapes.
            ImageError: an image is missing, unreadable or of a kind that is not supported.
        """
        prepared = list(prepare_ahead(self.prepare, named_sources(images)[0], _AHEAD))
        if not prepared:
            raise InputError("no images were given: expected at least one")
        shapes = sorted({tuple(image.pixels.shape) for image in prepared})
        if len(shapes) > 1:
            advice = "prepare them one by one, use extract() or score(), or resize_mode='crop'"
            raise InputError(f"images of different shapes {shapes} do not make one batch: {advice}")
        return stack(prepared)

    def prepare(self, source: ImageSource, name: str | None = None, category: str = "") -> PreparedImage:
        """Reads and prepares one image.

        Raises:
            ImageError: it is missing, unreadable, too small, too long, or of a kind that is not supported.
        """
        name = name or name_of(source)
        picture = read_picture(source, name, self.config.image_size if self.config.decode == "fast" else None)
        width, height = picture.size
        self._check_size(width, height, name, "use a larger image", "look at it in tiles")
        image, box = self._fit(picture)
        return PreparedImage(to_pixels(image), name, (height, width), box, self.config.mean, self.config.std, category)

    def prepare_windows(
        self, source: ImageSource, name: str, category: str, *, tiles: Tiles, grid: tuple[int, ...]
    ) -> list[PreparedImage]:
        """Reads an image, cuts it into windows, and prepares each whole, whatever ``resize_mode`` is.

        Windows of ``image_size`` are not resampled.

        Args:
            source, name, category: see ``prepare``.
            tiles: where the windows lie.
            grid: rows and columns of windows that it must have, if any.

        Raises:
            ImageError: see ``prepare``, of each window; or another grid.
        """
        image = read_image(source, name)  # at full resolution, whatever decode is
        width, height = image.size
        windows = tiles.windows(height, width)
        where_long = "take more tiles along its longer side, or square ones (tile_size)"
        sides = windows.width, windows.height
        self._check_size(*sides, f"a window of {name}", "take fewer or larger tiles", where_long)
        if grid:
            windows.check_grid(name, grid)
        size, (mean, std) = (height, width), (self.config.mean, self.config.std)
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        identity = PreparedImage(whole, name, size, (0, 0, *size), mean, std).digest
        prepared = []
        for place, box in enumerate(windows.boxes):
            top, left, rows, columns = box
            part = Picture.whole(image.crop((left, top, left + columns, top + rows)))
            pixels = to_pixels(self._resize(part))
            prepared.append(PreparedImage(pixels, name, size, box, mean, std, category, windows, place, identity))
        return prepared

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """H' and W' that an image of a height and width is prepared to."""
        side = self.config.image_size
        return (side, side) if self.config.resize_mode == "crop" else self._whole_size(height, width)

    def seen(self, image: Image.Image) -> Image.Image:
        """What the network sees of an RGB image, before it is normalised: H' x W' pixels."""
        return self._fit(Picture.whole(image))[0]

    def seen_mask(self, mask: Image.Image) -> Image.Image:
        """The same part of a mask of the image, its values kept: each pixel is the nearest one of the mask."""
        return self._fit(Picture.whole(mask), Image.Resampling.NEAREST)[0]

    def _check_size(self, width: int, height: int, name: str, where_small: str, where_long: str) -> None:
        found, patch = f"{name} is {width} x {height} pixels", self.config.patch_size
        if min(width, height) < patch:
            raise ImageError(f"{found}, smaller than one patch of {patch}: {where_small}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ImageError(f"{found}, longer than {MAX_ASPECT_RATIO} : 1: {where_long}")

    def _fit(
        self, picture: Picture, resampling: Image.Resampling = Image.Resampling.BICUBIC
    ) -> tuple[Image.Image, tuple[int, int, int, int]]:
        side, (width, height) = self.config.image_size, picture.size
        if self.config.resize_mode == "resize":
            return self._resize(picture, resampling), (0, 0, height, width)
        short = min(width, height)
        # int() and round() as torchvision's Resize and CenterCrop have them.
        new_width, new_height = int(side * width / short), int(side * height / short)
        left, top = round((new_width - side) / 2), round((new_height - side) / 2)
        part = (left, top, left + side, top + side)
        first_row, rows = _seen(top, side, new_height, height)
        first_column, columns = _seen(left, side, new_width, width)
        seen = (first_row, first_column, rows, columns)
        return _resized(picture, (new_width, new_height), part, resampling), seen

    def _resize(self, picture: Picture, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        width, height = picture.size
        new_height, new_width = self._whole_size(height, width)
        return _resized(picture, (new_width, new_height), (0, 0, new_width, new_height), resampling)

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patch_size
        scale = self.config.image_size / min(height, width) / patch
        return round(height * scale) * patch, round(width * scale) * patch


def _resized(
    picture: Picture, size: tuple[int, int], part: tuple[int, int, int, int], resampling: Image.Resampling
) -> Image.Image:
    """A part of a picture that is resized to ``size``, W and H: left, top, right and bottom of it there."""
    if picture.image.size == picture.size:  # as published: the part alone would be rounded otherwise here and there
        return picture.image.resize(size, resampling).crop(part)
    left, top, right, bottom = picture.box
    across, down = (right - left) / size[0], (bottom - top) / size[1]
    if resampling is Image.Resampling.BICUBIC and min(across, down) >= _HALF_THE_TAPS:
        resampling = Image.Resampling.HAMMING
    box = (left + across * part[0], top + down * part[1], left + across * part[2], top + down * part[3])
    return picture.image.resize((part[2] - part[0], part[3] - part[1]), resampling, box)


def _seen(start: int, extent: int, resized: int, original: int) -> tuple[int, int]:
    """Start and extent along one axis of a crop of the resized image, in pixels of the original."""
    scale = original / resized
    first, last = round(start * scale), round((start + extent) * scale)
    return first, min(last, original) - first


def stack(batch: Sequence[PreparedImage], device: torch.device | None = None) -> Tensor:
    """Images of one shape as one normalised batch (B, 3, H', W'), on the CPU by default."""
    pixels = torch.stack([image.pixels for image in batch])
    if device is not None:
        pixels = to_device(pixels, device, pixels.dtype)
    return batch[0].normalized(pixels)


def digests(batch: Sequence[PreparedImage]) -> list[str]:
    """The digest of each image of one shape, in few calls: each may have to wait for the threads that decode."""
    new = [image for image in batch if not image.identity]  # windows know what they are of
    if not new or new[0].pixels.device.type != "cpu":
        return [image.identity for image in batch]
    pixels = new[0].normalized(torch.stack([image.pixels[:, ::8, ::8] for image in new])).float().numpy()
    found = (hashlib.blake2b(one.tobytes(), digest_size=8).hexdigest() for one in pixels)
    return [image.identity or next(found) for image in batch]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as a tensor (3, H, W), uint8.

    Copied by numpy: PyTorch would start threads of its own for each thread that decodes.
    """
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales pixels (..., 3, H, W) from 0..255 to [0, 1] and normalises them, on their device, in float32."""
    shift, scale = (torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True) for values in (mean, std))
    return images.to(torch.float32, copy=True).div_(255).sub_(shift).div_(scale)  # in place: new memory takes as long


def is_prepared(images: Any) -> bool:
    """Whether it is a float tensor, which is taken as already prepared."""
    return isinstance(images, Tensor) and images.is_floating_point()


def check_prepared(images: Tensor, config: ADPretrainConfig) -> Tensor:
    """Returns a batch of prepared images if the network can take it.

    Values are looked at only while they are on the CPU: from a GPU the answer would have to be waited for. ``score``
    notices there what is not finite in its results.

    Args:
        images: (B, 3, H, W), floats.
        config: gives the patch size, mean and std.

    Raises:
        InputError: wrong axes, channels or size, or (for tensors on the CPU) values that are NaN, infinite, or those of
            pixels that were not normalised.
    """
    shape, patch_size = tuple(images.shape), config.patch_size
    if images.ndim != 4 or shape[1] != 3:
        raise InputError(f"got a float tensor of shape {shape}, expected (B, 3, H, W): prepared images, RGB")
    if shape[0] == 0:
        raise InputError("got a batch of 0 images, expected at least one")
    if min(shape[2:]) < patch_size or shape[2] % patch_size or shape[3] % patch_size:
        near = " x ".join(f"({nearest_multiples(side, patch_size)})" for side in shape[2:])
        expected = f"a height and width that are multiples of the patch size {patch_size}, {near}"
        advice = "resize them, or give them unprepared"
        raise InputError(f"got images of {shape[2]} x {shape[3]} pixels, expected {expected}: {advice}")
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (float(value) for value in images.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"the prepared images of shape {shape} hold NaN or infinite values")
        # Prepared images have values on both sides of 0, the mean; one colour alone is no picture, but a dummy.
        if 0 <= low < high and min(config.mean) > 0 and not _is_of_pixels(images, config):
            advice = "normalise them by the extractor's mean and std, or give uint8 pixels, PIL images or paths"
            raise InputError(f"the float images hold {low:.3g} to {high:.3g}, pixels that are not normalised: {advice}")
    return images


def _is_of_pixels(images: Tensor, config: ADPretrainConfig) -> bool:
    """Whether it is what ``normalize`` makes of 8-bit pixels, which may also all be brighter than the mean."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    pixels = (images.float() * scale + shift) * 255
    rounding = 255 * torch.finfo(images.dtype).eps
    return bool(pixels.max() < 256 + rounding and (pixels - pixels.round()).abs().max() < 0.01 + rounding)
