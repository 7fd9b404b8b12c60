"""What is drawn: nested, paired, never tested on as well; its images and masks as the network sees them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images import Preprocessor
from training.data.folders import Category, Sample
from training.evaluation.cells import Cell
from training.evaluation.images import ImageFiles, test_masks
from training.evaluation.sampling import draw_training, read_reference_lists


def category(train: int = 20, normal: int = 5, anomalous: int = 15) -> Category:
    def samples(kind: str, number: int, is_anomalous: bool = False) -> tuple[Sample, ...]:
        return tuple(Sample(Path(f"/data/{kind}/{n:03}.png"), None, is_anomalous, kind) for n in range(number))

    return Category(
        "mvtecad", "bolt", samples("train", train), samples("good", normal) + samples("bad", anomalous, True)
    )


def cell(**changes) -> Cell:
    settings = {"shots": 4, "noise": 0.0, "fraction": 1.0, "seed": 0} | changes
    return Cell("mvtecad", "bolt", "patchcore", "raw", "", **settings)


shots = st.integers(1, 8)
noises = st.sampled_from([0.0, 0.05, 0.1, 0.2])
fractions = st.sampled_from([0.05, 0.1, 0.5, 1.0])


@given(shots=shots, noise=noises, fraction=fractions, seed=st.integers(0, 50))
def test_sizes_and_no_image_is_trained_and_tested_on(shots, noise, fraction, seed):
    drawn = draw_training(category(), cell(shots=shots, noise=noise, fraction=fraction, seed=seed))
    assert len(drawn.references) == shots == len(set(drawn.references))
    noisy = [sample for sample in drawn.train if sample.is_anomalous]
    assert len(drawn.train) - len(noisy) == {0.05: 1, 0.1: 2, 0.5: 10, 1.0: 20}[fraction]
    assert (len(noisy) > 0) == (noise > 0)
    if fraction == 1.0:
        assert len(noisy) / len(drawn.train) == pytest.approx(noise, abs=0.03)
    assert not set(drawn.train) & set(drawn.test)
    assert set(drawn.test) | set(noisy) == set(category().test)
    assert draw_training(category(), cell(shots=shots, noise=noise, fraction=fraction, seed=seed)) == drawn


@given(few=shots, many=shots, noise=noises, seed=st.integers(0, 50))
def test_fewer_shots_are_the_first_of_more(few, many, noise, seed):
    few, many = sorted((few, many))
    first = draw_training(category(), cell(shots=few, noise=noise, seed=seed)).references
    assert draw_training(category(), cell(shots=many, noise=noise, seed=seed)).references[:few] == first


@given(small=fractions, large=fractions, seed=st.integers(0, 50))
def test_a_fraction_is_part_of_a_larger_one(small, large, seed):
    small, large = sorted((small, large))
    part, whole = (draw_training(category(), cell(fraction=one, seed=seed)) for one in (small, large))
    assert set(part.train) <= set(whole.train)
    assert part.references == whole.references


@given(number=shots, noise=noises, fraction=fractions, seed=st.integers(0, 50))
def test_references_are_of_the_training_images_as_far_as_there_are_so_many(number, noise, fraction, seed):
    drawn = draw_training(category(), cell(shots=number, noise=noise, fraction=fraction, seed=seed))
    within = min(number, len(drawn.train))
    assert drawn.references[:within] == drawn.train[:within]
    assert set(drawn.references) <= set(drawn.train) or number > len(drawn.train)


@pytest.mark.parametrize(("fraction", "number"), [(0.07, 7), (0.55, 55), (0.071, 8), (1e-12, 1)])
def test_fractions_are_rounded_up_but_not_for_an_error_of_rounding(fraction, number):
    assert len(draw_training(category(train=100), cell(fraction=fraction)).train) == number


@given(little=noises, much=noises, seed=st.integers(0, 50))
def test_little_noise_is_part_of_more(little, much, seed):
    little, much = sorted((little, much))
    less, more = (draw_training(category(), cell(noise=one, seed=seed)) for one in (little, much))
    assert set(less.train) <= set(more.train)


def test_seeds_and_categories_draw_differently():
    other = Category("mvtecad", "nut", *(getattr(category(), part) for part in ("train", "test")))
    draws = [draw_training(category(), cell(seed=seed)).references for seed in range(5)]
    draws.append(draw_training(other, cell()).references)
    assert len(set(draws)) == 6


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_noise_reaches_the_references_as_it_does_the_training_images(fraction):
    many = category(train=200, anomalous=100)
    settings = {"noise": 0.2, "fraction": fraction, "shots": 8}
    drawn = [draw_training(many, cell(seed=seed, **settings)).references for seed in range(100)]
    share = sum(sample.is_anomalous for references in drawn for sample in references) / 800
    assert share == pytest.approx(0.2, abs=0.05)


def test_too_much_is_refused():
    with pytest.raises(InputError, match="bolt has 3 training images, fewer than 4 shots"):
        draw_training(category(train=3), cell())
    with pytest.raises(
        InputError, match=r"noise 0\.2 takes 5 of 5 anomalous images of bolt: at least one must be left"
    ):
        draw_training(category(anomalous=5), cell(noise=0.2))


def test_fixed_references_take_the_place_of_drawn_ones(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "lists.json").write_text(json.dumps({"bolt": ["a.png", "b.png", "c.png"]}))
    lists = read_reference_lists(tmp_path / "lists.json")
    drawn = draw_training(category(), cell(shots=2), lists["bolt"])
    assert [sample.image for sample in drawn.references] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert drawn.train == draw_training(category(), cell(shots=2)).train
    with pytest.raises(InputError, match="the list for bolt has 3 references, fewer than 4 shots"):
        draw_training(category(), cell(), lists["bolt"])
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=r"the list for bolt names images that are not there: .*b\.png"):
        draw_training(category(), cell(shots=2), lists["bolt"])


def test_reference_that_is_trained_on_is_the_same_sample(tmp_path):
    train = tuple(Sample(tmp_path / f"{n}.png", None, False, "good") for n in range(5))
    train[3].image.touch()
    drawn = draw_training(Category("mvtecad", "bolt", train, category().test), cell(shots=1), [train[3].image])
    assert drawn.references == (train[3],)


def test_reference_is_recognised_however_its_path_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    train = tuple(Sample(tmp_path / f"data/{n}.png", None, False, "good") for n in range(5))
    train[3].image.touch()
    for written in ("../data/3.png", "../link/3.png"):
        (tmp_path / "lists/list.json").write_text(json.dumps({"bolt": [written]}))
        listed = read_reference_lists(tmp_path / "lists/list.json")["bolt"]
        drawn = draw_training(Category("mvtecad", "bolt", train, category().test), cell(shots=1), listed)
        assert drawn.references == (train[3],)


def test_list_of_what_is_tested_or_twice_the_same_is_refused(tmp_path):
    test = tuple(Sample(tmp_path / f"{n}.png", None, n > 0, "any") for n in range(3))
    (tmp_path / "0.png").touch()
    (tmp_path / "reference.png").touch()
    one = Category("mvtecad", "bolt", category().train, test)
    with pytest.raises(InputError, match=r"the list for bolt names images that are tested on: .*0\.png"):
        draw_training(one, cell(shots=1), [tmp_path / "0.png"])
    with pytest.raises(InputError, match="the list for bolt names an image twice among its first 2"):
        draw_training(one, cell(shots=2), [tmp_path / "reference.png"] * 2)


@pytest.mark.parametrize("text", ["[]", '{"bolt": "a.png"}', '{"bolt": []}', '{"bolt": [1]}'])
def test_lists_of_another_form_are_refused(text, tmp_path):
    (tmp_path / "lists.json").write_text(text)
    with pytest.raises(InputError, match=r"is not of the form \{category: \[paths of reference images\]\}"):
        read_reference_lists(tmp_path / "lists.json")


def test_lists_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_reference_lists(tmp_path / "none.json")
    (tmp_path / "lists.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_reference_lists(tmp_path / "lists.json")


# Images and masks as the network sees them, in batches


PREPARE = Preprocessor(ADPretrainConfig("none", hidden_size=32, patch_size=8, layers=(1,), image_size=32, num_heads=4))


@pytest.fixture
def two_images(tmp_path):
    """A normal and an anomalous image of 96 x 64 pixels; the mask covers the middle third and an edge."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, 32:64] = 1  # a class's number, not 255
    mask[:, :8] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [
        Sample(tmp_path / "0.png", None, False, "good"),
        Sample(tmp_path / "1.png", tmp_path / "mask.png", True, "bad"),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_prepared_by_the_extractors_own_code(two_images, workers):
    files = ImageFiles(two_images, PREPARE)
    (batch,) = DataLoader(files, batch_size=2, num_workers=workers, collate_fn=files.collate_fn)
    assert torch.equal(torch.Tensor(batch.image), PREPARE([sample.image for sample in two_images]))
    assert batch.gt_label.tolist() == [False, True]
    assert batch.image_path == [str(sample.image) for sample in two_images]
    assert not batch.gt_mask[0].any()
    # 96 x 64 becomes 48 x 32, of which the middle 32 columns are seen: the third is columns 8 to 24, the edge is gone.
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:, 8:24] = True
    assert torch.equal(batch.gt_mask[1].bool(), expected)


