"""Reading images of any kind as upright RGB.

What images may be, and what is done with them:

- EXIF orientation is applied.
- Grey, palette, CMYK and YCbCr images become RGB as Pillow converts them; an alpha channel is dropped, the colours
  below it stay as they are stored.
- 16-bit grey (and 32-bit integer) images are scaled from the full range 0..65535 to 8 bits. A camera that uses 12 of
  the 16 bits gives dark images: scale such images before.
- Float images are refused: their range is not known.
- Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), tensors the same with the channels first; uint8 or uint16.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError, MissingPathError

ImageSource = Union[str, Path, Image.Image, np.ndarray, Tensor]
# Pillow goes by content, and some of its many readers start other programs: only these are ever tried.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"))
_UNREADABLE = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # what Pillow's readers raise on damaged files


def read_image(source: ImageSource, name: str) -> Image.Image:
    """Reads a path, PIL image, array or tensor as an upright RGB image.

    Raises:
        MissingPathError: no such file.
        ImageError: unreadable, or of a kind that is not supported.
    """
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, name), name)
    elif isinstance(source, Tensor):
        return _to_rgb(_from_array(_channels_last(source, name), name), name)
    elif isinstance(source, (str, Path)):
        if not os.path.exists(source):  # unlike Path.exists, it answers for texts that no path can be
            raise MissingPathError(f"no such image: {source}")
        if os.path.isdir(source):
            raise ImageError(f"{source} is a folder, expected an image")
        image = _open(Path(source), str(source))
    else:
        raise ImageError(f"{name} is a {type(source).__name__}, expected a path, PIL image, array or uint8 tensor")
    try:
        upright = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    return _to_rgb(upright, name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Reads the bytes of an image file as an upright RGB image.

    Raises:
        ImageError: unreadable, or of a kind that is not supported.
    """
    return read_image(_open(_Bytes(data), name), name)


def list_images(folder: str | Path) -> list[Path]:
    """All images below a folder in order of their paths; hidden files and folders are passed over.

    Raises:
        MissingPathError: no such folder.
        InputError: no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingPathError(f"no such folder: {folder}")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise InputError(f"no images in {folder}: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return paths


def named_sources(images: Any) -> tuple[Iterable[tuple[ImageSource, str]], int | None]:
    """Splits what a caller gives as images into single ones, each with the name that errors use for it.

    Returns them and their number, or None where it is not known before the end.

    Args:
        images: a path, a folder, a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a uint8 tensor (C, H, W) or
            (B, C, H, W), or any iterable of single images, which is read only as far as it is asked.

    Raises:
        InputError: there is none.
    """
    if isinstance(images, (str, Path)):
        images = list_images(images) if os.path.isdir(images) else [Path(images)]
    elif isinstance(images, Image.Image) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim != 4):
        return [(images, name_of(images))], 1
    if not isinstance(images, Iterable):
        raise InputError(f"got {type(images).__name__} as images, expected paths, a folder, PIL images or arrays")
    total = len(images) if isinstance(images, Sized) else None
    if total == 0:
        raise InputError("no images were given: expected at least one")
    return ((image, name_of(image, number)) for number, image in enumerate(images)), total


def name_of(image: Any, number: int | None = None) -> str:
    """How errors call an image: its path, or its place in the list."""
    if isinstance(image, (str, Path)):
        return str(image)
    return "the image" if number is None else f"image {number}"


class _Bytes(io.BytesIO):
    def __repr__(self) -> str:
        """What Pillow's messages call it: without an address, the same bytes give the same message."""
        return f"of {len(self.getbuffer())} bytes"


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_FORMATS)
        image.load()
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} is refused, for it would need too much memory: {error} If it can be trusted, set "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except _UNREADABLE as error:
        raise ImageError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    try:
        if image.mode.startswith("I"):
            return _sixteen_bit(np.asarray(image), name).convert("RGB")
        if image.mode == "F":
            raise ImageError(f"{name} holds floats, whose range is not known: convert it to 8 or 16 bits")
        # By way of RGBA, or a palette with a transparent colour warns.
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise ImageError(f"{name} of mode {image.mode!r} cannot be converted to RGB: {error}") from error


def _sixteen_bit(values: np.ndarray, name: str) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}, expected 16 bits, 0 to 65535")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"{name} is an array of shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if 0 in array.shape:
        raise ImageError(f"{name} is an array of shape {array.shape}, without a pixel")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} is an array of {array.dtype}, expected uint8 or uint16; images that are already prepared are a "
            "float torch tensor (B, 3, H, W)"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_last(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.dtype not in (torch.uint8, torch.uint16):
        raise ImageError(
            f"{name} is a tensor of {tensor.dtype}, expected uint8 (C, H, W); images that are already prepared are one "
            "float tensor (B, 3, H, W)"
        )
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        raise ImageError(f"{name} is a tensor of shape {tuple(tensor.shape)}, expected (1 or 3 or 4, H, W)")
    array = tensor.cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array
