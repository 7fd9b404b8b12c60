"""Views: what chance may change and what not, the authors' patch labels, and numbers equal to those of test time."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import Preprocessor
from tests.conftest import GOLDEN, random_image
from training.views import TwoViews, normalize, patch_labels_by_count, patch_labels_nearest

QUICK = settings(max_examples=60, deadline=None, database=None)
CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1,), image_size=32)
PHOTO = Image.open(GOLDEN / "photo.png").convert("RGB")
SEEDS = 300


def both_views(image: Image.Image) -> Tensor:
    """Two views for each of many seeds, (2 * SEEDS, 3, S, S)."""
    return torch.cat([TwoViews(CONFIG)(image, None, seed).images for seed in range(SEEDS)])


def share(of: Tensor) -> float:
    return of.float().mean().item()


# Chance


def test_views_follow_from_the_seed_alone() -> None:
    views = TwoViews(CONFIG)
    expected = [views(PHOTO, None, seed).images for seed in range(20)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda seed: views(PHOTO, None, seed).images, range(20)))
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len({one.numpy().tobytes() for one in expected}) == 20
    assert sum(not torch.equal(*one) for one in expected) >= 18  # 1 of 150 images is unchanged twice, by chance


def test_brightness_of_a_grey_image_is_jittered_as_published() -> None:
    # Contrast, saturation, hue, greying and blur leave one level of grey as it is.
    level = both_views(Image.new("RGB", (40, 40), (100, 100, 100)))[:, :, 5, 5]
    assert (level == level[:, :1]).all()
    assert 0.15 < share(level[:, 0] == 100) < 0.25
    assert level.min() in (60, 61, 62) and level.max() in (138, 139, 140)
    assert 0.4 < share(level[:, 0] > 100) / 0.8 < 0.6


def test_a_fifth_of_the_views_is_grey() -> None:
    corner = both_views(Image.new("RGB", (40, 40), (120, 60, 30)))[:, :, 0, 0].int()
    assert 0.15 < share((corner == corner[:, :1]).all(dim=1)) < 0.25


def test_hue_and_saturation_change_little() -> None:
    corner = both_views(Image.new("RGB", (40, 40), (150, 50, 50)))[:, :, 0, 0].numpy()
    hsv = np.array(Image.fromarray(corner[None]).convert("HSV"))[0].astype(int)
    coloured = hsv[hsv[:, 1] > 40]
    hue = (coloured[:, 0] + 128) % 256 - 128
    assert -27 <= hue.min() < -22 and 22 < hue.max() <= 27  # a tenth of the circle of 256


def test_half_of_the_views_is_blurred() -> None:
    halves = Image.new("RGB", (32, 32))
    halves.paste((255, 255, 255), (0, 0, 16, 32))
    rows = both_views(halves)[:, 0, 16]
    blurred = torch.tensor([len(row.unique()) > 2 for row in rows])
    assert 0.4 < share(blurred) < 0.55  # the weakest blurs do not show in 8 bits
    widths = [int(((row > row.min()) & (row < row.max())).sum()) for row in rows]
    assert max(widths) in range(8, 15)  # sigma 2


# Geometry


def test_views_keep_the_geometry_of_test_time() -> None:
    prepared = Preprocessor(CONFIG).prepare(PHOTO).tensor
    unchanged = [
        view
        for seed in range(100)
        for view in TwoViews(CONFIG)(PHOTO, None, seed).images
        if torch.equal(normalize(view, CONFIG.mean, CONFIG.std), prepared)
    ]
    assert 6 <= len(unchanged) <= 30  # 8 % of the views: neither jitter nor grey nor blur


def test_the_first_view_can_be_left_as_it_is_at_test_time() -> None:
    image = random_image(2)
    views = TwoViews(CONFIG, plain_first=True)(image, None, 7).images
    prepared = normalize(views, CONFIG.mean, CONFIG.std)
    assert torch.equal(prepared[0], Preprocessor(CONFIG).prepare(image).tensor)
    assert not torch.equal(prepared[1], prepared[0])


def test_no_view_is_moved_or_turned() -> None:
    quarter = Image.new("RGB", (32, 32))
    quarter.paste((255, 255, 255), (0, 0, 20, 12))
    views = both_views(quarter)[:, 0].float()
    middle = (views.amin(dim=(1, 2), keepdim=True) + views.amax(dim=(1, 2), keepdim=True)) / 2
    inner = views[:, 2:, 2:] > middle  # what a blur rounds off lies at the corner
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:12, :20] = True
    assert (inner != expected[2:, 2:]).sum(dim=(1, 2)).max() <= 4


@QUICK
@given(width=st.integers(32, 90), height=st.integers(32, 90), seed=st.integers(0, 2**63))
def test_mask_is_cut_out_like_the_image(width: int, height: int, seed: int) -> None:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[height // 3 : 2 * height // 3, width // 4 :] = 1 + seed % 255
    mask = TwoViews(CONFIG)(random_image(0, width, height), Image.fromarray(pixels), seed).mask
    cropped = np.asarray(
        Preprocessor(CONFIG).crop(Image.fromarray(pixels).point(lambda value: 255 * (value > 0)).convert("RGB"))
    )[..., 0]
    sure = (cropped < 64) | (cropped > 192)
    assert mask.shape == (32, 32) and mask.dtype == torch.bool and sure.mean() > 0.7
    np.testing.assert_array_equal(mask.numpy()[sure], cropped[sure] > 128)


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image, mask = random_image(0, 32, 32), Image.fromarray(np.eye(32, dtype=np.uint8))
    views = [TwoViews(CONFIG)(image, mask, seed) for seed in range(60)]
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert any(torch.equal(view, original) for one in views for view in one.images)
    assert all(torch.equal(one.mask, torch.eye(32).bool()) for one in views)


def test_an_image_without_a_mask_is_normal() -> None:
    mask = TwoViews(CONFIG)(PHOTO, None, 0).mask
    assert mask.shape == (32, 32) and not mask.any()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ImageError, match=r"the mask is 30 x 20 pixels, its image \(310, 270\)"):
        TwoViews(CONFIG)(PHOTO, Image.new("L", (30, 20)), 0)


# Numbers and labels


@pytest.mark.parametrize(("preset", "key"), [("dinov2-base", "imagenet"), ("clip-base", "clip")])
def test_normalised_pixels_are_the_authors(golden: dict[str, Tensor], preset: str, key: str) -> None:
    config = ADPretrainConfig.preset(preset)
    pixels = torch.from_numpy(np.array(Preprocessor(config).crop(PHOTO))).permute(2, 0, 1)
    normalized = normalize(pixels.expand(2, 1, -1, -1, -1), config.mean, config.std)
    assert normalized.shape == (2, 1, 3, 224, 224) and normalized.dtype == torch.float32
    torch.testing.assert_close(normalized[1, 0], golden[f"preprocess.{key}"], atol=1e-6, rtol=0)
    torch.testing.assert_close(normalized[0, 0], Preprocessor(config).prepare(PHOTO).tensor, atol=0, rtol=0)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_labels_by_count_are_the_authors(golden: dict[str, Tensor], patch_size: int) -> None:
    labels = patch_labels_by_count(golden["mask.pixels"][:, 0].bool(), patch_size)
    assert labels.dtype == torch.bool and torch.equal(labels, golden[f"mask.patch{patch_size}"].bool())


def test_nearest_labels_are_the_authors(golden: dict[str, Tensor]) -> None:
    labels = patch_labels_nearest(golden["mask.pixels"][:, 0].bool(), (16, 16))
    assert labels.dtype == torch.bool and torch.equal(labels, golden["mask.nearest16"].bool())


@pytest.mark.parametrize("count", [32, 33])
def test_a_patch_is_anomalous_above_the_threshold(count: int) -> None:
    mask = torch.zeros(1, 28, 42, dtype=torch.bool)
    rows, columns = torch.arange(count) // 14 + 14, torch.arange(count) % 14 + 14
    mask[0, rows, columns] = True
    expected = torch.zeros(1, 2, 3, dtype=torch.bool)
    expected[0, 1, 1] = count > 32
    assert torch.equal(patch_labels_by_count(mask, 14), expected)


def test_masks_that_are_no_whole_patches_are_refused() -> None:
    with pytest.raises(InputError, match=r"30 x 28 pixels, expected multiples of the patch size 14"):
        patch_labels_by_count(torch.zeros(1, 30, 28, dtype=torch.bool), 14)
