"""The records of a run: a cell's numbers, the pictures of it to look at, and samples of patch features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from adpretrain_hf.errors import InputError
from training.evaluation.cells import Cell

METRICS = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro")


@dataclass(frozen=True)
class Result:
    """The numbers of a finished cell.

    Attributes:
        cell: what was run.
        metrics: by name, in [0, 1]; those that cannot be measured (of pixels, where there are no masks) are None or
            left out.
        scores: of the test images, larger for more anomalous.
        is_anomalous: of each test image.
        names: of the test images, as people know them.
        seconds: that the cell took.
        defects: the kinds of the test images' anomalies, as the data set calls them; empty where they are not known.

    Raises:
        InputError: the lists are of different lengths, a metric is unknown, or a number is not finite.
    """

    cell: Cell
    metrics: Mapping[str, float | None]
    scores: list[float]
    is_anomalous: list[bool]
    names: list[str]
    seconds: float
    defects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = [len(one) for one in (self.scores, self.is_anomalous, self.names)]
        if len(set(lengths)) > 1:
            raise InputError(f"scores, is_anomalous and names have lengths {lengths}, expected one entry an image each")
        if self.defects and len(self.defects) != len(self.names):
            raise InputError(f"got {len(self.defects)} defects for {len(self.names)} images, expected one each")
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise InputError(f"unknown metrics {', '.join(unknown)}: expected some of {', '.join(METRICS)}")
        measured = [value for value in self.metrics.values() if value is not None]
        if not all(map(math.isfinite, [*measured, *self.scores, self.seconds])):
            raise InputError("the metrics, the scores or the seconds hold NaN or infinite values, expected finite ones")


@dataclass(frozen=True)
class Shown:
    """The images of a cell that are chosen to be looked at, those first whose anomalies are found best.

    Attributes:
        indices: (k,), int, their places among the test images.
        images: (k, S, S, 3), uint8.
        masks: (k, S, S), bool.
        maps: (k, S, S), float16, larger for more anomalous.

    Raises:
        InputError: shapes or types are others.
    """

    indices: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    maps: np.ndarray

    def __post_init__(self) -> None:
        grid = self.maps.shape
        got = [(one.shape, one.dtype.name) for one in (self.images, self.masks, self.maps)]
        expected = [((*grid, 3), "uint8"), (grid, "bool"), (grid, "float16")]
        if got != expected or len(grid) != 3 or self.indices.shape != grid[:1] or self.indices.dtype.kind != "i":
            raise InputError(
                f"got indices {self.indices.shape} {self.indices.dtype} and images, masks, maps {got}; expected "
                "integers (k,), uint8 (k, S, S, 3), bool (k, S, S) and float16 (k, S, S)"
            )


@dataclass(frozen=True)
class PatchSample:
    """Some patch features of the test images of a category.

    Attributes:
        data_set, category, features, variant: as in ``Cell``.
        values: (n, C), float32, with n >= 4 and C >= 2: less cannot be drawn in a plane.
        is_anomalous: (n,), bool.

    Raises:
        InputError: shapes or types are others, or a value is not finite.
    """

    data_set: str
    category: str
    features: str
    variant: str
    values: np.ndarray
    is_anomalous: np.ndarray

    def __post_init__(self) -> None:
        types = (self.values.dtype.name, self.is_anomalous.dtype.name)
        shape = self.values.shape
        if types != ("float32", "bool") or len(shape) != 2 or self.is_anomalous.shape != shape[:1]:
            raise InputError(
                f"got values {shape} {types[0]} and is_anomalous {self.is_anomalous.shape} {types[1]}, "
                "expected float32 (n, C) and bool (n,)"
            )
        if shape[0] < 4 or shape[1] < 2:
            raise InputError(f"got {shape[0]} patches of {shape[1]} channels, expected at least 4 of at least 2")
        if not np.isfinite(self.values).all():
            raise InputError("the patch features hold NaN or infinite values, expected finite ones")
