"""Reading images of any kind as upright RGB.

What images may be, and what is done with them:

- EXIF orientation is applied.
- Grey, palette, CMYK and YCbCr images become RGB as Pillow converts them; an alpha channel is dropped, the colours
  below it stay as they are stored.
- 16-bit grey (and 32-bit integer) images are scaled from the full range 0..65535 to 8 bits, packed ones of 12 bits from
  0..4095. A camera that uses 12 of the 16 bits gives dark images: scale such images before.
- Float images are refused: their range is not known. So are TIFFs of signed integers, of integers of 32 bits, and of
  whatever else Pillow does not read as the tags say.
- Of several pages or frames the first is read, and a warning is logged; the first picture of a JPEG is all of it.
- Metadata that cannot be read are passed over, and a warning is logged.
- Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), tensors the same with the channels first; uint8 or uint16. Their
  colours are RGB: OpenCV's BGR is turned by ``array[..., ::-1]``.
- Bytes are those of an image file, and so are what a buffer or an open file holds, from its beginning.
- A JPEG file may be decoded at a half, a quarter or an eighth of its size, which is all that is done faster.
"""

import contextlib
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from adpretrain_hf.errors import ImageError, MissingPathError
from adpretrain_hf.images.tiff import check_tags, describe, grey_range, mixed_up, open_by_libtiff

logger = logging.getLogger(__name__)

