"""TIFFs by their tags: the pixels that they say, or a refusal that names the tag; never others."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from adpretrain_hf.errors import ImageError
from adpretrain_hf.images import read_image

H, W = 20, 31  # odd, so that rows of packed bits end within a byte
ROWS, COLUMNS = np.mgrid[:H, :W]
GREY = (ROWS * 5 + COLUMNS * 3 + 20).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
GREY_16 = GREY.astype("<u2") * 257
GREY_AS_RGB = np.stack([GREY] * 3, axis=-1)
REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=np.uint8)
_SHORT, _LONG = 3, 4

BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, ORIENTATION, PLANES = 258, 259, 262, 266, 277, 274, 284
SUBFILE, COLOUR_MAP, INK_SET, SAMPLE_FORMAT, SUBSAMPLING = 254, 320, 332, 339, 530


def tiff(tags: dict[int, int | Sequence[int] | None], *strips: bytes) -> bytes:
    """A little-endian TIFF of 8-bit grey strips, unless the tags say something else; None leaves a tag out."""
    rows = H if tags.get(PLANES) == 2 else -(-H // len(strips))
    every: dict[int, int | Sequence[int] | None] = {256: W, 257: H, BITS: 8, COMPRESSION: 1, PHOTOMETRIC: 1}
    every |= {SAMPLES: 1, 278: rows, PLANES: 1, **tags}
    body, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(body))
        body += strip + bytes(len(strip) % 2)
    every |= {273: offsets, 279: [len(strip) for strip in strips]}
    kept = {tag: [value] if isinstance(value, int) else value for tag, value in every.items() if value is not None}
    directory = 8 + len(body)
    behind = directory + 2 + 12 * len(kept) + 4
    entries = extra = b""
    for tag, values in sorted(kept.items()):
        kind = _LONG if tag in (256, 257, 273, 278, 279) else _SHORT
        data = struct.pack(f"<{len(values)}{'I' if kind == _LONG else 'H'}", *values)
        entries += struct.pack("<HHI", tag, kind, len(values))
        entries += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", behind + len(extra))
        extra += data if len(data) > 4 else b""
    head = b"II*\0" + struct.pack("<I", directory)
    return head + body + struct.pack("<H", len(kept)) + entries + bytes(4) + extra


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of integers of so many bits without a gap, each row from a new byte on."""
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values.tolist())
    padded = (row + "0" * (-len(row) % 8) for row in rows)
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in padded)


