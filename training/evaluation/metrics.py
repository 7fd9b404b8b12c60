"""How well anomalies are found: of images and pixels, and of regions (AUPRO).

Scores are any finite numbers, larger for more anomalous. Arrays may be numpy's or torch's, the latter on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Union

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adpretrain_hf.errors import InputError

Array = Union[np.ndarray, Tensor]

_BLOCK = 2**20  # pixels at a time
# Pixels that touch at a corner belong to one region, as in the released code; those of two images never do.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


class PixelMetrics(NamedTuple):
    """``pixel_auroc`` and ``aupro`` of the same maps."""

    auroc: float
    aupro: float


class PrecisionRecallMetrics(NamedTuple):
    """``average_precision`` and ``f1_max`` of the same scores."""

    average_precision: float
    f1_max: float


def image_auroc(scores: Array, is_anomalous: Array) -> float:
    """Area under the ROC curve, for scores and labels of one shape: (N,) of images, (N, H, W) of pixels.

    Raises:
        InputError: shapes differ, a score is not finite, or one of the labels is missing; so do the functions below.
    """
    return float(roc_auc_score(*_labels_and_scores(scores, is_anomalous)))


def average_precision(scores: Array, is_anomalous: Array) -> float:
    """Average precision (the step-wise area under the precision-recall curve), of images or pixels."""
    return precision_recall_metrics(scores, is_anomalous).average_precision


def f1_max(scores: Array, is_anomalous: Array) -> float:
    """The largest F1 that any threshold gives, of images or pixels."""
    return precision_recall_metrics(scores, is_anomalous).f1_max


def precision_recall_metrics(scores: Array, is_anomalous: Array) -> PrecisionRecallMetrics:
    """``average_precision`` and ``f1_max`` from one pass; arguments as there.

    Both change at the scores of anomalous pixels alone: normal ones are counted between these, block by block, and
    never sorted. scikit-learn's curve, whose numbers these are, takes 53 bytes for every pixel and 3.5 times as long.
    """
    labels, values = _labels_and_scores(scores, is_anomalous)
    thresholds, counts = np.unique(values[labels], return_counts=True)
    below = np.zeros(len(thresholds) + 1, dtype=np.int64)  # how many normal ones lie from one threshold to the next
    for start in range(0, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        places = np.searchsorted(thresholds, values[block][~labels[block]], side="right")
        below += np.bincount(places, minlength=len(below))
    false, true = below.sum() - np.cumsum(below)[:-1], np.cumsum(counts[::-1])[::-1]
    average_precision = counts @ (true / (true + false)) / counts.sum()
    return PrecisionRecallMetrics(float(average_precision), float((2 * true / (counts.sum() + true + false)).max()))


def overkill(scores: Array, is_anomalous: Array, escape: float) -> float:
    """The share of normal images that is rejected at the threshold that lets a share of the anomalous ones pass.

    The threshold is the largest that at most ``escape`` of the anomalous images are below; what is at it is rejected.

    Args:
        scores, is_anomalous: (N,).
        escape: in [0, 1).
    """
    labels, values = _labels_and_scores(scores, is_anomalous)
    if not 0 <= escape < 1:
        raise InputError(f"escape is {escape}, expected a share in [0, 1)")
    anomalous = np.sort(values[labels])
    threshold = anomalous[int(round(escape * len(anomalous), 9))]  # 0.07 * 100 is a little more than 7
    return float((values[~labels] >= threshold).mean())


def pixel_auroc(maps: Array, masks: Array) -> float:
    """Area under the ROC curve of pixels; ``image_auroc``'s number, several times faster."""
    return pixel_metrics(maps, masks).auroc


