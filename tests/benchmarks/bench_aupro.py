"""AUPRO from one sort against AUPRO from 200 thresholds, on 100 maps of 256 x 256 pixels.

python -m tests.benchmarks.bench_aupro
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from training.evaluation.metrics import auroc, pixel_metrics

IMAGES, SIDE, THRESHOLDS, LIMIT = 100, 256, 200, 0.3


def make_maps() -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise with one to three discs that stand out of it."""
    random = np.random.default_rng(0)
    maps = ndimage.gaussian_filter(random.standard_normal((IMAGES, SIDE, SIDE)), (0, 8, 8)).astype(np.float32)
    maps /= maps.std()
    rows, columns = np.mgrid[:SIDE, :SIDE]
    masks = np.zeros(maps.shape, dtype=bool)
    for mask in masks:
        for _ in range(random.integers(1, 4)):
            row, column = random.integers(20, SIDE - 20, 2)
            mask |= (rows - row) ** 2 + (columns - column) ** 2 < random.integers(4, 20) ** 2
    return maps + np.float32(1.5) * masks, masks


def usual_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """As it is usually written: at every threshold, the regions of every mask one after the other."""
    points = []
    for threshold in thresholds_of(maps):
        found = maps > threshold
        overlaps = []
        for found_in_image, mask in zip(found, masks, strict=True):
            labels, count = ndimage.label(mask, np.ones((3, 3)))
            overlaps += [found_in_image[labels == region].mean() for region in range(1, count + 1)]
        points.append((found[~masks].mean(), np.mean(overlaps)))
    return area(points)


def tuned_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """The same loop over nothing but what depends on the threshold."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [scores[labels == number] for number in range(1, count + 1)]
    normal = maps[~masks]
    return area(
        [(np.mean(normal > t), np.mean([np.mean(region > t) for region in regions])) for t in thresholds_of(maps)]
    )


def thresholds_of(maps: np.ndarray) -> np.ndarray:
    return np.linspace(maps.max(), maps.min(), THRESHOLDS)


def area(points: list[tuple[float, float]]) -> float:
    rates, overlaps = np.array(points).T
    below = rates <= LIMIT
    at_limit = np.interp(LIMIT, rates, overlaps)
    return float(np.trapezoid([*overlaps[below], at_limit], [*rates[below], LIMIT]) / LIMIT)


def main() -> None:
    """Prints one line for each way."""
    maps, masks = make_maps()
    ways: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
        f"{THRESHOLDS} thresholds, as usual": usual_aupro,
        f"{THRESHOLDS} thresholds, tuned": tuned_aupro,
        "AUROC and AUPRO (pixel_metrics)": pixel_metrics,
        "AUROC (scikit-learn)": auroc,
    }
    for name, way in ways.items():
        start = time.perf_counter()
        result = way(maps, masks)
        print(f"{name:32} {time.perf_counter() - start:7.3f} s   {result}")


if __name__ == "__main__":
    main()
