"""Metrics: the authors' numbers, the curve built threshold by threshold, and sets that cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from adpretrain_hf.errors import InputError
from tests.conftest import GOLDEN
from training.evaluation.metrics import auroc, overkill, pixel_metrics, precision_recall

QUICK = settings(max_examples=60, deadline=None, database=None)
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
METRICS: list[Callable[[np.ndarray, np.ndarray], object]] = [auroc, precision_recall, pixel_metrics]


def regions_of(masks: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Image and pixels of every region, found image by image."""
    regions = []
    for image, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(image, labels == number) for number in range(1, count + 1)]
    return regions


def curve(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False positive rates and PRO at every threshold."""
    thresholds = np.unique(maps)[::-1]
    rates = [np.mean(maps[~masks] >= t) for t in thresholds]
    overlaps = [np.mean([np.mean(maps[i][r] >= t) for i, r in regions_of(masks)]) for t in thresholds]
    return np.array([0, *rates]), np.array([0, *overlaps])


def naive_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    rates, overlaps = curve(maps, masks)
    below = rates <= limit
    at_limit = np.interp(limit, rates, overlaps)
    return float(np.trapezoid([*overlaps[below], at_limit], [*rates[below], limit]) / limit)


def random_maps(seed: int, images: int, side: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocky masks, and maps with many ties that are a little higher on them."""
    random = np.random.default_rng(seed)
    masks = ndimage.zoom(random.random((images, 3, 3)), (1, side / 3, side / 3), order=0) > 0.7
    masks[0, 0, 0], masks[0, -1, -1] = True, False
    scores = random.integers(0, levels, masks.shape) + masks * (levels // 3)
    return scores.astype(np.float32), masks


# The authors' code


def test_metrics_are_the_authors(golden: dict[str, Tensor]) -> None:
    maps, masks = golden["metrics.scores"], golden["metrics.masks"].bool()
    scores, labels = maps.amax(dim=(1, 2)), golden["metrics.labels"].bool()
    of_images, of_pixels = precision_recall(scores, labels), precision_recall(maps, masks)
    area, pro = pixel_metrics(maps, masks)
    got = {
        "image_auroc": auroc(scores, labels),
        "image_ap": of_images[0],
        "image_f1max": of_images[1],
        "pixel_auroc": area,
        "pixel_ap": of_pixels[0],
        "pixel_f1max": of_pixels[1],
    }
    assert got == pytest.approx({name: EXPECTED[name] for name in got}, abs=6e-6)
    assert pro == pytest.approx(EXPECTED["aupro30"], abs=0.02)


# The definitions


@QUICK
@given(
    seed=st.integers(0, 10000),
    images=st.integers(1, 3),
    side=st.sampled_from([3, 6, 12]),
    levels=st.sampled_from([1, 3, 40, 10**6]),
    limit=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_pixel_metrics_are_areas_under_their_curves(
    seed: int, images: int, side: int, levels: int, limit: float
) -> None:
    maps, masks = random_maps(seed, images, side, levels)
    area, pro = pixel_metrics(maps, masks, limit)
    assert pro == pytest.approx(naive_aupro(maps, masks, limit), abs=1e-9)
    assert area == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)


def test_every_region_counts_the_same() -> None:
    masks = np.zeros((2, 20, 20), dtype=bool)
    masks[0, :10, :10] = True  # 100 pixels, all found
    masks[1, 5, 5:7] = True  # 2 pixels, none found
    maps = np.where(masks, 2.0, 1.0)
    maps[1, 5, 5:7] = 0
    assert pixel_metrics(maps, masks)[1] == pytest.approx(0.5)


def test_corners_join_pixels_to_a_region_but_images_do_not() -> None:
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region, found
    masks[1, 1, 1] = True  # another one at the place of the first, not found
    maps = np.where(masks, 2.0, 1.0)
    maps[1, 1, 1] = 0
    assert pixel_metrics(maps, masks)[1] == pytest.approx(0.5)


def test_perfect_and_useless_maps() -> None:
    _, masks = random_maps(0, 3, 12, 5)
    assert pixel_metrics(masks.astype(float), masks) == pytest.approx((1, 1))
    assert pixel_metrics(1.0 - masks, masks) == pytest.approx((0, 0))
    assert pixel_metrics(np.zeros(masks.shape), masks) == pytest.approx((0.5, 0.15))  # 0.3 / 2


def test_f1_is_the_largest_of_all_thresholds() -> None:
    scores, labels = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])
    # Of the three highest: precision 2 / 3, recall 1.
    assert precision_recall(scores, labels) == pytest.approx(((1 + 2 / 3) / 2, 0.8))
    assert auroc(scores, labels) == pytest.approx(0.75)


@QUICK
@given(seed=st.integers(0, 10000), levels=st.sampled_from([1, 3, 40, 10**6]))
def test_precision_and_recall_of_one_curve(seed: int, levels: int) -> None:
    scores, labels = (array.ravel() for array in random_maps(seed, 1, 6, levels))
    precision, f1 = precision_recall(scores, labels)
    assert precision == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    found = [scores >= t for t in np.unique(scores)]
    expected = max(2 * np.sum(labels & one) / (labels.sum() + one.sum()) for one in found)
    assert f1 == pytest.approx(expected, abs=1e-12)


# What is refused


@pytest.mark.parametrize("metric", METRICS)
def test_one_kind_of_label_cannot_be_measured(metric: Callable[[np.ndarray, np.ndarray], object]) -> None:
    maps = np.zeros((2, 4, 4))
    with pytest.raises(InputError, match="all 32 labels are normal: nothing can be measured without the other kind"):
        metric(maps, maps > 0)
    with pytest.raises(InputError, match="all 32 labels are anomalous"):
        metric(maps, maps == 0)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_must_be_finite(metric: Callable[[np.ndarray, np.ndarray], object]) -> None:
    maps, masks = random_maps(0, 2, 6, 5)
    maps[1, 2, 3] = np.nan
    with pytest.raises(InputError, match="the scores hold NaN or infinite values"):
        metric(maps, masks)


@pytest.mark.parametrize("metric", METRICS)
def test_labels_must_be_bool_and_fit(metric: Callable[[np.ndarray, np.ndarray], object]) -> None:
    maps, masks = random_maps(0, 2, 6, 5)
    with pytest.raises(InputError, match=r"labels of shape \(2, 6, 6\) and type uint8, expected bool labels"):
        metric(maps, masks.astype(np.uint8))
    with pytest.raises(InputError, match=r"scores of shape \(1, 6, 6\) and labels of shape \(2, 6, 6\)"):
        metric(maps[:1], masks)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.5]))
def test_overkill_is_the_least_that_any_threshold_costs(seed, escape):
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, 8, 40).astype(float), np.arange(40) % 3 == 0
    allowed = [t for t in np.unique(scores) if (scores[labels] < t).mean() <= escape]
    least = min((scores[~labels] >= threshold).mean() for threshold in allowed)
    assert overkill(scores, labels, escape) == least
