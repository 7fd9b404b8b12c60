"""How well the anomalies of one cell are found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.metrics import image_auroc, pixel_metrics, precision_recall_metrics


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
