"""Reading images: every kind that is promised, upright and in RGB; everything else is refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, UnidentifiedImageError, features

from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images import list_images, named_sources, read_image
from adpretrain_hf.images.decode import read_picture
from adpretrain_hf.images.sources import SUFFIXES, name_of
from tests.conftest import random_image

QUICK = settings(max_examples=60, deadline=None, database=None)
FUZZ = settings(max_examples=250, deadline=None, database=None)
EXIF_ORIENTATION = 0x0112
GREY_16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)

# What each EXIF orientation asks for, as numpy does it to the stored pixels.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def pixels_of(source: object, name: str = "the image") -> np.ndarray:
    image = read_image(source, name)
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


# Kinds of sources


def test_path_text_pil_array_and_tensor_are_the_same_image(tmp_path: Path) -> None:
    image = random_image(0)
    path = tmp_path / "image.png"
    image.save(path)
    array = np.array(image)
    for source in (path, str(path), image, Image.open(path), array, torch.from_numpy(array).permute(2, 0, 1)):
        np.testing.assert_array_equal(pixels_of(source), array)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_promised_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    # One colour with equal channels survives the lossy formats, the palette and the grey one.
    path = tmp_path / f"image{suffix.upper()}"
    Image.new("L" if suffix == ".pgm" else "RGB", (30, 20), "#646464").save(path)
    pixels = pixels_of(path)
    assert pixels.shape == (20, 30, 3)
    assert np.abs(pixels.astype(int) - 100).max() <= 3
    assert list_images(tmp_path) == [path]


def test_the_callers_image_is_left_as_it_is() -> None:
    for image in (random_image(0), random_image(0).convert("P"), random_image(0).convert("RGBA")):
        image.info["note"] = "mine"
        before, mode = np.array(image), image.mode
        result = read_image(image, "the image")
        result.paste("black", (0, 0, 10, 10))
        np.testing.assert_array_equal(np.asarray(image), before)
        assert image.mode == mode and image.info["note"] == "mine"


@pytest.mark.parametrize("shape", [(12, 9), (12, 9, 1), (12, 9, 3), (12, 9, 4)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(array.reshape(12, 9, -1)[..., :3], (12, 9, 3))
    np.testing.assert_array_equal(pixels_of(array), expected)


@pytest.mark.parametrize("shape", [(12, 9), (1, 12, 9), (3, 12, 9), (4, 12, 9)])
def test_tensor_shapes(shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = tensor.reshape(-1, 12, 9)[:3].expand(3, 12, 9).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels_of(tensor), expected)


@QUICK
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([3, 4]))),
    st.sampled_from(["plain", "fortran", "reversed", "strided", "read-only"]),
)
def test_memory_layout_of_an_array_does_not_matter(array: np.ndarray, layout: str) -> None:
    expected = array[..., :3].copy()
    if layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "reversed":
        array = array[::-1].copy()[::-1]
    elif layout == "strided":
        array = np.repeat(array, 2, axis=0)[::2]
    elif layout == "read-only":
        array.flags.writeable = False
    np.testing.assert_array_equal(pixels_of(array), expected)


# EXIF orientation


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    image = random_image(3, width=30, height=20)
    options: dict[str, object] = {"lossless": True, "exact": True} if kind == "webp" else {}
    plain, turned = tmp_path / f"plain.{kind}", tmp_path / f"turned.{kind}"
    image.save(plain, **options)
    image.save(turned, exif=with_orientation(orientation), **options)
    expected = UPRIGHT[orientation](np.asarray(Image.open(plain)))
    np.testing.assert_array_equal(pixels_of(turned), expected)
    np.testing.assert_array_equal(pixels_of(Image.open(turned)), expected)
    if kind != "jpeg":
        np.testing.assert_array_equal(expected, UPRIGHT[orientation](np.asarray(image)))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGBA"])
def test_exif_orientation_of_other_modes(tmp_path: Path, mode: str, orientation: int) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "turned.png", exif=with_orientation(orientation))
    expected = UPRIGHT[orientation](np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(pixels_of(tmp_path / "turned.png"), expected)


def test_an_unknown_orientation_leaves_the_image_as_stored(tmp_path: Path) -> None:
    random_image(0).save(tmp_path / "odd.png", exif=with_orientation(9))
    np.testing.assert_array_equal(pixels_of(tmp_path / "odd.png"), np.asarray(random_image(0)))


# JPEGs that are reduced while they are decoded

JPEGS = {
    "baseline": encoded(random_image(5, 150, 131), "JPEG"),
    "progressive": encoded(random_image(5, 150, 131), "JPEG", progressive=True),
    "no chroma subsampling": encoded(random_image(5, 150, 131), "JPEG", subsampling=0),
    "grey": encoded(random_image(5, 150, 131).convert("L"), "JPEG"),
    "CMYK": encoded(random_image(5, 150, 131).convert("CMYK"), "JPEG"),
    "two pictures": encoded(random_image(5, 150, 131), "MPO", save_all=True, append_images=[random_image(6, 150, 131)]),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize(("side", "factor"), [(132, 1), (131, 1), (66, 1), (65, 2), (33, 2), (32, 4), (16, 8), (1, 8)])
def test_a_reduced_jpeg_is_the_draft_of_pillow_and_knows_its_size(
    tmp_path: Path, kind: str, side: int, factor: int
) -> None:
    (tmp_path / "image.jpg").write_bytes(JPEGS[kind])
    draft = Image.open(io.BytesIO(JPEGS[kind]))
    draft.draft("RGB", (150 // factor, 131 // factor))
    for source in (tmp_path / "image.jpg", JPEGS[kind], lambda: JPEGS[kind]):
        image, size, box = read_picture(source, "image.jpg", side)
        assert image.size == (-(-150 // factor), -(-131 // factor)) and min(image.size) >= min(side, 131)
        assert image.mode == "RGB" and size == (150, 131) and box == (0, 0, 150 / factor, 131 / factor)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(draft.convert("RGB")))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_reduced_jpeg_is_upright_with_its_filled_up_edge_where_it_came_to_lie(orientation: int) -> None:
    image, size, box = read_picture(
        encoded(random_image(5, 150, 131), "JPEG", exif=with_orientation(orientation)), "image.jpg", 16
    )
    draft = Image.open(io.BytesIO(JPEGS["baseline"]))
    draft.draft("RGB", (16, 16))
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](np.asarray(draft)))
    covered = np.zeros((131, 150), dtype=bool)  # of eighths of pixels, what is of the image
    covered = np.pad(~covered, ((0, 5), (0, 2)))
    rows, columns = np.nonzero(UPRIGHT[orientation](covered))
    assert size == UPRIGHT[orientation](np.zeros((131, 150))).shape[::-1]
    assert box == (columns.min() / 8, rows.min() / 8, (columns.max() + 1) / 8, (rows.max() + 1) / 8)


def test_what_is_no_jpeg_file_is_read_with_all_its_pixels(tmp_path: Path) -> None:
    image = random_image(5, 150, 131)
    opened = Image.open(io.BytesIO(JPEGS["baseline"]))  # the caller's: it may be needed whole
    sources = [encoded(image, "PNG"), encoded(image, "WEBP", lossless=True), encoded(image, "TIFF"), np.array(image)]
    for source in (*sources, image, opened):
        picture = read_picture(source, "image", 16)
        assert picture.image.size == picture.size == (150, 131) and picture.box == (0, 0, 150, 131)
        np.testing.assert_array_equal(np.asarray(picture.image), pixels_of(source))


# 16 bits


@pytest.mark.parametrize("source", ["array", "array (H, W, 1)", "tensor", "pil", "png", "tiff", "big-endian tiff"])
def test_sixteen_bits_are_scaled_from_their_full_range(tmp_path: Path, source: str) -> None:
    images: dict[str, object] = {
        "array": GREY_16,
        "array (H, W, 1)": GREY_16[..., None],
        "tensor": torch.from_numpy(GREY_16),
        "pil": Image.fromarray(GREY_16),
        "png": tmp_path / "grey.png",
        "tiff": tmp_path / "grey.tiff",
        "big-endian tiff": tmp_path / "big.tiff",
    }
    Image.fromarray(GREY_16).save(tmp_path / "grey.png")
    Image.fromarray(GREY_16).save(tmp_path / "grey.tiff")
    Image.frombytes("I;16B", (256, 256), GREY_16.astype(">u2").tobytes()).save(tmp_path / "big.tiff")
    pixels = pixels_of(images[source])
    assert (pixels[..., :1] == pixels).all()
    values = pixels[..., 0].ravel().astype(float)
    assert values[0] == 0 and values[-1] == 255
    assert (np.diff(values) >= 0).all()
    assert np.abs(values - GREY_16.ravel() / 257).max() <= 0.5


def test_sixteen_bit_colour_arrays() -> None:
    array = np.array([[[0, 257, 65535], [128 * 257, 65535, 0]]], dtype=np.uint16)
    assert pixels_of(array).tolist() == [[[0, 1, 255], [128, 255, 0]]]
    assert pixels_of(torch.from_numpy(array).permute(2, 0, 1)).tolist() == [[[0, 1, 255], [128, 255, 0]]]


def test_byte_order_of_a_16_bit_array_does_not_matter() -> None:
    np.testing.assert_array_equal(pixels_of(GREY_16.astype(">u2")), pixels_of(GREY_16))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_beyond_16_bits_are_refused(value: int) -> None:
    image = Image.fromarray(np.full((20, 20), value, dtype=np.int32))
    with pytest.raises(ImageError, match=rf"part\.tif holds values from {value} to {value}, expected 16 bits"):
        read_image(image, "part.tif")


# Colour modes


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128])])
def test_palette_colours_are_kept_also_below_transparency(tmp_path: Path, transparency: object) -> None:
    image = Image.new("P", (30, 20))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (15, 0, 30, 20))
    image.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = pixels_of(tmp_path / "palette.png")
    assert (pixels[:, :15] == (10, 20, 30)).all() and (pixels[:, 15:] == (200, 100, 50)).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_changes_nothing(tmp_path: Path, mode: str) -> None:
    image = random_image(0).convert(mode)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "transparent.png", transparency=(1, 2, 3) if mode == "RGB" else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = pixels_of(tmp_path / "transparent.png")
    np.testing.assert_array_equal(pixels, pixels_of(tmp_path / "plain.png"))


@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_and_colours_are_kept(tmp_path: Path, mode: str, alpha: int) -> None:
    opaque = random_image(0).convert(mode[:-1])
    image = opaque.copy()
    image.putalpha(alpha)
    assert image.mode == mode
    image.save(tmp_path / "image.png")
    expected = np.asarray(opaque.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(image), expected)
    np.testing.assert_array_equal(pixels_of(tmp_path / "image.png"), expected)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "bits.png"), np.stack([bits * np.uint8(255)] * 3, axis=-1))


@pytest.mark.parametrize("colour", [(200, 30, 60), (10, 220, 90), (0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(tmp_path: Path, mode: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (32, 32), colour).convert(mode)
    image.save(tmp_path / "image.jpg", quality=95)
    image.save(tmp_path / "image.tiff")
    sources = [image, tmp_path / "image.jpg"]
    if Image.open(tmp_path / "image.tiff").mode == mode:  # Pillow before 13 takes YCbCr in a TIFF for RGB
        sources.append(tmp_path / "image.tiff")
    for source in sources:
        assert np.abs(pixels_of(source).astype(int) - colour).max() <= 4


def test_cmyk_jpeg_is_read_as_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert Image.open(tmp_path / "red.jpg").mode == "CMYK"
    assert np.abs(pixels_of(tmp_path / "red.jpg").astype(int) - (255, 0, 0)).max() <= 4


def test_float_images_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((20, 20), dtype=np.float32))
    image.save(tmp_path / "depth.tiff")
    with pytest.raises(ImageError, match=r"depth\.tiff holds floats, whose range is not known"):
        read_image(tmp_path / "depth.tiff", str(tmp_path / "depth.tiff"))
    with pytest.raises(ImageError, match="image 3 holds floats"):
        read_image(image, "image 3")


# What cannot be read


def truncated(kind: str) -> bytes:
    data = encoded(random_image(0, 200, 200), kind)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jpg", truncated("JPEG")),
        ("cut.png", truncated("PNG")),
        ("cut.tif", truncated("TIFF")),
        ("cut.webp", truncated("WEBP")),
        ("empty.png", b""),
        ("notes.png", b"this is not an image\n" * 50),
        ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name} cannot be read as an image: \S+"):
        read_image(path, str(path))


def test_a_damaged_image_opened_by_the_caller_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(truncated("JPEG"))
    with pytest.raises(ImageError, match="image 7 cannot be decoded"):
        read_image(Image.open(tmp_path / "cut.jpg"), "image 7")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 20, height: int = 20) -> bytes:
    """A PNG file, with chunks of one's own before the pixels and the end."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(20 * (3 * 20 + 1)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "kind_of_error"),
    [
        (png(chunk(b"IDAT", b""), chunk(b"\0\1\2\3", b"")), SyntaxError),
        (png(width=0), UnidentifiedImageError),
        (png(chunk(b"IDAT", b"junk")), OSError),
    ],
    ids=["no chunk", "no width", "no pixels"],
)
def test_every_way_in_which_pillow_reports_damage_is_named(
    tmp_path: Path, content: bytes, kind_of_error: type[Exception]
) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(png())
    assert read_image(path, str(path)).size == (20, 20)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"odd\.png cannot be") as caught:
        read_image(path, str(path))
    assert isinstance(caught.value.__cause__, kind_of_error)


