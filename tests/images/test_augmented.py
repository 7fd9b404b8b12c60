"""Copies of references: each against what it must be, and what they do in a bank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adpretrain_hf import ReferenceBank
from adpretrain_hf.cli import arguments
from adpretrain_hf.errors import InputError
from adpretrain_hf.images import AUGMENTATIONS, choose_augmentation, with_copies
from tests.conftest import make_extractor, random_image


def wave(height: int, width: int) -> Tensor:
    """A smooth picture (1, 3, H, W) whose value at a pixel is a function of its place."""
    return value(*torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"))


def value(y: Tensor, x: Tensor) -> Tensor:
    return torch.stack([torch.sin(0.11 * x + 0.07 * y), torch.cos(0.05 * x - 0.13 * y), 0.01 * x + 0.02 * y])[None]


def inner(images: Tensor) -> Tensor:
    return images[..., 12:-12, 12:-12]


def test_flips_are_the_picture_in_a_mirror():
    image = torch.randn(2, 3, 6, 8)
    first, *flips = with_copies(image, "flips")
    assert torch.equal(first, image)
    for flipped, dims in zip(flips, ((3,), (2,), (2, 3)), strict=True):
        assert torch.equal(flipped, image.flip(dims))


@pytest.mark.parametrize(("place", "degrees", "zoom"), [(0, 5, 1), (1, -5, 1), (2, 0, 1.08)])
def test_jitter_turns_and_enlarges_about_the_centre(place, degrees, zoom):
    """Whatever the image's shape; counter-clockwise, with y pointing down."""
    height, width = 56, 84
    moved = AUGMENTATIONS["jitter"][place](wave(height, width))
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    sine, cosine = math.sin(math.radians(degrees)) / zoom, math.cos(math.radians(degrees)) / zoom
    expected = value(y * cosine + x * sine + height / 2, x * cosine - y * sine + width / 2)
    torch.testing.assert_close(inner(moved), inner(expected), atol=1e-2, rtol=0)  # bicubic is not exact


def test_jitter_shifts_by_half_a_patch():
    image = torch.randn(1, 3, 28, 42)
    shifted = AUGMENTATIONS["jitter"][3](image)
    torch.testing.assert_close(shifted[..., 7:, 7:], image[..., :-7, :-7], atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted[..., :7, 7:], image[..., :7, :-7].flip(2), atol=1e-4, rtol=0)  # a mirror


def test_what_comes_in_at_a_border_is_mirrored():
    """Black corners would stand in the bank as normal patches."""
    for transform in AUGMENTATIONS["both"]:
        assert torch.allclose(transform(torch.full((1, 3, 28, 42), 2.5)), torch.tensor(2.5))


def test_copies_are_the_same_each_time_and_in_each_batch():
    images = torch.randn(3, 3, 28, 42)
    for together, alone in zip(with_copies(images, "both"), with_copies(images[1:2], "both"), strict=True):
        assert torch.equal(together[1:2], alone)


def test_both_are_flips_and_jitter():
    assert AUGMENTATIONS["both"] == AUGMENTATIONS["flips"] + AUGMENTATIONS["jitter"]


def test_the_command_line_offers_what_there_is():
    assert list(arguments.AUGMENTATIONS) == [*AUGMENTATIONS, "auto"]


@pytest.mark.parametrize("augmentation", ["flips", "both"])
def test_a_flipped_reference_has_residual_zero(extractor, augmentation):
    images = extractor.preprocess([random_image(1), random_image(2)])
    tokens = extractor.encode(images.flip(3))
    for copies, is_zero in ((augmentation, True), ("none", False)):
        bank = extractor.make_reference(images, augment_references=copies)
        lengths = torch.stack([level.norm(dim=1).mean() for level in bank.residuals(tokens)])
        assert bool((lengths < 1e-4).all()) == is_zero


