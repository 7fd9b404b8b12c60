"""What is kept of a cell to be looked at: its best and worst maps, and some features of patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf.images import Preprocessor, read_image
from training.data.samples import published_labels
from training.evaluation.cells import Cell
from training.evaluation.data_sets import Sample
from training.evaluation.measure import Predicted
from training.evaluation.results import PatchSample, Shown
from training.metrics import pixel_auroc

_BEST, _WORST = 2, 2
_PATCHES = 300  # of each kind
_LARGEST = float(np.finfo(np.float16).max)


def choose_shown(predicted: Predicted, samples: Sequence[Sample], preprocess: Preprocessor) -> Shown:
    """The anomalous images whose anomalies are found best and worst, with masks and maps.

    How well one is found is its own pixel AUROC; where masks are not known, its score.

    Args:
        predicted: of N images.
        samples: the N images.
        preprocess: of the extractor.
    """
    order = sorted(_rankable(predicted), key=lambda place: _found(predicted, place), reverse=True)
    chosen = np.array(order[:_BEST] + order[_BEST:][-_WORST:], dtype=int)
    paths = [samples[place].image for place in chosen]
    images = [np.array(preprocess.crop(read_image(path, str(path)))) for path in paths]
    side = predicted.maps.shape[1:]
    masks = np.zeros(predicted.maps.shape, dtype=bool) if predicted.masks is None else predicted.masks
    return Shown(
        indices=chosen,
        images=np.stack(images) if images else np.zeros((0, *side, 3), dtype=np.uint8),
        masks=masks[chosen],
        maps=np.clip(predicted.maps[chosen], -_LARGEST, _LARGEST).astype(np.float16),
    )


def _rankable(predicted: Predicted) -> list[int]:
    places = np.flatnonzero(predicted.is_anomalous).tolist()
    if predicted.masks is None:
        return places
    # A crop may cut the whole anomaly off, and some anomalies fill the image: no AUROC then.
    return [place for place in places if 0 < predicted.masks[place].mean() < 1]


def _found(predicted: Predicted, place: int) -> float:
    if predicted.masks is None:
        return float(predicted.scores[place])
    return pixel_auroc(predicted.maps[place : place + 1], predicted.masks[place : place + 1])


def sample_patches(cell: Cell, features: Tensor, masks: np.ndarray, patch_size: int) -> PatchSample:
    """Some normal and anomalous patches of test images, drawn by the cell's seed.

    Args:
        cell: that the features belong to.
        features: (N, C, h, w), of one level.
        masks: (N, S, S), bool.
        patch_size: in pixels.
    """
    labels = published_labels(torch.from_numpy(masks), patch_size)[0].bool().flatten().numpy()
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    random = np.random.default_rng(cell.seed)
    kinds = [np.flatnonzero(labels == kind) for kind in (False, True)]
    chosen = np.concatenate([np.sort(random.permutation(kind)[:_PATCHES]) for kind in kinds])
    return PatchSample(
        data_set=cell.data_set,
        category=cell.category,
        features=cell.features,
        variant=cell.variant,
        values=rows[torch.from_numpy(chosen)].float().cpu().numpy(),
        is_anomalous=labels[chosen],
    )
