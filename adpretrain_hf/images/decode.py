"""Reading images of any kind as upright RGB.

What images may be, and what is done with them:

- EXIF orientation is applied.
- Grey, palette, CMYK and YCbCr images become RGB as Pillow converts them; an alpha channel is dropped, the colours
  below it stay as they are stored.
- 16-bit grey (and 32-bit integer) images are scaled from the full range 0..65535 to 8 bits. A camera that uses 12 of
  the 16 bits gives dark images: scale such images before.
- Float images are refused: their range is not known.
- Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), tensors the same with the channels first; uint8 or uint16.
- Bytes are those of an image file.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from adpretrain_hf.errors import ImageError, MissingPathError

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray, Tensor, Callable[[], Any]]
# Pillow goes by content, and some of its many readers start other programs: only these are ever tried.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM")
# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError)
_UNREADABLE = (*_DAMAGED, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(source: ImageSource, name: str) -> Image.Image:
    """Reads a path, the bytes of an image file, a PIL image, array or tensor as an upright RGB image.

    A function is called, and what it returns is read.

    Raises:
        MissingPathError: no such file.
        ImageError: unreadable, or of a kind that is not supported.
    """
    if callable(source):
        source = source()
    if isinstance(source, (np.ndarray, Tensor)):
        array = _channels_last(source, name) if isinstance(source, Tensor) else source
        return _to_rgb(_from_array(array, name), name)
    if isinstance(source, bytes):
        return decode_image(source, name)
    if isinstance(source, Image.Image):
        return _upright(source, name)
    if not isinstance(source, (str, Path)):
        expected = "a path, PIL image, array, uint8 tensor or a file's bytes"
        raise ImageError(f"{name} is a {type(source).__name__}, expected {expected}")
    if not os.path.exists(source):  # unlike Path.exists, it answers for texts that no path can be
        raise MissingPathError(f"no such image: {source}")
    if os.path.isdir(source):
        raise ImageError(f"{source} is a folder, expected an image")
    return _upright(_open(Path(source), str(source)), name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Reads the bytes of an image file as an upright RGB image.

    Raises:
        ImageError: unreadable, or of a kind that is not supported.
    """
    return _upright(_open(_Bytes(data), name), name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    return _to_rgb(upright, name)


class _Bytes(io.BytesIO):
    def __repr__(self) -> str:
        """What Pillow's messages call it: without an address, the same bytes give the same message."""
        return f"of {len(self.getbuffer())} bytes"


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_FORMATS)
        image.load()
    except Image.DecompressionBombError as error:
        advice = "If it can be trusted, set PIL.Image.MAX_IMAGE_PIXELS"
        raise ImageError(f"{name} is refused, for it would need too much memory: {error} {advice}") from error
    except _UNREADABLE as error:
        raise ImageError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    try:
        if image.mode.startswith("I"):
            return Image.fromarray(_to_eight_bits(np.asarray(image), name)).convert("RGB")
        if image.mode == "F":
            raise ImageError(f"{name} holds floats, whose range is not known: convert it to 8 or 16 bits")
        # By way of RGBA, or a palette with a transparent colour warns.
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise ImageError(f"{name} of mode {image.mode!r} cannot be converted to RGB: {error}") from error


def _to_eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}, expected 16 bits, 0 to 65535")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        raise ImageError(f"{name} is an array of shape {array.shape}, expected {expected}")
    if 0 in array.shape:
        raise ImageError(f"{name} is an array of shape {array.shape}, without a pixel")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = _to_eight_bits(array, name)
    if array.dtype != np.uint8:
        advice = "images that are already prepared are a float torch tensor (B, 3, H, W)"
        raise ImageError(f"{name} is an array of {array.dtype}, expected uint8 or uint16; {advice}")
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_last(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.dtype not in (torch.uint8, torch.uint16):
        advice = "images that are already prepared are one float tensor (B, 3, H, W)"
        raise ImageError(f"{name} is a tensor of {tensor.dtype}, expected uint8 (C, H, W); {advice}")
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        raise ImageError(f"{name} is a tensor of shape {tuple(tensor.shape)}, expected (1 or 3 or 4, H, W)")
    array = tensor.cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array