LONG_TEXT = zlib.compress(bytes(2 << 20))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (chunk(b"zTXt", b"note\0\0" + LONG_TEXT), "metadata that cannot be read (Decompressed data too large"),
        (chunk(b"iTXt", b"note\0\1\0\0\0" + LONG_TEXT), "metadata that cannot be read (Decompressed data too large"),
        (chunk(b"tRNS", b"?"), "metadata that cannot be read ("),
        (chunk(b"eXIf", b"junk"), "EXIF data that cannot be read (not a TIFF file"),
        (chunk(b"eXIf", b"MM\0*"), "EXIF data that cannot be read (unpack requires"),
    ],
    ids=["much zTXt", "much iTXt", "short transparency", "no EXIF", "cut EXIF"],
)
@pytest.mark.parametrize("before", [True, False], ids=["before the pixels", "after them"])
def test_a_png_whose_metadata_alone_are_damaged_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metadata: bytes, message: str, before: bool
) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    whole = encoded(Image.fromarray(grey), "PNG")
    place = 33 if before else len(whole) - 12  # after the header, or before the end
    path = tmp_path / "odd.png"
    path.write_bytes(whole[:place] + metadata + whole[place:])
    for source in (path, path.read_bytes()):
        caplog.clear()
        np.testing.assert_array_equal(pixels_of(source, "odd.png"), np.stack([grey] * 3, axis=-1))
        assert f"odd.png has {message}" in caplog.text


