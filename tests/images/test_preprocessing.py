"""Preparing images: the published preparation to the digit, sizes, boxes, and what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainConfig, ADPretrainFeatureExtractor
from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images import Preprocessor, check_prepared, digests, is_prepared, normalize, stack
from adpretrain_hf.images.preprocessing import MAX_ASPECT_RATIO
from adpretrain_hf.scoring import place_map
from tests.conftest import GOLDEN, random_image

QUICK = settings(max_examples=60, deadline=None, database=None)
PHOTO = GOLDEN / "photo.png"
CROP = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1,), image_size=32, resize_mode="crop")
RESIZE = CROP.replace(resize_mode="resize")

AS: dict[str, Callable[[Path], object]] = {
    "path": lambda path: path,
    "text": str,
    "PIL image": Image.open,
    "array": lambda path: np.array(Image.open(path)),
    "array (B, H, W, C)": lambda path: np.array(Image.open(path))[None],
    "tensor": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
    "tensor (B, C, H, W)": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None],
    "list": lambda path: [path],
    "generator": lambda path: (one for one in [path]),
}


def uint8_pixels(tensor: Tensor, config: ADPretrainConfig) -> np.ndarray:
    """The 8-bit image (H, W, 3) that a prepared one was made of."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    pixels = (tensor * std + mean) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-3
    return pixels.round().permute(1, 2, 0).numpy().astype(np.uint8)


# The published preparation


@pytest.mark.parametrize("kind", AS)
@pytest.mark.parametrize(("preset", "key"), [("dinov2-base", "imagenet"), ("clip-base", "clip")])
def test_preparation_is_the_authors(golden: dict[str, Tensor], preset: str, key: str, kind: str) -> None:
    prepared = Preprocessor(ADPretrainConfig.preset(preset))(AS[kind](PHOTO))
    assert prepared.shape == (1, 3, 224, 224) and prepared.dtype == torch.float32
    torch.testing.assert_close(prepared[0], golden[f"preprocess.{key}"], atol=1e-6, rtol=0)


