"""Patch features laid out in a plane: by t-SNE, or by principal components where that would take too long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from training.evaluation.results import PatchSample

# t-SNE takes about 2 ms a point on one core: a report spends some 15 seconds on it.
_ALL_POINTS, _FEWEST, _MOST = 7_500, 100, 1500
_COMPONENTS = 30  # that t-SNE is given: more are slower, and mostly noise


def project(samples: Sequence[PatchSample]) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Lays samples out, each on its own; of large ones, some patches that are drawn by a fixed seed.

    Returns:
        The method's name, and for each sample positions (n, 2) and is_anomalous (n,) of the patches that are shown.
    """
    number = _ALL_POINTS // max(1, len(samples))
    method, number = ("t-SNE", min(number, _MOST)) if number >= _FEWEST else ("PCA", _MOST)
    drawn = [_drawn(sample, number) for sample in samples]
    return method, [(_tsne(values) if method == "t-SNE" else _pca(values, 2), labels) for values, labels in drawn]


def _drawn(sample: PatchSample, number: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.sort(np.random.default_rng(0).permutation(len(sample.values))[:number])
    return sample.values[chosen], sample.is_anomalous[chosen]


def _pca(values: np.ndarray, components: int) -> np.ndarray:
    return PCA(min(components, *values.shape), random_state=0).fit_transform(values)


def _tsne(values: np.ndarray) -> np.ndarray:
    perplexity = min(30, (len(values) - 1) / 3)
    tsne = TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0)
    return tsne.fit_transform(_pca(values, _COMPONENTS))