def test_masks_alone_are_those_of_the_batches(two_images):
    files = ImageFiles(two_images, PREPARE)
    masks = test_masks(two_images, PREPARE)
    assert masks.dtype == bool
    assert np.array_equal(masks, np.stack([files[place].gt_mask.squeeze().numpy() > 0 for place in range(2)]))


@pytest.mark.parametrize("size", [(45, 24), (20, 13), (10, 9), (41, 67)])
@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_masks_lie_on_what_they_mark(mode, size, tmp_path):
    """An image that is its own mask, black and white, has the same edges but for what resizing blurs."""
    prepare = Preprocessor(replace(PREPARE.config, resize_mode=mode))
    width, height = size
    marked = np.zeros((height, width), dtype=np.uint8)
    marked[: height // 3, width // 2 : 3 * width // 4] = 255
    Image.fromarray(marked).convert("RGB").save(tmp_path / "0.png")
    Image.fromarray(marked).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "0.png", tmp_path / "mask.png", True, "bad")
    (mask,) = test_masks([sample], prepare)
    image = prepare.prepare(sample.image).tensor.mean(0).numpy()
    assert mask.shape == image.shape
    middle, extent = (image.max() + image.min()) / 2, np.ptp(image)
    blurred = abs(image - middle) < extent / 4
    assert np.array_equal(mask[~blurred], image[~blurred] > middle)
    assert blurred.mean() < 0.2
    if mode == "crop":
        assert np.array_equal(mask, np.asarray(prepare.crop_mask(Image.fromarray(marked))) > 0)


def test_images_of_different_shapes_are_refused(two_images):
    prepare = Preprocessor(replace(PREPARE.config, resize_mode="resize"))
    Image.new("RGB", (64, 64)).save(two_images[0].image)
    files = ImageFiles(two_images, prepare)
    with pytest.raises(InputError, match=r"different shapes \[\(3, 32, 32\), \(3, 32, 48\)\] do not make one batch"):
        files.collate_fn([files[0], files[1]])


def test_a_mask_of_another_size_than_its_image_is_refused(two_images):
    Image.new("L", (95, 64)).save(two_images[1].mask)
    with pytest.raises(
        ImageError, match=r"mask\.png has 95 x 64 pixels, its image .*1\.png 96 x 64: expected the same"
    ):
        ImageFiles(two_images, PREPARE)[1]


def test_unreadable_images_are_refused(two_images):
    two_images[0].image.write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"0\.png"):
        ImageFiles(two_images, PREPARE)[0]
    two_images[0].image.unlink()
    with pytest.raises(MissingPathError, match="no such image"):
        ImageFiles(two_images, PREPARE)[0]