def test_a_stored_orientation_makes_no_difference(golden: dict[str, Tensor], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.open(PHOTO).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    prepared = Preprocessor(ADPretrainConfig.preset("dinov2-base"))(tmp_path / "turned.png")
    torch.testing.assert_close(prepared[0], golden["preprocess.imagenet"], atol=1e-6, rtol=0)


def test_a_folder_is_one_batch_in_order(image_folder: Path) -> None:
    preprocessor = Preprocessor(CROP)
    batch = preprocessor(image_folder)
    assert batch.shape == (5, 3, 32, 32)
    for row, name in zip(batch, ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"], strict=True):
        torch.testing.assert_close(row, preprocessor(image_folder / name)[0], atol=0, rtol=0)


def test_values_are_scaled_and_normalised() -> None:
    config = CROP.replace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    tensor = Preprocessor(config).prepare(Image.new("RGB", (40, 50), (255, 51, 0))).tensor
    expected = torch.tensor([(1 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (0 - 0.3) / 2.0]).view(3, 1, 1).expand(3, 32, 32)
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)


def test_a_prepared_image_owns_its_memory() -> None:
    array = np.array(random_image(0, 32, 32))
    tensor = Preprocessor(CROP).prepare(array).tensor
    before = array.copy()
    assert tensor.is_contiguous()
    tensor.zero_()
    np.testing.assert_array_equal(array, before)


# Sizes


@QUICK
@example(width=310, height=270)
@example(width=32, height=32)
@example(width=8, height=160)
@given(width=st.integers(8, 160), height=st.integers(8, 160))
def test_crop_takes_the_centre_of_the_resized_image(width: int, height: int) -> None:
    image = random_image(width, width, height)
    prepared = Preprocessor(CROP).prepare(image)
    short = min(width, height)
    new_width, new_height = 32 * width // short, 32 * height // short
    left, top = round((new_width - 32) / 2), round((new_height - 32) / 2)
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(uint8_pixels(prepared.tensor, CROP), resized[top : top + 32, left : left + 32])
    assert prepared.size == (height, width)


@QUICK
@given(width=st.integers(8, 160), height=st.integers(8, 160))
def test_resize_keeps_the_whole_image(width: int, height: int) -> None:
    image = random_image(width, width, height)
    prepared = Preprocessor(RESIZE).prepare(image)
    new_height, new_width = prepared.tensor.shape[1:]
    assert min(new_height, new_width) == 32 and new_height % 8 == new_width % 8 == 0
    long, new_long = max(width, height), max(new_width, new_height)
    assert abs(new_long - 32 * long / min(width, height)) <= 4  # half a patch
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(uint8_pixels(prepared.tensor, RESIZE), resized)
    assert prepared.size == (height, width) and prepared.box == (0, 0, height, width)


@QUICK
@given(width=st.integers(20, 400), height=st.integers(20, 400), size=st.sampled_from([8, 32, 56]))
def test_the_crop_box_is_the_middle_and_all_of_the_shorter_side(width: int, height: int, size: int) -> None:
    top, left, box_height, box_width = (
        Preprocessor(CROP.replace(image_size=size)).prepare(np.zeros((height, width), np.uint8)).box
    )
    short = min(width, height)
    for start, extent, side in ((top, box_height, height), (left, box_width, width)):
        assert (start, extent) == (0, short) if side == short else 0 <= start <= side - extent
        # The longer side was rounded down to whole pixels of the network's input, and is cut at such ones.
        assert short - 1 <= extent <= short + 1 + short / size
        assert abs(start + extent / 2 - side / 2) <= 1 + short / size


@QUICK
@given(data=st.data(), mode=st.sampled_from(["crop", "resize"]), size=st.sampled_from([32, 64, 96]))
def test_a_spot_is_mapped_back_to_where_it_was(data: st.DataObject, mode: str, size: int) -> None:
    width, height = data.draw(st.integers(60, 300)), data.draw(st.integers(60, 300))
    short = min(width, height)
    half = max(3, round(2 * short / size))  # the spot has four pixels of the network's input, or six of the image
    margin_y = (height - short) // 2 + half + 4 if mode == "crop" else half
    margin_x = (width - short) // 2 + half + 4 if mode == "crop" else half
    y = data.draw(st.integers(margin_y, height - margin_y))
    x = data.draw(st.integers(margin_x, width - margin_x))
    array = np.zeros((height, width), np.uint8)
    array[y - half : y + half, x - half : x + half] = 255

    prepared = Preprocessor(CROP.replace(image_size=size, resize_mode=mode)).prepare(array)
    seen = (prepared.tensor[0] - prepared.tensor[0].min()).clamp(min=0)
    placed = place_map(seen, prepared.size, prepared.box).numpy()
    placed[placed < placed.max() / 2] = 0
    assert placed.shape == array.shape
    centre = [(np.indices(placed.shape)[axis] * placed).sum() / placed.sum() for axis in (0, 1)]
    tolerance = 1 + short / size  # a pixel of the image and one of the network's input
    assert abs(centre[0] - (y - 0.5)) <= tolerance and abs(centre[1] - (x - 0.5)) <= tolerance


def test_images_of_different_shapes_do_not_make_one_batch() -> None:
    images = [random_image(0, 48, 40), random_image(1, 90, 40)]
    assert Preprocessor(CROP)(images).shape == (2, 3, 32, 32)
    with pytest.raises(InputError, match=r"different shapes \[\(3, 32, 40\), \(3, 32, 72\)\].*resize_mode='crop'"):
        Preprocessor(RESIZE)(images)


# JPEGs that are reduced while they are decoded


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "filtered"),
    [
        (150, 131, Image.Resampling.BICUBIC),
        (64, 64, Image.Resampling.BICUBIC),
        (288, 520, Image.Resampling.BICUBIC),
        (63, 90, Image.Resampling.BICUBIC),
        (376, 400, Image.Resampling.BICUBIC),
        (384, 400, Image.Resampling.HAMMING),  # an eighth is 48 x 50, to be reduced by 1.5 to 32
        (4000, 3000, Image.Resampling.HAMMING),
    ],
)
@pytest.mark.parametrize("config", [CROP, RESIZE])
def test_a_fast_jpeg_is_the_draft_of_pillow_resized_to_the_same_place(
    config: ADPretrainConfig, width: int, height: int, filtered: Image.Resampling
) -> None:
    # Of half the contrast: Pillow clips between its two passes, the order of which depends on what is cut out.
    soft = random_image(0, width // 12, height // 12).point(lambda value: 64 + value // 2)
    data = jpeg(soft.resize((width, height), Image.Resampling.BICUBIC))
    exact, fast = (Preprocessor(config.replace(decode=how)).prepare(data) for how in ("exact", "fast"))
    assert (fast.size, fast.box, fast.pixels.shape) == (exact.size, exact.box, exact.pixels.shape)
    draft = Image.open(io.BytesIO(data))
    _, whole = draft.draft("RGB", (32, 32))
    # Of both modes the whole image is resized here, and the crop is taken of it.
    short, patch = min(width, height), config.patch_size
    if config is CROP:
        new_size = (32 * width // short, 32 * height // short)
    else:
        new_size = tuple(round(32 * side / short / patch) * patch for side in (width, height))
    rows, columns = exact.network_size
    left, top = round((new_size[0] - columns) / 2), round((new_size[1] - rows) / 2)
    resized = draft.resize(new_size, filtered, whole).crop((left, top, left + columns, top + rows))
    difference = fast.pixels.permute(1, 2, 0).int() - torch.from_numpy(np.array(resized)).int()
    assert difference.abs().max() <= (1 if config is CROP else 0)  # where a crop begins between two pixels
    assert (fast.pixels.int() - exact.pixels.int()).abs().float().mean() < 2.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_fast_jpeg_is_upright_and_nothing_of_it_is_shifted(orientation: int) -> None:
    """At an eighth, 273 x 265 pixels are 34.1 x 33.1: of a ramp each grey level would show where the rest is."""
    across, down = np.meshgrid(np.linspace(0, 255, 273), np.linspace(0, 255, 265))
    image = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(image, quality=100, exif=exif)
    exact, fast = (Preprocessor(CROP.replace(decode=how)).prepare(data) for how in ("exact", "fast"))
    assert (fast.size, fast.box) == (exact.size, exact.box)
    assert (fast.pixels.int() - exact.pixels.int()).abs().max() <= 3


def test_files_that_are_no_jpegs_are_read_exactly(tmp_path: Path) -> None:
    random_image(0, 400, 300).save(tmp_path / "image.png")
    exact, fast = (Preprocessor(CROP.replace(decode=how)) for how in ("exact", "fast"))
    for source in (tmp_path / "image.png", random_image(0, 400, 300), np.array(random_image(0, 400, 300))):
        assert torch.equal(fast(source), exact(source))


# What is refused


@pytest.mark.parametrize("config", [CROP, RESIZE])
@pytest.mark.parametrize(("width", "height"), [(7, 20), (20, 7), (1, 1), (0, 9)])
def test_smaller_than_a_patch(config: ADPretrainConfig, width: int, height: int) -> None:
    with pytest.raises(ImageError, match=f"image 3 is {width} x {height} pixels, smaller than one patch of 8"):
        Preprocessor(config).prepare(Image.new("RGB", (width, height)), "image 3")
    Preprocessor(config).prepare(Image.new("RGB", (8, 8)), "image 3")


@pytest.mark.parametrize("config", [CROP, RESIZE])
def test_longer_than_twenty_to_one(config: ADPretrainConfig) -> None:
    assert MAX_ASPECT_RATIO == 20
    Preprocessor(config).prepare(Image.new("RGB", (200, 10)), "image 3")
    for size in ((201, 10), (10, 201)):
        with pytest.raises(ImageError, match=rf"image 3 is {size[0]} x {size[1]} pixels, longer than 20 : 1"):
            Preprocessor(config).prepare(Image.new("RGB", size), "image 3")


def test_the_image_that_cannot_be_used_is_named(image_folder: Path) -> None:
    (image_folder / "1.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"1\.png cannot be read as an image"):
        Preprocessor(CROP)(image_folder)
    with pytest.raises(MissingPathError, match=r"no such image: .*nowhere\.png"):
        Preprocessor(CROP)([image_folder / "0.png", image_folder / "nowhere.png"])
    with pytest.raises(ImageError, match="image 1 is an array of float32"):
        Preprocessor(CROP)([random_image(0), np.zeros((40, 40, 3), np.float32)])
    with pytest.raises(ImageError, match="sub is a folder, expected an image"):
        Preprocessor(CROP)([image_folder / "0.png", image_folder / "sub"])


@pytest.mark.parametrize("nothing", [[], iter([]), np.zeros((0, 9, 9, 3), np.uint8)])
def test_nothing_to_prepare(nothing: object) -> None:
    with pytest.raises(InputError, match="no images were given"):
        Preprocessor(CROP)(nothing)


@QUICK
@given(
    shape=st.lists(st.integers(0, 40), min_size=2, max_size=2).map(tuple),
    channels=st.sampled_from([(), (1,), (2,), (3,), (4,)]),
    mode=st.sampled_from(["crop", "resize"]),
)
def test_any_small_image_is_prepared_or_refused_by_name(
    shape: tuple[int, ...], channels: tuple[int, ...], mode: str
) -> None:
    array = np.zeros(shape + channels, np.uint8)
    preprocessor = Preprocessor(CROP.replace(resize_mode=mode))
    if channels == (2,) or min(shape) < 8:
        with pytest.raises(ImageError, match="image 5 is"):
            preprocessor.prepare(array, "image 5")
    else:
        assert preprocessor.prepare(array, "image 5").tensor.isfinite().all()


# Tensors that are already prepared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_prepared_images_pass_unchanged(dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 24).to(dtype)
    assert check_prepared(images, CROP) is images
    assert is_prepared(images)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), np.zeros((1, 3, 8, 8)), "path", [1.0]])
