"""Augmentation: what Pillow makes of the same numbers, what chance may change, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as adjust

from adpretrain_hf.images import to_pixels
from tests.conftest import GOLDEN, random_image
from training.data.augment import augment, draw_augmentation

PHOTO = to_pixels(Image.open(GOLDEN / "photo.png").convert("RGB").resize((64, 64)))
JITTERS = (adjust.adjust_brightness, adjust.adjust_contrast, adjust.adjust_saturation, adjust.adjust_hue)
UNCHANGED = [0, 1, 2, 3, 1, 1, 1, 0, 0, 0]
SEEDS = 300


def views_of(*colour: int, draw: Callable = draw_augmentation) -> Tensor:
    """Two views of a plain image for each of many seeds, (2 * SEEDS, 3, 8, 8)."""
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(SEEDS, 3, 8, 8)
    return augment(image, torch.stack([draw(np.random.default_rng(seed)) for seed in range(SEEDS)]))


def share(of: Tensor) -> float:
    return of.float().mean().item()


def with_pillow(pixels: Tensor, drawn: Tensor) -> Tensor:
    """One view, operation by operation as torchvision makes it of a PIL image, with Pillow's blur."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for kind in drawn[:4].int().tolist():
        if drawn[4 + kind] != UNCHANGED[4 + kind]:
            image = JITTERS[kind](image, float(drawn[4 + kind]))
    if drawn[8]:
        image = adjust.rgb_to_grayscale(image, num_output_channels=3)
    if drawn[9]:
        image = image.filter(ImageFilter.GaussianBlur(float(drawn[9])))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_views_are_those_that_pillow_makes_of_the_same_numbers() -> None:
    drawn = torch.stack([draw_augmentation(np.random.default_rng(seed)) for seed in range(40)])
    got = augment(PHOTO.expand(40, -1, -1, -1), drawn)
    for number, view in enumerate(got):
        difference = (view - with_pillow(PHOTO, drawn[number % 40, number // 40])).abs()
        assert difference.mean() < 2.5  # of 255: Pillow rounds after each of up to six operations, and twice for a hue


@pytest.mark.parametrize(("kind", "strength"), [(0, 0.6), (0, 1.4), (1, 0.7), (1, 1.3), (2, 0.6), (2, 1.4)])
def test_one_operation_differs_from_pillows_by_its_rounding(kind: int, strength: float) -> None:
    drawn = torch.tensor([UNCHANGED, UNCHANGED])
    drawn = drawn.float()
    drawn[1, 4 + kind] = strength
    first, second = augment(PHOTO[None], drawn[None])
    assert torch.equal(first, PHOTO.float())
    difference = (second - with_pillow(PHOTO, drawn[1])).abs()
    assert difference.max() < 1.6


def test_views_are_of_float32_whatever_autocast_says() -> None:
    drawn = torch.stack([draw_augmentation(np.random.default_rng(seed)) for seed in range(10)])
    plain = augment(PHOTO.expand(10, -1, -1, -1), drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(PHOTO.expand(10, -1, -1, -1), drawn), plain)


@pytest.mark.parametrize("strength", [-0.1, 0.03, 0.1])
def test_hues_are_turned_as_torchvision_turns_them(strength: float) -> None:
    drawn = torch.tensor([[UNCHANGED, [*UNCHANGED[:7], strength, 0, 0]]], dtype=torch.float32)
    expected = 255 * adjust.adjust_hue(PHOTO / 255, strength)  # of floats: Pillow knows 256 hues
    torch.testing.assert_close(augment(PHOTO[None], drawn)[1], expected, atol=0.01, rtol=0)


def test_views_follow_from_the_generator_alone() -> None:
    draws = [draw_augmentation(np.random.default_rng(seed)) for seed in range(20)]
    torch.rand(3)
    again = [draw_augmentation(np.random.default_rng(seed)) for seed in range(20)]
    assert all(map(torch.equal, draws, again))
    assert len({one.numpy().tobytes() for one in draws}) == 20
    together = augment(PHOTO.expand(20, -1, -1, -1), torch.stack(draws))
    for number in (0, 7, 19):
        alone = augment(PHOTO[None], draws[number][None])
        torch.testing.assert_close(together[[number, 20 + number]], alone)


def test_brightness_of_a_grey_image_is_jittered_as_published() -> None:
    # Contrast, saturation, hue, greying and blur leave one level of grey as it is.
    views = views_of(100, 100, 100)
    assert float((views - views[:, :1, :1, :1]).abs().max()) < 1e-3
    level = views[:, 0, 0, 0]
    assert 0.15 < share((level - 100).abs() < 1e-3) < 0.25
    assert 60 <= level.min() < 62 and 138 < level.max() <= 140
    assert 0.4 < share(level > 100.001) / 0.8 < 0.6


def test_a_fifth_of_the_views_is_grey() -> None:
    corner = views_of(120, 60, 30)[:, :, 0, 0]
    assert 0.15 < share((corner - corner[:, :1]).abs().amax(dim=1) < 1e-3) < 0.25


def test_hue_changes_by_a_tenth_of_the_circle_at_most() -> None:
    corner = views_of(150, 50, 50)[:, :, 0, 0].round().byte().numpy()
    hsv = np.array(Image.fromarray(corner[None]).convert("HSV"))[0].astype(int)
    hue = (hsv[hsv[:, 1] > 40][:, 0] + 128) % 256 - 128
    assert -27 <= hue.min() < -22 and 22 < hue.max() <= 27  # of 256


def test_half_of_the_views_is_blurred_and_nothing_moves() -> None:
    halves = torch.zeros(SEEDS, 3, 32, 32, dtype=torch.uint8)
    halves[..., 16:] = 255
    views = augment(halves, torch.stack([draw_augmentation(np.random.default_rng(seed)) for seed in range(SEEDS)]))
    rows = views[:, 0, 16]
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    between = ((rows > low + 1) & (rows < high - 1)).sum(dim=1)
    assert 0.35 < share(between > 0) < 0.55  # the weakest blurs do not show
    assert between.max() in range(6, 15)  # sigma 2
    assert torch.equal(rows > (low + high) / 2, halves[0, 0, :1].bool().expand(len(rows), -1))


def test_the_first_view_can_be_left_as_it_is_at_test_time() -> None:
    drawn = draw_augmentation(np.random.default_rng(1), plain_first=True)
    first, second = augment(to_pixels(random_image(2, 40, 40))[None], drawn[None])
    assert torch.equal(first, to_pixels(random_image(2, 40, 40)).float())
    assert not torch.equal(second, first)
