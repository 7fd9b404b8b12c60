"""Where an image is anomalous: the connected regions of its map above a threshold (needs the extra ``regions``)."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adpretrain_hf.errors import InputError, check_count


@dataclass(frozen=True)
class Region:
    """A connected part of an anomaly map, neighbours by sides and corners, in the map's pixels.

    Attributes:
        box: top, left, height and width.
        area: pixels.
        peak: the largest value.
        mean: the mean value.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mean: float


def find_regions(anomaly: Tensor, threshold: float, *, min_area: int = 1, at_most: int | None = None) -> list[Region]:
    """The connected regions whose pixels exceed a threshold, those of the highest peaks first; see ``mark_regions``."""
    return mark_regions(anomaly, threshold, min_area=min_area, at_most=at_most)[0]


def mark_regions(
    anomaly: Tensor, threshold: float, *, min_area: int = 1, at_most: int | None = None
) -> tuple[list[Region], np.ndarray]:
    """The connected regions whose pixels exceed a threshold, those of the highest peaks first, and where they are.

    Args:
        anomaly: a map (H, W), on the CPU.
        threshold: e.g. ``Calibration.pixel_threshold(alpha)``: then at most a share of alpha of the normal images have
            any region.
        min_area: smaller regions are left out, in pixels.
        at_most: how many are returned.

    Returns:
        The regions, and their pixels: (H, W), bool.

    Raises:
        InputError: SciPy is not there, or an area or a number that is no integer >= 1.
    """
    check_count("min_area", min_area)
    if at_most is not None:
        check_count("at_most", at_most)
    try:
        from scipy import ndimage
    except ImportError as error:
        raise InputError("SciPy is not installed: install it by `pip install adpretrain-hf[regions]`") from error
    values = anomaly.numpy()
    labels, number = ndimage.label(values > threshold, structure=np.ones((3, 3)))
    names = np.arange(1, number + 1)
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    peaks, means = (measure(values, labels, names) for measure in (ndimage.maximum, ndimage.mean))
    boxes = [(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
             for rows, columns in ndimage.find_objects(labels)]  # fmt: skip
    found = zip(boxes, areas.tolist(), map(float, peaks), map(float, means), strict=True)
    regions = [(Region(*one), name) for name, one in enumerate(found, 1) if one[1] >= min_area]
    chosen = sorted(regions, key=lambda pair: -pair[0].peak)[:at_most]
    return [region for region, _ in chosen], np.isin(labels, [name for _, name in chosen])