def test_what_is_not_yet_prepared(images: object) -> None:
    assert not is_prepared(images)


@pytest.mark.parametrize("shape", [(3, 16, 16), (16, 16), (), (1, 1, 3, 16, 16), (2, 1, 16, 16), (2, 4, 16, 16)])
def test_prepared_images_with_wrong_axes_or_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"got a float tensor of shape \(.*\), expected \(B, 3, H, W\)"):
        check_prepared(torch.zeros(shape), CROP)


def test_channels_last_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 16, 16, 3\), expected \(B, 3, H, W\)"):
        check_prepared(torch.zeros(2, 16, 16, 3), CROP)


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 17), (0, 16), (16, 0), (4, 4), (8, 4)])
def test_prepared_images_that_patches_do_not_fill(height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"got images of {height} x {width} pixels, .* multiples of the patch size 8"):
        check_prepared(torch.zeros(1, 3, height, width), CROP)


def test_an_empty_prepared_batch() -> None:
    with pytest.raises(InputError, match="got a batch of 0 images, expected at least one"):
        check_prepared(torch.zeros(0, 3, 16, 16), CROP)


@QUICK
@given(
    values=st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf")]), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_one_value_that_is_not_finite_is_enough(values: list[float], data: st.DataObject, dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16).to(dtype)
    for value in values:  # also both infinities, which would cancel out
        images.view(-1)[data.draw(st.integers(0, images.numel() - 1))] = value
    with pytest.raises(InputError, match=r"shape \(2, 3, 16, 16\) hold NaN or infinite values"):
        check_prepared(images, CROP)


def test_large_finite_values_are_no_overflow() -> None:
    half = torch.full((2, 3, 64, 64), 6e4, dtype=torch.float16)
    single = torch.full((2, 3, 64, 64), 3e38)
    for images in (half, single, -half, -single):
        assert check_prepared(images, CROP) is images


PIXELS = torch.from_numpy(np.array(random_image(0, 32, 32))).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("most", "dtype"),
    [(1, torch.float32), (1, torch.float16), (1, torch.float64), (255, torch.float32), (255, torch.bfloat16)],
)
def test_float_pixels_are_not_taken_for_prepared_images(most: int, dtype: torch.dtype) -> None:
    for pixels in (PIXELS, torch.nn.functional.interpolate(PIXELS.float(), size=(24, 24), mode="bilinear")):
        images = pixels.to(dtype) / 255 * most
        with pytest.raises(InputError, match="pixels that are not normalised: normalise them by the extractor's mean"):
            check_prepared(images, CROP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("preset", ["dinov2-base", "clip-base", "siglip"])
def test_a_bright_image_of_little_contrast_is_taken_though_its_values_are_from_0_to_1(
    preset: str, dtype: torch.dtype
) -> None:
    config = CROP.replace(mean=(0.5,) * 3, std=(0.5,) * 3) if preset == "siglip" else ADPretrainConfig.preset(preset)
    array = np.random.default_rng(0).integers(130, 160, (config.image_size, config.image_size, 3), dtype=np.uint8)
    images = Preprocessor(config)(array)
    assert 0 <= images.min() < images.max() <= 1
    assert check_prepared(images.to(dtype), config).dtype == dtype


def test_values_of_one_colour_are_taken_and_so_are_pixels_that_need_no_normalising() -> None:
    for value in (0.0, 0.5, 1.0):
        check_prepared(torch.full((1, 3, 16, 16), value), CROP)
    check_prepared(PIXELS / 255, CROP.replace(mean=(0.0,) * 3, std=(1.0,) * 3))


def test_values_on_another_device_are_not_asked_for() -> None:
    images = torch.empty(1, 3, 16, 16, device="meta")  # whose values nobody has: reading one is an error
    assert check_prepared(images, CROP) is images
    with pytest.raises(InputError, match="multiples of the patch size 8"):
        check_prepared(images[..., :-1], CROP)


def test_the_extractor_checks_prepared_images(extractor: ADPretrainFeatureExtractor) -> None:
    extractor.set_reference(random_image(0))
    good = torch.zeros(1, 3, 32, 32)
    for call in (extractor, extractor.score, extractor.set_reference):
        for images, message in [
            (good[0], r"expected \(B, 3, H, W\)"),
            (good[:0], "batch of 0"),
            (good[:, :2], r"expected \(B, 3, H, W\)"),
            (good[..., :-1], "multiples of the patch size 8"),
            (good / 0, "NaN or infinite"),
            (torch.linspace(0, 1, 3072).view(1, 3, 32, 32), "hold 0 to 1, pixels that are not normalised"),
        ]:
            with pytest.raises(InputError, match=message):
                call(images)


def test_pixels_are_kept_in_8_bits_and_normalised_as_a_batch() -> None:
    preprocessor = Preprocessor(CROP)
    images = [preprocessor.prepare(random_image(seed, 40, 50)) for seed in (1, 2)]
    assert all(image.pixels.dtype == torch.uint8 for image in images)
    batch = stack(images)
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(row, image.tensor)
        assert torch.equal(row, normalize(image.pixels, CROP.mean, CROP.std))
    assert images[0].digest == replace(images[0], pixels=images[0].tensor).digest != images[1].digest


def test_digests_are_those_that_banks_were_stored_with() -> None:
    images = [Preprocessor(CROP).prepare(random_image(seed, 40, 50)) for seed in (1, 2)]
    assert digests(images) == [image.digest for image in images] == ["5d9c50870191dfe4", "6aa001361c0d94bb"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot say which cores a process may use")
def test_images_are_decoded_on_the_cores_that_the_process_may_use() -> None:
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    program += "from adpretrain_hf.images.ahead import THREADS; print(THREADS)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "1"
