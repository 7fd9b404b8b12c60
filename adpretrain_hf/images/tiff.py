"""TIFFs of which Pillow makes other pixels than their tags say: read right, or refused by the tag."""

import math
import threading
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from adpretrain_hf.errors import ImageError

_SUBFILE, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 257, 258, 259, 262, 266
_STRIPS, _ROWS_PER_STRIP = 273, 278
_ORIENTATION, _SAMPLES, _PLANES, _COLOUR_MAP, _INK_SET, _EXTRA, _FORMAT = 274, 277, 284, 320, 332, 338, 339
_WHITE_IS_ZERO, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 3, 5, 6, 8
_FORCING = threading.Lock()


def mixed_up(image: TiffImageFile) -> str:
    """The tag by which Pillow's own reader, which takes what is not compressed, mixes the pixels up; empty for none."""
    tags = image.tag_v2
    if image.use_load_libtiff:
        return ""
    if tags.get(_PHOTOMETRIC) == _YCBCR:  # it takes subsampled colours for one of each pixel
        return "PhotometricInterpretation 6"
    if tags.get(_PLANES) == 2 and (max(_bits(tags)) > 8 or tags.get(_FILL_ORDER) == 2):
        return "PlanarConfiguration 2"
    turn = tags.get(_ORIENTATION, 1)  # it maps files into memory in the shape that they have when they are upright
    return f"Orientation {turn}" if turn > 4 and image.filename and image.mode != "RGB" else ""


def open_by_libtiff(file: Path | BinaryIO) -> Image.Image:
    """Opens a TIFF so that libtiff reads it, which mixes up none of that."""
    with _FORCING:  # for this one alone: Pillow has a switch for all
        before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
        try:
            return Image.open(file, formats=("TIFF",))
        finally:
            TiffImagePlugin.READ_LIBTIFF = before


def check_tags(image: TiffImageFile, name: str) -> None:
    """Refuses what Pillow reads, but not as its tags say.

    Raises:
        ImageError: names the tag.
    """
    tags = image.tag_v2
    photometric, bits, formats = tags.get(_PHOTOMETRIC), max(_bits(tags)), set(tags.get(_FORMAT, (1,)))
    colours = tags.get(_COLOUR_MAP, ()) if photometric == _PALETTE else ()
    refused = {
        "floats, whose range is not known (SampleFormat 3)": 3 in formats,
        "signed integers, whose range is not known (SampleFormat 2)": 2 in formats,
        f"integers of {bits} bits (BitsPerSample), expected at most 16": bits > 16,
        "pixels of which it does not say what 0 means (no PhotometricInterpretation)": photometric is None,
        "colours in CIELAB (PhotometricInterpretation 8)": photometric == _CIELAB,
        "other inks than CMYK (InkSet 2)": photometric == _CMYK and tags.get(_INK_SET) == 2,
        "a palette of 8 bits (ColorMap), expected 16": 0 < max(colours, default=0) < 256,
        "a smaller copy or a mask as its first page (NewSubfileType)": bool(tags.get(_SUBFILE, 0) & 0b101),
    }
    for what, found in refused.items():
        if found:
            raise ImageError(f"{name} holds {what}: convert it to 8 or 16 bits, grey or RGB")
    rows, found = tags.get(_HEIGHT, 0), len(tags.get(_STRIPS, ()))
    expected = math.ceil(rows / max(1, tags.get(_ROWS_PER_STRIP, rows)))
    expected *= tags.get(_SAMPLES, 1) if tags.get(_PLANES) == 2 else 1
    if 0 < found < expected:  # Pillow leaves the rest black
        raise ImageError(f"{name} is damaged: its {rows} rows take {expected} strips (StripOffsets), it has {found}")
    if tag := mixed_up(image):
        raise ImageError(f"{name} is a TIFF of {tag}, which Pillow mixes up: give its path or bytes instead")


def grey_range(image: TiffImageFile) -> tuple[int, int]:
    """The values of black and of white in an image of more than 8 bits."""
    most = 2 ** max(_bits(image.tag_v2)) - 1
    return (most, 0) if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, most)


def describe(file: Path | BinaryIO) -> str:
    """The tags that say how a TIFF is to be read, or nothing if it is none."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return describe(opened)
    file.seek(0)
    header = file.read(16)
    if header[:4] not in TiffImagePlugin.PREFIXES:
        return ""
    tags = ImageFileDirectory_v2(header if header[2:4] in (b"+\0", b"\0+") else header[:8])
    file.seek(tags.next)
    tags.load(file)
    known = (_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANES, _EXTRA, _FORMAT)
    found = [f"{TiffTags.lookup(tag).name} {tags[tag]}" for tag in known if tag in tags]
    return f"Pillow does not read a TIFF of {', '.join(found)}: convert it to 8 or 16 bits, grey or RGB"


def _bits(tags: ImageFileDirectory_v2) -> tuple[int, ...]:
    return tags.get(_BITS) or (1,)