ImageSource = Union[str, Path, bytes, Image.Image, np.ndarray, Tensor, Callable[[], Any]]
# Pillow goes by content, and some of its many readers start other programs: only these are ever tried.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM")
# How the stored pixels come upright, by EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, RuntimeError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError)
UNREADABLE = (*_DAMAGED, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


class Picture(NamedTuple):
    """An image with its pixels, which may be fewer than it has: those of a JPEG that was reduced when it was decoded.

    Attributes:
        image: the pixels.
        size: W and H of the image itself.
        box: left, top, right and bottom of what ``image`` shows of it; beyond lies what fills a JPEG's last block.
    """

    image: Image.Image
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @classmethod
    def whole(cls, image: Image.Image) -> "Picture":
        """An image with all of its pixels."""
        return cls(image, image.size, (0, 0, *image.size))

    def turned(self, image: Image.Image, orientation: int) -> "Picture":
        """The picture whose pixels were turned upright, from that EXIF orientation."""
        (width, height), (_, _, right, bottom) = self.size, self.box
        if orientation > 4:
            width, height, right, bottom = height, width, bottom, right
        left = image.width - right if orientation in (2, 3, 6, 7) else 0
        top = image.height - bottom if orientation in (3, 4, 7, 8) else 0
        return Picture(image, (width, height), (left, top, left + right, top + bottom))


def read_image(source: ImageSource, name: str) -> Image.Image:
    """Reads a path, the bytes of an image file, a PIL image, array or tensor as an upright RGB image.

    A function is called, and what it returns is read.

    Raises:
        MissingPathError: no such file.
        ImageError: unreadable, or of a kind that is not supported.
    """
    return read_picture(source, name).image


def read_picture(source: ImageSource, name: str, side: int | None = None) -> Picture:
    """Like ``read_image``; with ``side``, a JPEG's file is decoded at the least size whose shorter side is not below.

    libjpeg then makes a half, a quarter or an eighth of the pixels of the same coefficients (``Image.draft``).
    """
    if callable(source):
        source = source()
    if isinstance(source, (np.ndarray, Tensor)):
        array = _channels_last(source, name) if isinstance(source, Tensor) else source
        return Picture.whole(_to_rgb(_from_array(array, name), name))
    picture = _upright(_opened(source, name, side), name)
    return picture._replace(image=source.copy()) if picture.image is source else picture  # it is the caller's


def read_mask(source: ImageSource, name: str) -> np.ndarray:
    """Reads a mask by its stored values, however small they are: (H, W), bool, True where one is above 0.

    What is transparent is False. Arrays and tensors may be of any numbers.

    Raises:
        MissingPathError: no such file.
        ImageError: unreadable, or of a shape that no mask has.
    """
    if isinstance(source, Tensor):
        source = (source.movedim(0, -1) if source.ndim == 3 else source).cpu().numpy()
    values = source if isinstance(source, np.ndarray) else _stored(_opened(source, name).image, name)
    if values.ndim not in (2, 3) or values.shape[2:] > (4,) or values.dtype.kind not in "biuf":
        raise ImageError(f"{name} is an array of {values.dtype} of shape {values.shape}, expected a mask (H, W)")
    is_above: np.ndarray = values > 0
    if values.ndim == 2:
        return is_above
    if values.shape[2] in (2, 4):
        is_above = is_above[..., :-1] & is_above[..., -1:]
    return np.asarray(is_above.any(axis=2))


def _stored(image: Image.Image, name: str) -> np.ndarray:
    """The values of an upright image (H, W), or its colours (H, W, 3), with what is transparent as (H, W, 2 or 4)."""
    try:
        upright = ImageOps.exif_transpose(image)
        # The numbers of a palette are labels, unless the first is a colour: then it was made of a picture.
        is_picture = upright.mode in ("P", "PA") and any((upright.getpalette() or [])[:3])
        if is_picture or "transparency" in upright.info:
            upright = upright.convert("RGBA")
        elif upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # whose black is not 0
            upright = upright.convert("RGB")
        return np.asarray(upright)
    except UNREADABLE as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def _opened(source: Any, name: str, side: int | None = None) -> Picture:
    """A path, the bytes of an image file or a PIL image, as it is stored."""
    source = encoded(source, name)
    if isinstance(source, bytes):
        return _open(_Bytes(source), name, side)
    if isinstance(source, Image.Image):
        return Picture.whole(source)
    if not isinstance(source, (str, Path)):
        expected = "a path, PIL image, array, uint8 tensor or a file's bytes"
        raise ImageError(f"{name} is a {type(source).__name__}, expected {expected}")
    if not os.path.exists(source):  # unlike Path.exists, it answers for texts that no path can be
        raise MissingPathError(f"no such image: {source}")
    if os.path.isdir(source):
        raise ImageError(f"{source} is a folder, expected an image: give a folder alone, or image files")
    return _open(Path(source), str(source), side)


def encoded(source: Any, name: str) -> Any:
    """The bytes of a file that lies in a buffer or is open; anything else as it is.

    Raises:
        ImageError: it cannot be read, or is open as text.
    """
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if not (hasattr(source, "read") and hasattr(source, "seek")):
        return source
    try:
        source.seek(0)
        data = source.read()
    except (OSError, ValueError) as error:  # closed, or nothing that can be read again
        raise ImageError(f"{name} cannot be read: {error}") from error
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is open as text, expected a file that is open for bytes ('rb')")
    return data


def _upright(picture: Picture, name: str) -> Picture:
    image, black, white = picture.image, 0, 65535
    if isinstance(image, TiffImageFile):
        check_tags(image, name)
        black, white = grey_range(image)
    try:
        image.load()
    except UNREADABLE as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    try:
        Image.Exif().load(image.info.get("exif", b""))  # Pillow tells of damage the first time only, if at all
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE as error:
        logger.warning("%s has EXIF data that cannot be read (%s): it is taken as it is stored", name, error)
        orientation = 1
    if orientation not in _TURNS:
        return picture._replace(image=_to_rgb(image, name, black, white))
    upright = picture.turned(image.transpose(_TURNS[orientation]), orientation)
    return upright._replace(image=_to_rgb(upright.image, name, black, white))


class _Bytes(io.BytesIO):
    def __repr__(self) -> str:
        """What Pillow's messages call it: without an address, the same bytes give the same message."""
        return f"of {len(self.getbuffer())} bytes"


def _open(file: Path | io.BytesIO, name: str, side: int | None = None) -> Picture:
    try:
        return _load(file, name, side)
    except Image.DecompressionBombError as error:
        advice = "If it can be trusted, set PIL.Image.MAX_IMAGE_PIXELS (--max-pixels)"
        raise ImageError(f"{name} is refused, for it would need too much memory: {error} {advice}") from error
    except UNREADABLE as error:
        with contextlib.suppress(*UNREADABLE):
            picture = _load(_without_metadata(file), name)
            logger.warning("%s has metadata that cannot be read (%s): they are passed over", name, error)
            return picture
        reason: object = error or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            with contextlib.suppress(*UNREADABLE):
                reason = describe(file) or reason
        raise ImageError(f"{name} cannot be read as an image: {reason}") from error


def _load(file: Path | io.BytesIO, name: str, side: int | None = None) -> Picture:
    image: Image.Image = Image.open(file, formats=_FORMATS)
    pages: int | str = 1
    try:
        pages = getattr(image, "n_frames", 1)
    except UNREADABLE:
        pages = "one is damaged"
        image = Image.open(file, formats=_FORMATS)  # the other stands at the damaged page
    if isinstance(image, TiffImageFile) and mixed_up(image):
        image = open_by_libtiff(file)
    size, reduced = image.size, image.draft("RGB", (side, side)) if side else None
    image.load()
    if pages != 1 and image.format != "MPO":
        logger.warning("%s has several pages or frames (%s): only the first is read", name, pages)
    return Picture(image, size, reduced[1]) if reduced else Picture.whole(image)


def _without_metadata(file: Path | io.BytesIO) -> io.BytesIO:
    """A PNG with nothing but its pixels and its EXIF data; ValueError if it is none."""
    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("no PNG")
    chunks, start = [data[:8]], 8
    while start < len(data):
        (length,) = struct.unpack_from(">I", data, start)
        chunk, start = data[start : start + length + 12], start + length + 12
        if not chunk[4] & 0x20 or chunk[4:8] == b"eXIf":  # decoders need those that begin with a capital, no others
            chunks.append(chunk)
    return _Bytes(b"".join(chunks))


def _to_rgb(image: Image.Image, name: str, black: int = 0, white: int = 65535) -> Image.Image:
    if image.mode == "RGB":
        return image
    try:
        if image.mode.startswith("I"):
            return Image.fromarray(_to_eight_bits(np.asarray(image), name, black, white)).convert("RGB")
        if image.mode == "F":
            raise ImageError(f"{name} holds floats, whose range is not known: convert it to 8 or 16 bits")
        # By way of RGBA, or a palette with a transparent colour warns.
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except ImageError:
        raise
    except UNREADABLE as error:
        raise ImageError(f"{name} of mode {image.mode!r} cannot be converted to RGB: {error}") from error


def _to_eight_bits(values: np.ndarray, name: str, black: int = 0, white: int = 65535) -> np.ndarray:
    low, high, most = int(values.min()), int(values.max()), max(black, white)
    if low < 0 or high > most:
        bits = most.bit_length()
        raise ImageError(f"{name} holds values from {low} to {high}, expected {bits} bits, 0 to {most}")
    brightness = values.astype(np.uint32) if white else most - values.astype(np.uint32)
    return ((brightness * 255 + most // 2) // most).astype(np.uint8)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4); give a stack of grey images as a list of them"
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