def subsampled(image: np.ndarray) -> bytes:
    """YCbCr as a TIFF stores it by default: four values of Y, then one of Cb and Cr for all of them."""
    padded = np.pad(np.asarray(Image.fromarray(image).convert("YCbCr")), ((0, 0), (0, W % 2), (0, 0)), mode="edge")
    blocks = padded.reshape(H // 2, 2, -1, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 3)
    units = np.concatenate([blocks[:, :, 0], blocks[:, :, 1:].mean(axis=1).round()], axis=1)
    return units.astype(np.uint8).tobytes()


def planes(image: np.ndarray) -> list[bytes]:
    return [np.ascontiguousarray(plane).tobytes() for plane in np.moveaxis(image, -1, 0)]


RGB_16 = RGB.astype("<u2") * 257
GREY_12 = GREY_16 >> 4
COLOURS = {BITS: [8] * 3, SAMPLES: 3, PHOTOMETRIC: 2}
COLOURS_16 = COLOURS | {BITS: [16] * 3}
MAP = np.random.default_rng(0).integers(0, 256, (3, 256))
# What the tags say, the pixels, and by how much they may differ.
READ = {
    "8-bit grey": (tiff({}, GREY.tobytes()), GREY_AS_RGB, 0),
    "8-bit grey, 0 is white": (tiff({PHOTOMETRIC: 0}, (255 - GREY).tobytes()), GREY_AS_RGB, 0),
    "16-bit grey": (tiff({BITS: 16}, GREY_16.tobytes()), GREY_AS_RGB, 0),
    "16-bit grey, 0 is white": (tiff({BITS: 16, PHOTOMETRIC: 0}, (65535 - GREY_16).tobytes()), GREY_AS_RGB, 0),
    "16-bit grey, 0 is white, deflated": (
        tiff({BITS: 16, PHOTOMETRIC: 0, COMPRESSION: 8}, zlib.compress((65535 - GREY_16).tobytes())),
        GREY_AS_RGB,
        0,
    ),
    "16-bit grey, 0 is white, turned": (
        tiff({BITS: 16, PHOTOMETRIC: 0, ORIENTATION: 6}, (65535 - GREY_16).tobytes()),
        np.rot90(GREY_AS_RGB, -1),
        0,
    ),
    "8-bit grey, turned": (tiff({ORIENTATION: 6}, GREY.tobytes()), np.rot90(GREY_AS_RGB, -1), 0),
    "8-bit RGB, turned": (tiff(COLOURS | {ORIENTATION: 6}, RGB.tobytes()), np.rot90(RGB, -1), 0),
    "12-bit grey": (tiff({BITS: 12}, packed(GREY_12, 12)), GREY_AS_RGB, 1),
    "12-bit grey, strips": (
        tiff({BITS: 12}, *(packed(GREY_12[r : r + 5], 12) for r in range(0, H, 5))),
        GREY_AS_RGB,
        1,
    ),
    "12-bit grey, deflated": (tiff({BITS: 12, COMPRESSION: 8}, zlib.compress(packed(GREY_12, 12))), GREY_AS_RGB, 1),
    "8-bit RGB": (tiff(COLOURS, RGB.tobytes()), RGB, 0),
    "8-bit RGB, planes": (tiff(COLOURS | {PLANES: 2}, *planes(RGB)), RGB, 0),
    "8-bit RGB, planes, bits reversed": (tiff(COLOURS | {PLANES: 2, FILL_ORDER: 2}, *planes(REVERSED[RGB])), RGB, 0),
    "16-bit RGB": (tiff(COLOURS_16, RGB_16.tobytes()), RGB, 0),
    "16-bit RGB, planes": (tiff(COLOURS_16 | {PLANES: 2}, *planes(RGB_16)), RGB, 0),
    "16-bit RGB, planes, deflated": (
        tiff(COLOURS_16 | {PLANES: 2, COMPRESSION: 8}, *map(zlib.compress, planes(RGB_16))),
        RGB,
        0,
    ),
    "YCbCr": (tiff(COLOURS | {PHOTOMETRIC: 6}, subsampled(RGB)), RGB, 20),
    "palette": (tiff({PHOTOMETRIC: 3, COLOUR_MAP: (MAP * 257).ravel().tolist()}, GREY.tobytes()), MAP.T[GREY], 0),
}
REFUSED = {
    "signed 8-bit": (tiff({SAMPLE_FORMAT: 2}, GREY.tobytes()), "SampleFormat 2"),
    "signed 16-bit": (tiff({BITS: 16, SAMPLE_FORMAT: 2}, (GREY_16 // 2).tobytes()), "SampleFormat 2"),
    "unsigned 32-bit": (tiff({BITS: 32}, GREY.astype("<u4").tobytes()), "32 bits (BitsPerSample)"),
    "floats": (tiff({BITS: 32, SAMPLE_FORMAT: 3}, GREY.astype("<f4").tobytes()), "SampleFormat 3"),
    "float RGB": (
        tiff(COLOURS | {BITS: [32] * 3, SAMPLE_FORMAT: [3] * 3}, RGB.astype("<f4").tobytes()),
        "SampleFormat (3, 3, 3)",
    ),
    "10-bit": (tiff({BITS: 10}, packed(GREY_16 >> 6, 10)), "BitsPerSample (10,)"),
    "12-bit, 0 is white": (
        tiff({BITS: 12, PHOTOMETRIC: 0}, packed(4095 - GREY_12, 12)),
        "BitsPerSample (12,), Compression 1, PhotometricInterpretation 0",
    ),
    "nothing about 0": (tiff({PHOTOMETRIC: None}, GREY.tobytes()), "no PhotometricInterpretation"),
    "CIELAB": (tiff(COLOURS | {PHOTOMETRIC: 8}, RGB.tobytes()), "PhotometricInterpretation 8"),
    "colour filter array": (tiff({PHOTOMETRIC: 32803}, GREY.tobytes()), "PhotometricInterpretation 32803"),
    "a palette of 8 bits": (tiff({PHOTOMETRIC: 3, COLOUR_MAP: MAP.ravel().tolist()}, GREY.tobytes()), "ColorMap"),
    "a palette of 65536": (
        tiff({BITS: 16, PHOTOMETRIC: 3, COLOUR_MAP: [*range(65536)] * 3}, GREY_16.tobytes()),
        "BitsPerSample (16,), Compression 1, PhotometricInterpretation 3",
    ),
    "other inks": (tiff({BITS: [8] * 4, SAMPLES: 4, PHOTOMETRIC: 5, INK_SET: 2}, bytes(4 * H * W)), "InkSet 2"),
    "a thumbnail": (tiff({SUBFILE: 1}, GREY.tobytes()), "NewSubfileType"),
}


@pytest.mark.parametrize("kind", READ)
def test_pixels_are_what_the_tags_say(tmp_path: Path, kind: str) -> None:
    data, expected, tolerance = READ[kind]
    (tmp_path / "a.tif").write_bytes(data)
    for source in (tmp_path / "a.tif", data):
        pixels = np.asarray(read_image(source, "a.tif"))
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    assert TiffImagePlugin.READ_LIBTIFF is False


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_as_the_tags_say_is_refused_by_the_tag(tmp_path: Path, kind: str) -> None:
    data, message = REFUSED[kind]
    (tmp_path / "a.tif").write_bytes(data)
    path = tmp_path / "a.tif"
    for source, name in ((path, str(path)), (data, "a.tif")):
        with pytest.raises(ImageError) as caught:
            read_image(source, name)
        assert str(caught.value).startswith(f"{name} ") and message in str(caught.value)


@pytest.mark.parametrize("kind", READ | REFUSED)
def test_an_image_that_the_caller_opened_is_read_alike_or_refused(kind: str) -> None:
    data, *rest = (READ | REFUSED)[kind]
    try:
        pixels = np.asarray(read_image(Image.open(io.BytesIO(data)), "image 3"))
    except Image.UnidentifiedImageError:
        assert kind in REFUSED
    except ImageError as error:
        mixed_up = "which Pillow mixes up: give its path or bytes instead"
        assert rest[0] in str(error) if kind in REFUSED else mixed_up in str(error)
    else:
        expected, tolerance = rest
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_an_image_that_the_caller_opened_from_a_file_is_refused_where_pillow_maps_it_wrongly(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(READ["8-bit grey, turned"][0])
    with pytest.raises(ImageError, match="image 3 is a TIFF of Orientation 6, which Pillow mixes up: give its path"):
        read_image(Image.open(tmp_path / "a.tif"), "image 3")


def test_a_damaged_tiff_is_told_by_its_damage() -> None:
    with pytest.raises(ImageError, match=r"a\.tif cannot be read as an image: image file is truncated"):
        read_image(tiff(COLOURS, RGB.tobytes()[:-600]), "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif is damaged: its 40 rows take 2 strips .* it has 1"):
        read_image(tiff({257: 2 * H, 278: H}, GREY.tobytes()), "a.tif")
    entry = struct.pack("<HHI", PHOTOMETRIC, 3, 1)
    unknown = tiff({BITS: 10}, packed(GREY_16 >> 6, 10))
    assert unknown.count(entry) == 1
    with pytest.raises(ImageError, match=r"not read a TIFF of BitsPerSample \(10,\), Compression 1, SamplesPerPixel"):
        read_image(unknown.replace(entry, struct.pack("<HHI", PHOTOMETRIC, 3, 2**20)), "a.tif")
