"""The plots of patch features, one for each category that has some."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.evaluation.cells import FEATURES
from training.evaluation.figures import SCATTER_INCHES, scatter_figure
from training.evaluation.names import features_name
from training.evaluation.projections import project
from training.evaluation.results import PatchSample


@dataclass(frozen=True)
class PatchPlot:
    """A plot of patches.

    Attributes:
        picture: its address.
        width: in CSS pixels.
        method: ``"t-SNE"`` or ``"PCA"``.
        features: whose there are, in words.
    """

    picture: str
    width: int
    method: str
    features: str


def patch_plots(samples: Sequence[PatchSample]) -> dict[tuple[str, str], PatchPlot]:
    """The plots, by data set and category; raw and pretrained features are side by side."""
    samples = sorted(samples, key=lambda one: (FEATURES.index(one.features), one.variant))
    method, places = project(samples)
    panels: dict[tuple[str, str], dict[str, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    for sample, points in zip(samples, places, strict=True):
        panels[sample.data_set, sample.category][features_name(sample.features, sample.variant)] = points
    return {
        key: PatchPlot(scatter_figure(points), round(96 * SCATTER_INCHES * len(points)), method, ", ".join(points))
        for key, points in panels.items()
    }