def test_a_png_whose_text_has_a_wrong_checksum_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(random_image(3), "PNG")
    wrong = chunk(b"tEXt", b"note\0x")[:-4] + b"oops"
    np.testing.assert_array_equal(pixels_of(data[:33] + wrong + data[33:], "odd.png"), np.asarray(random_image(3)))
    assert "odd.png has metadata that cannot be read (" in caplog.text


def test_what_is_left_out_with_damaged_metadata_is_not_the_orientation(tmp_path: Path) -> None:
    whole = encoded(random_image(3, width=30, height=20), "PNG", exif=with_orientation(6))
    data = whole[:33] + chunk(b"zTXt", b"note\0\0" + LONG_TEXT) + whole[33:]
    np.testing.assert_array_equal(pixels_of(data), np.rot90(np.asarray(random_image(3, width=30, height=20)), -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*"])
def test_damaged_exif_of_any_format_is_passed_over_with_a_warning(
    caplog: pytest.LogCaptureFixture, kind: str, exif: bytes
) -> None:
    image = Image.new("RGB", (30, 20), "#646464")
    pixels = pixels_of(encoded(image, kind, exif=exif), f"image.{kind}")
    assert pixels.shape == (20, 30, 3) and np.abs(pixels.astype(int) - 100).max() <= 3
    assert f"image.{kind} has EXIF data that cannot be read" in caplog.text


def test_an_orientation_is_applied_though_other_exif_data_are_damaged() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif += struct.pack("<HHII", 0x010F, 2, 65535, 65535) + bytes(4)
    image = random_image(3, width=30, height=20)
    pixels = pixels_of(encoded(image, "WEBP", lossless=True, exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(image), -1))


# Several pages and frames


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_of_several_pages_or_frames_the_first_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("#646464", "#c80000", "#00c800")]
    path = tmp_path / "film"
    frames[0].save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels_of(path, "film")
    assert caplog.text == ""
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    for source, name in ((path, str(path)), (path.read_bytes(), "film")):
        caplog.clear()
        assert np.abs(pixels_of(source, name).astype(int) - 100).max() <= 3
        assert caplog.messages == [f"{name} has several pages or frames (3): only the first is read"]


def test_a_damaged_second_page_is_no_reason_to_lose_the_first(caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(encoded(random_image(0, 30, 20), "TIFF"))
    directory = struct.unpack_from("<I", data, 4)[0]
    end = directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0]
    data[end : end + 4] = struct.pack("<I", 20)  # where there is no page
    np.testing.assert_array_equal(pixels_of(bytes(data), "a.tif"), np.asarray(random_image(0, 30, 20)))
    assert caplog.messages == ["a.tif has several pages or frames (one is damaged): only the first is read"]


def test_a_jpeg_with_a_second_picture_is_the_first_alone(caplog: pytest.LogCaptureFixture) -> None:
    """So phones store a picture's depth or brightness beside it."""
    first, second = Image.new("RGB", (30, 20), "#646464"), Image.new("RGB", (30, 20))
    pixels = pixels_of(encoded(first, "MPO", save_all=True, append_images=[second]))
    assert np.abs(pixels.astype(int) - 100).max() <= 3
    assert caplog.text == ""


def dds_of_unknown_pixels() -> bytes:
    header = struct.pack("<7I44x", 124, 0x1007, 20, 20, 80, 0, 1) + struct.pack("<8I", 32, 0, 0, 0, 0, 0, 0, 0)
    return b"DDS " + header + bytes(20) + bytes(1600)


def damaged_avif() -> bytes:
    data = encoded(random_image(0), "AVIF")
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(len(data) - start)


@pytest.mark.parametrize("kind", ["DDS", "AVIF"])
def test_damage_that_pillow_reports_as_a_runtime_error_is_named(tmp_path: Path, kind: str) -> None:
    """Pillow goes by the content, not by the name: these formats also come as ``.png`` and ``.jpg``."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("needs a Pillow with AVIF (pip install 'pillow>=11.3')")
    path = tmp_path / "image.png"
    path.write_bytes(dds_of_unknown_pixels() if kind == "DDS" else damaged_avif())
    with pytest.raises(ImageError, match=r"image\.png cannot be"):
        read_image(path, str(path))


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width=60000, height=60000))
    with pytest.raises(ImageError, match=r"bomb\.png is refused.*too much memory.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_image(path, str(path))


def test_the_bomb_limit_is_the_one_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    random_image(0, 40, 40).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ImageError, match=r"image\.png is refused"):
        read_image(path, str(path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path, str(path)).size == (40, 40)


@pytest.mark.parametrize("make", [str, Path])
def test_a_missing_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    with pytest.raises(MissingPathError, match=r"no such image: .*missing\.png") as caught:
        read_image(make(tmp_path / "missing.png"), "name")
    assert isinstance(caught.value, (ImageError, FileNotFoundError))


def test_a_dangling_link_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(MissingPathError, match=r"link\.png"):
        read_image(tmp_path / "link.png", "name")


def test_a_folder_where_an_image_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"{tmp_path.name} is a folder, expected an image"):
        read_image(tmp_path, "name")


@pytest.mark.parametrize("text", ["a" * 5000, "no\0file.png"])
def test_a_text_that_cannot_be_a_path(text: str) -> None:
    with pytest.raises(ImageError):
        read_image(text, "name")
    with pytest.raises(InputError):
        read_image(next(iter(named_sources(text)[0]))[0], "name")


@pytest.mark.parametrize("source", [None, 5, [1, 2], object()])
def test_other_types_are_named(source: object) -> None:
    with pytest.raises(ImageError, match=rf"image 2 is a {type(source).__name__}, expected a path"):
        read_image(source, "image 2")


@pytest.mark.parametrize("shape", [(), (9,), (12, 9, 2), (12, 9, 5), (12, 9, 0), (1, 12, 9, 3), (3, 12, 9)])
def test_array_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"image 1 is an array of shape \(.*\), expected \(H, W\)"):
        read_image(np.zeros(shape, dtype=np.uint8), "image 1")


@pytest.mark.parametrize("shape", [(2, 12, 9), (5, 12, 9), (0, 12, 9), (12, 9, 3)])
def test_tensor_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"image 1 is a tensor of shape \(.*\), expected \(1 or 3 or 4, H, W\)"):
        read_image(torch.zeros(shape, dtype=torch.uint8), "image 1")


@pytest.mark.parametrize("shape", [(0, 9, 3), (12, 0), (0, 0), (12, 0, 1)])
def test_array_without_a_pixel(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="image 1 is an array of shape .*without a pixel"):
        read_image(np.zeros(shape, dtype=np.uint8), "image 1")


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int16", "int8", "uint32", "bool", "object"])
def test_array_of_a_wrong_dtype(dtype: str) -> None:
    with pytest.raises(ImageError, match=f"image 1 is an array of {dtype}, expected uint8 or uint16"):
        read_image(np.zeros((12, 9, 3), dtype=dtype), "image 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8, torch.bool])
def test_tensor_of_a_wrong_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ImageError, match=f"image 1 is a tensor of {dtype}, expected uint8"):
        read_image(torch.zeros(3, 12, 9, dtype=dtype), "image 1")


@QUICK
@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_any_array_is_read_or_refused(array: np.ndarray) -> None:
    try:
        pixels = pixels_of(array)
    except ImageError:
        return
    assert array.dtype.kind == "u" and array.dtype.itemsize <= 2  # of either byte order
    assert pixels.shape == (*array.shape[:2], 3)


ORIENTED = {"exif": with_orientation(6)}
SEEDS = [
    encoded(random_image(0, 24, 20), "PNG", **ORIENTED),
    encoded(random_image(0, 24, 20).convert("P"), "PNG", transparency=3),
    encoded(Image.fromarray(GREY_16[:20, :24]), "PNG"),
    encoded(random_image(0, 24, 20), "JPEG", **ORIENTED),
    encoded(random_image(0, 24, 20).convert("CMYK"), "JPEG", progressive=True),
    encoded(random_image(0, 24, 20), "TIFF", **ORIENTED),
    encoded(random_image(0, 24, 20), "WEBP", **ORIENTED),
    encoded(random_image(0, 24, 20), "BMP"),
    encoded(random_image(0, 24, 20), "GIF"),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "image.png"


def read_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sources: list[object] = [path]
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # damaged heads ask for much memory
        with contextlib.suppress(Exception):
            sources.append(Image.open(path))
        for source in sources:
            try:
                image = read_image(source, path.name)
            except ImageError as error:
                assert path.name in str(error)
            else:
                assert image.mode == "RGB"


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused_by_name(scratch: Path, content: bytes) -> None:
    read_or_refuse(scratch, content)


@FUZZ
@given(data=st.data())
def test_mutated_files_are_read_or_refused_by_name(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        # Two of three changes hit the head, where the sizes and tags are.
        start = data.draw(st.integers(0, min(len(content), 160)) | st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    read_or_refuse(scratch, bytes(content))


@FUZZ
@given(data=st.data())
def test_cut_files_are_read_or_refused_by_name(scratch: Path, data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(SEEDS))
    read_or_refuse(scratch, content[: data.draw(st.integers(0, len(content)))])


# Folders


def test_a_folder_is_listed_in_order_and_below(image_folder: Path) -> None:
    names = [path.relative_to(image_folder).as_posix() for path in list_images(image_folder)]
    assert names == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
    assert list_images(str(image_folder)) == list_images(image_folder)


def test_what_is_hidden_or_no_image_is_passed_over(image_folder: Path) -> None:
    expected = list_images(image_folder)
    (image_folder / ".cache").mkdir()
    (image_folder / "folder.png").mkdir()
    for name in (".cache/a.png", ".hidden.png", "notes.txt", "map.npz", "png"):
        random_image(0).save(image_folder / name, "PNG")
    (image_folder / "gone.png").symlink_to(image_folder / "nowhere.png")
    assert list_images(image_folder) == expected


def test_a_folder_below_a_hidden_one_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden" / "images"
    folder.mkdir(parents=True)
    random_image(0).save(folder / "0.png")
    assert list_images(folder) == [folder / "0.png"]


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    for list_or_name in (list_images, named_sources):
        with pytest.raises(InputError, match=rf"no images in {tmp_path}: expected files ending in .*\.png"):
            list_or_name(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"no such folder: .*nowhere"):
        list_images(tmp_path / "nowhere")


# Sources and their names


def drained(images: object) -> tuple[list[object], list[str], int | None]:
    pairs, total = named_sources(images)
    pairs = list(pairs)
    return [source for source, _ in pairs], [name for _, name in pairs], total


def test_a_folder_as_images(image_folder: Path) -> None:
    paths = list_images(image_folder)
    for folder in (image_folder, str(image_folder)):
        assert drained(folder) == (paths, [str(path) for path in paths], 5)


def test_one_path_as_images(image_folder: Path) -> None:
    path = image_folder / "0.png"
    for single in (path, str(path)):
        assert drained(single) == ([path], [str(path)], 1)


def test_a_missing_path_is_named_when_it_is_read(tmp_path: Path) -> None:
    sources, _, total = drained(tmp_path / "missing.png")
    assert total == 1
    with pytest.raises(MissingPathError, match=r"missing\.png"):
        read_image(sources[0], "name")


@pytest.mark.parametrize(
    "single",
    [
        random_image(0),
        np.zeros((9, 9), dtype=np.uint8),
        np.zeros((9, 9, 3), dtype=np.uint8),
        torch.zeros(3, 9, 9, dtype=torch.uint8),
        torch.zeros(9, 9, dtype=torch.uint8),
    ],
)
def test_a_single_image_is_not_taken_apart(single: object) -> None:
    sources, names, total = drained(single)
    assert sources[0] is single
    assert (len(sources), names, total) == (1, ["the image"], 1)


def test_four_axes_are_a_batch() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 12, 9, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for batch in (array, tensor):
        sources, names, total = drained(batch)
        assert (names, total) == (["image 0", "image 1", "image 2"], 3)
        for source, expected in zip(sources, array, strict=True):
            np.testing.assert_array_equal(pixels_of(source), expected)


def test_a_mixed_list_names_paths_and_places(tmp_path: Path) -> None:
    images = [random_image(0), tmp_path / "a.png", str(tmp_path / "b.png"), np.zeros((9, 9), dtype=np.uint8)]
    sources, names, total = drained(images)
    assert all(a is b for a, b in zip(sources, images, strict=True))
    assert names == ["image 0", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "image 3"]
    assert total == 4


def test_generators_are_read_lazily() -> None:
    read = []

    def images() -> Iterator[Image.Image]:
        for number in range(5):
            read.append(number)
            yield random_image(number)

    pairs, total = named_sources(images())
    assert total is None and read == []
    iterator = iter(pairs)
    assert next(iterator)[1] == "image 0" and read == [0]
    assert next(iterator)[1] == "image 1" and read == [0, 1]


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 9, 9, 3), np.uint8), torch.zeros(0, 3, 9, 9)])
def test_no_images(nothing: object) -> None:
    with pytest.raises(InputError, match="no images were given"):
        named_sources(nothing)


@pytest.mark.parametrize("images", [None, 5, 1.5, object()])
def test_what_holds_no_images(images: object) -> None:
    with pytest.raises(InputError, match=f"got {type(images).__name__} as images, expected paths, a folder"):
        named_sources(images)


def test_names() -> None:
    assert name_of(Path("a") / "b.png") == os.path.join("a", "b.png")
    assert name_of(random_image(0)) == "the image"
    assert name_of(random_image(0), 4) == "image 4"


def test_bytes_of_a_file_are_read_as_the_file_is(tmp_path: Path) -> None:
    random_image(3).save(tmp_path / "image.png")
    decoded = read_image((tmp_path / "image.png").read_bytes(), "image.png in a zip")
    assert np.array_equal(np.asarray(decoded), np.asarray(read_image(tmp_path / "image.png", "image")))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
def test_a_file_in_memory_is_an_image_wherever_images_are_taken(wrap: Callable[[bytes], object]) -> None:
    data = encoded(random_image(3), "PNG")
    expected = np.asarray(random_image(3))
    np.testing.assert_array_equal(pixels_of(wrap(data)), expected)
    sources, names, total = drained(wrap(data))
    assert (sources, names, total) == ([data], ["the image"], 1)
    sources, names, total = drained([wrap(data), ("mine", wrap(data))])
    assert (names, total) == (["image 0", "mine"], 2)
    for source in sources:
        np.testing.assert_array_equal(pixels_of(source), expected)


def test_an_open_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    random_image(3).save(tmp_path / "image.png")
    with (tmp_path / "image.png").open("rb") as file:
        file.read(10)
        np.testing.assert_array_equal(pixels_of(file), np.asarray(random_image(3)))
        assert drained([file, file])[1] == ["image 0", "image 1"]
    with pytest.raises(ImageError, match="image 3 cannot be read: .*closed file"):
        read_image(file, "image 3")
    (tmp_path / "note.txt").write_text("no image")
    with (tmp_path / "note.txt").open() as file, pytest.raises(ImageError, match=r"image 3 is open as text, .*'rb'"):
        read_image(file, "image 3")


def test_bytes_that_are_no_image_are_refused_by_name() -> None:
    with pytest.raises(ImageError, match=r"image.png in a zip cannot be read as an image"):
        read_image(b"no image", "image.png in a zip")