def test_patches_of_copies_follow_those_of_their_image(extractor):
    images = [random_image(1), random_image(2), random_image(3)]
    bank = extractor.make_reference(images, augment_references="jitter", batch_size=2)
    each = len(extractor.make_reference(images[:1]))
    assert (bank.num_images, len(bank)) == (3, 3 * 5 * each)
    views = [extractor.encode(view)[1] for view in with_copies(extractor.preprocess(images), "jitter")]
    expected = torch.stack([view.flatten(2).mT for view in views], dim=1)  # (B, V, P, C)
    torch.testing.assert_close(bank.patches[1].view_as(expected), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resize_mode", ["crop", "resize"])
def test_an_image_that_is_left_out_is_left_out_with_its_copies(tiny_folder, resize_mode):
    extractor = make_extractor(tiny_folder, resize_mode=resize_mode)
    images = [random_image(1, 64, 64), random_image(2, 96, 64), random_image(3, 64, 64)]
    bank = extractor.make_reference(images, augment_references="flips")
    alone = extractor.make_reference([images[0], images[2]], augment_references="flips")
    for got, expected in zip(bank.without_image(1).patches, alone.patches, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    scores = extractor.set_reference(bank).score(images[1]).scores
    torch.testing.assert_close(scores, extractor.set_reference(alone).score(images[1]).scores)


def test_a_bank_says_on_disk_how_it_was_made(extractor, tmp_path):
    plain, flips = (extractor.make_reference(random_image(1), augment_references=name) for name in ("none", "flips"))
    for bank in (plain, flips):
        bank.save(tmp_path / "bank.safetensors")
        again = ReferenceBank.load(tmp_path / "bank.safetensors")
        assert again.augmentation == bank.augmentation
        assert all(torch.equal(got, level) for got, level in zip(again.patches, bank.patches, strict=True))
    assert (plain.augmentation, flips.augmentation, flips.compact(0.5).augmentation) == ("", "flips", "flips")
    assert flips.images == plain.images
    assert b"augmentation" not in (plain.save(tmp_path / "p") or (tmp_path / "p").read_bytes())  # as earlier files


def test_an_augmentation_that_there_is_not_is_refused(extractor):
    with pytest.raises(
        InputError, match="augment_references is 'turns', expected one of none, flips, jitter, both, auto"
    ):
        extractor.make_reference(random_image(1), augment_references="turns")


def test_a_bank_is_not_augmented_afterwards(extractor):
    bank = extractor.make_reference(random_image(1))
    with pytest.raises(
        InputError, match="augment_references, select: a bank is as it was made .*: leave it out, or make"
    ):
        extractor.set_reference(bank, augment_references="flips", select=2)


@pytest.mark.parametrize(
    ("flips", "jitter", "chosen"),
    [
        ([0.9, 1.1, 1.0], [0.9, 1.0, 1.1], "none"),  # as before
        ([1.2, 1.3, 1.4], [0.1, 1.5, 1.4], "none"),  # one image gains, by chance
        ([0.8, 0.9, 0.7], [0.9, 1.0, 1.0], "flips"),
        ([0.8, 0.9, 0.7], [0.4, 0.5, 0.5], "jitter"),  # what gains most
        ([math.nan] * 3, [math.nan] * 3, "none"),  # of images that are all the same
    ],
)
def test_what_is_chosen_makes_the_images_stick_out_less_by_more_than_chance(flips, jitter, chosen):
    peaks = {"none": [1.0, 1.1, 1.0], "flips": flips, "jitter": jitter}
    assert choose_augmentation({name: torch.tensor(values) for name, values in peaks.items()}) == chosen


def test_the_automatic_choice_is_a_bank_that_says_what_was_chosen(extractor):
    """Parts that lie either way round: only turned over, one looks as another."""
    lies = torch.zeros(6, 3, 32, 32)
    lies[0::2, :, :, :16] = extractor.preprocess(random_image(1, 32, 32))[..., :16]
    lies[1::2] = lies[0::2].flip(3)
    images = lies + 0.05 * torch.randn(lies.shape)
    bank = extractor.make_reference(images, augment_references="auto", batch_size=4)
    same = extractor.make_reference(images, augment_references=bank.augmentation or "none")
    assert torch.equal(bank.patches[0], same.patches[0]) and bank.images == same.images
    assert bank.num_images == 6


def test_leaving_out_takes_more_than_two_images(extractor):
    message = "augment_references is 'auto' with 2 images, expected at least 3"
    with pytest.raises(InputError, match=message):
        extractor.make_reference([random_image(1), random_image(2)], augment_references="auto")