def aupro(maps: Array, masks: Array, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap (PRO) over the false positive rate, up to a limit, divided by the limit.

    PRO is the share of a region's pixels that are found, averaged over all regions. The curve through every threshold
    is integrated exactly, interpolated at the limit. The released code takes 200 thresholds and stretches the rates
    below the limit to [0, 1]; its numbers differ by up to 0.02.

    Args:
        maps: (N, H, W), scores.
        masks: (N, H, W), bool.
        fpr_limit: in (0, 1].
    """
    _check_limit(fpr_limit)
    return _aupro(*_false_positive_rates(maps, masks, fpr_limit), masks, fpr_limit)


def pixel_metrics(maps: Array, masks: Array, fpr_limit: float = 0.3) -> PixelMetrics:
    """``pixel_auroc`` and ``aupro`` from one sort; arguments as there."""
    _check_limit(fpr_limit)
    before, after = _false_positive_rates(maps, masks, 1.0)
    return PixelMetrics(float(np.mean(_area_gained(before, after, 1.0))), _aupro(before, after, masks, fpr_limit))


def _check_limit(fpr_limit: float) -> None:
    if not 0 < fpr_limit <= 1:
        raise InputError(f"fpr_limit is {fpr_limit}, expected a number in (0, 1]")


def _labels_and_scores(scores: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape or labels.dtype != bool:
        raise InputError(
            f"got scores of shape {scores.shape} and labels of shape {labels.shape} and type {labels.dtype}, expected "
            "bool labels of the scores' shape"
        )
    if not np.isfinite(scores).all():
        raise InputError("the scores hold NaN or infinite values")
    if labels.all() or not labels.any():
        raise InputError(
            f"all {labels.size} labels are {'anomalous' if labels.any() else 'normal'}: nothing can be measured "
            "without the other kind"
        )
    return labels.ravel(), scores.ravel()


def _false_positive_rates(maps: Array, masks: Array, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates before and after each anomalous pixel is found: the shares of normal ones above it, and not below it.

    Rates above the limit may come out lower, but not below it: those pixels need no sorting.
    """
    is_anomalous, scores = _labels_and_scores(maps, masks)
    anomalous, normal = scores[is_anomalous], scores[~is_anomalous]
    last = len(normal) - 1 - int(limit * len(normal))
    highest = np.sort(normal[normal >= np.partition(normal, last)[last]] if last > 0 else normal)
    above, not_below = (len(highest) - np.searchsorted(highest, anomalous, side) for side in ("right", "left"))
    return above / len(normal), not_below / len(normal)


def _area_gained(before: np.ndarray, after: np.ndarray, limit: float) -> np.ndarray:
    """What a pixel of weight 1 adds to the area up to the limit; among ties the curve rises linearly.

    The curve itself is never built. Its area is a sum over the anomalous pixels, each of which lifts it from the rate
    at which it is found to the limit (the Mann-Whitney form of the area).
    """
    end = np.minimum(after, limit)
    slope = 1 / np.maximum(after - before, np.finfo(float).tiny)
    return slope * np.maximum(end - before, 0) ** 2 / 2 + limit - end


def _aupro(before: np.ndarray, after: np.ndarray, masks: Array, limit: float) -> float:
    return float(_region_weights(np.asarray(masks)) @ _area_gained(before, after, limit)) / limit


def _region_weights(masks: np.ndarray) -> np.ndarray:
    """For every anomalous pixel, one over the pixels of its region and the number of regions; they add up to 1."""
    regions, count = ndimage.label(masks, _NEIGHBOURS)
    regions = regions[masks]
    return 1 / (np.bincount(regions)[regions] * count)


@dataclass(frozen=True)
class Predicted:
    """What a detector says of N test images, and what is true.

    Attributes:
        maps: (N, S, S), float32, larger for more anomalous.
        scores: (N,), of the images.
        is_anomalous: (N,), bool.
        masks: (N, S, S), bool; None where the anomalous pixels are not known.
    """

    maps: np.ndarray
    scores: np.ndarray
    is_anomalous: np.ndarray
    masks: np.ndarray | None


def measure(predicted: Predicted) -> dict[str, float]:
    """The seven metrics, in [0, 1]: of images, and where there are masks of pixels and regions.

    Raises:
        InputError: scores or maps that are not finite, or without both normal and anomalous images or pixels.
    """
    labels = predicted.is_anomalous
    images = precision_recall_metrics(predicted.scores, labels)
    metrics = {
        "image_auroc": image_auroc(predicted.scores, labels),
        "image_ap": images.average_precision,
        "image_f1": images.f1_max,
    }
    if predicted.masks is None:
        return metrics
    areas = pixel_metrics(predicted.maps, predicted.masks)
    pixels = precision_recall_metrics(predicted.maps, predicted.masks)
    return metrics | {
        "pixel_auroc": areas.auroc,
        "pixel_ap": pixels.average_precision,
        "pixel_f1": pixels.f1_max,
        "aupro": areas.aupro,
    }
