"""The metrics of a cell are the authors', and the images that are shown are the best and the worst."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from tests.conftest import GOLDEN, random_image
from training.evaluation.cells import Cell
from training.evaluation.data_sets import Sample
from training.evaluation.measure import Predicted, measure
from training.evaluation.results import METRICS
from training.evaluation.shown import choose_shown, sample_patches

CELL = Cell("folder", "nut", "patchcore", "raw", "", 8, 0.0, 1.0, 0)
SIDE = 32


def predicted(golden: dict[str, Tensor]) -> Predicted:
    maps, masks = golden["metrics.scores"].numpy(), golden["metrics.masks"].bool().numpy()
    return Predicted(maps, maps.max(axis=(1, 2)), golden["metrics.labels"].bool().numpy(), masks)


def test_the_metrics_are_the_authors(golden: dict[str, Tensor]) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
    got = measure(predicted(golden))
    assert tuple(got) == METRICS
    names = {name: name.replace("_f1", "_f1max") for name in METRICS if name != "aupro"}
    assert got == pytest.approx(
        {one: expected[name] for one, name in names.items()} | {"aupro": got["aupro"]}, abs=6e-6
    )
    assert got["aupro"] == pytest.approx(expected["aupro30"], abs=0.02)


def test_without_masks_there_are_no_metrics_of_pixels(golden: dict[str, Tensor]) -> None:
    whole = predicted(golden)
    got = measure(Predicted(whole.maps, whole.scores, whole.is_anomalous, None))
    assert got == {name: value for name, value in measure(whole).items() if name.startswith("image")}
    assert len(got) == 3


def test_a_hundred_maps_take_seconds() -> None:
    random = np.random.default_rng(0)
    masks = random.random((100, 256, 256)) > 0.97
    maps = (random.random(masks.shape) + 0.3 * masks).astype(np.float32)
    labels = np.arange(100) < 50
    began = time.process_time()
    measure(Predicted(maps, maps.mean(axis=(1, 2)), labels, masks))
    assert time.process_time() - began < 20


def test_maps_that_are_not_finite_are_refused(golden: dict[str, Tensor]) -> None:
    whole = predicted(golden)
    maps = np.where(whole.masks, np.nan, whole.maps)
    with pytest.raises(InputError, match="NaN or infinite"):
        measure(Predicted(maps, whole.scores, whole.is_anomalous, whole.masks))


# What is shown


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two normal and six anomalous images, 48 x 40 px."""
    kept = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        random_image(number).save(path)
        kept.append(Sample(path, path if number > 1 else None, number > 1, "crack" if number > 1 else "good"))
    return kept


def of_quality(qualities: list[float]) -> Predicted:
    """Maps that find the anomaly of an image as well as its quality says; those without one are normal."""
    masks = np.zeros((len(qualities), SIDE, SIDE), dtype=bool)
    maps = np.random.default_rng(0).random(masks.shape).astype(np.float32)
    for place, quality in enumerate(qualities):
        if not np.isnan(quality):
            masks[place, :8, :8] = True
            maps[place, :8, :8] = quality
    return Predicted(maps, maps.max(axis=(1, 2)), ~np.isnan(qualities), masks)


def test_the_two_best_and_the_two_worst_are_shown(extractor: ADPretrainFeatureExtractor, samples: list[Sample]) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    shown = choose_shown(whole, samples, extractor.preprocess)
    assert shown.indices.tolist() == [3, 6, 5, 4]
    assert whole.masks is not None
    assert np.array_equal(shown.masks, whole.masks[shown.indices])
    assert np.array_equal(shown.maps, whole.maps[shown.indices].astype(np.float16))
    crop = extractor.preprocess.crop(Image.open(samples[6].image))
    assert np.array_equal(shown.images[1], np.array(crop))


def test_all_are_shown_where_there_are_few_and_one_that_is_cut_off_is_not(
    extractor: ADPretrainFeatureExtractor, samples: list[Sample]
) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1])
    assert whole.masks is not None
    whole.masks[2] = False
    shown = choose_shown(whole, samples, extractor.preprocess)
    assert shown.indices.tolist() == [3, 4]
    whole.masks[:] = False
    assert len(choose_shown(whole, samples, extractor.preprocess).images) == 0


def test_without_masks_the_scores_say_which_are_found(
    extractor: ADPretrainFeatureExtractor, samples: list[Sample]
) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    scores = np.array([9, 9, 1, 2, 3, 4, 5, 6], dtype=np.float32)
    shown = choose_shown(Predicted(whole.maps, scores, whole.is_anomalous, None), samples, extractor.preprocess)
    assert shown.indices.tolist() == [7, 6, 3, 2]
    assert not shown.masks.any()


def test_values_beyond_float16_stay_finite(extractor: ADPretrainFeatureExtractor, samples: list[Sample]) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9])
    huge = Predicted(whole.maps * 1e6, whole.scores, whole.is_anomalous, whole.masks)
    assert np.isfinite(choose_shown(huge, samples, extractor.preprocess).maps).all()


def test_patches_are_labelled_and_drawn_by_the_seed() -> None:
    features = torch.arange(4 * 16, dtype=torch.float32).view(4, 1, 4, 4).repeat(1, 3, 1, 1)
    masks = np.zeros((4, SIDE, SIDE), dtype=bool)
    masks[1, :8, :8] = masks[2, 24:, 8:16] = True  # patches of 8 px
    got = sample_patches(CELL, features, masks, patch_size=8)
    assert got.values[got.is_anomalous, 0].tolist() == [16, 32 + 13]
    assert sorted(got.values[:, 2].tolist()) == list(range(64))
    many = features.repeat(50, 1, 1, 1)
    some = sample_patches(CELL, many, masks.repeat(50, axis=0), patch_size=8)
    assert (~some.is_anomalous).sum() == 300
    assert some.is_anomalous.sum() == 100
    again = sample_patches(CELL, many, masks.repeat(50, axis=0), patch_size=8)
    assert np.array_equal(some.values, again.values)
