"""The detectors that are compared: the published FeatureNorm, PatchCore and PaDiM, and anomalib's.

The published ones judge every epoch of training, too. Each is fitted on the features of normal images, L maps (B, C, h,
w) as the extractor gives them, all in memory; they differ from a detector library's, see the classes.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError, check_count, check_positive, whole_number
from adpretrain_hf.scoring import anomaly_map, gaussian_smooth

Features = Sequence[Tensor]
_QUERIES = 4096  # patches whose distances are computed at a time
_IMAGES = 4  # embedded at a time: more take memory that is slower to get, fewer are more calls


class PublishedDetector(Protocol):
    """What all detectors have in common."""

    def fit(self, features: Features) -> None:
        """Takes the features of normal images, L maps (B, C, h, w), as what is normal."""

    def score(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Anomaly maps (B, H, W) and scores (B,), float32, of L maps (B, C, h, w); ``size`` is H and W, in pixels."""


class FeatureNorm:
    """The length of a feature is its score; nothing is fitted (``adpretrain_hf.scoring.anomaly_map``)."""

    def fit(self, features: Features) -> None:
        """Needs nothing."""

    def score(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See ``PublishedDetector``; an image's score is the maximum of its map."""
        maps = anomaly_map(features, size)
        return maps, maps.amax(dim=(1, 2))


class PatchCore:
    """Squared distance to the nearest of a chosen tenth of the normal patches (Roth et al. 2022, as released).

    Args:
        width: of a patch's embedding, which pools 3 x 3 patches of the last 3 levels.
        coreset_sampling_ratio: share of the normal patches that are kept, spread over them by k-center greedy choice.
        projected: dimensions that the choice is made in, by a random projection.
        seed: of the projection and the first patch.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self, *, width: int = 1024, coreset_sampling_ratio: float = 0.1, projected: int = 128, seed: int = 0
    ) -> None:
        if whole_number(seed) != seed:
            raise InputError(f"seed is {seed!r}, expected a whole number")
        self._width, self._projected = check_count("width", width), check_count("projected", projected)
        self._share, self._seed = check_positive("coreset_sampling_ratio", coreset_sampling_ratio, most=1), seed
        self._bank = torch.empty(0)

    def fit(self, features: Features) -> None:
        """See ``PublishedDetector``."""
        patches = embed_patches(features[-3:], self._width).flatten(0, 1)
        number = max(1, round(self._share * len(patches)))
        generator = torch.Generator().manual_seed(self._seed)
        first = int(torch.randint(len(patches), (1,), generator=generator))
        projection = torch.randn(patches.shape[1], self._projected, generator=generator) / self._projected**0.5
        self._bank = patches[spread_out(patches @ projection.to(patches.device), number, first)]

    def score(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See ``PublishedDetector``; an image's score is the largest distance of a patch, unsmoothed."""
        patches = embed_patches(features[-3:], self._width)  # (B, h*w, width)
        nearest = [squared_distances(part, self._bank).amin(dim=1) for part in patches.flatten(0, 1).split(_QUERIES)]
        distances = torch.cat(nearest).view(-1, *features[-1].shape[-2:])
        return to_image(distances, size), distances.amax(dim=(1, 2))


class Padim:
    """Mahalanobis distance to the normal patches at the same place, mean over levels (Defard et al. 2021, as released).

    The covariance of n normal images plus 0.01 I is never inverted, nor even built: with a few images and hundreds of
    channels, ``d' (X'X / (n - 1) + e I)^-1 d = (||d||^2 - ||L^-1 X d||^2) / e`` with ``L L' = X X' + e (n - 1) I``,
    n x n (Woodbury). It is computed in float64, for it subtracts.

    Args:
        regularization: e, above 0, added to every variance.
    """

    def __init__(self, *, regularization: float = 0.01) -> None:
        self._regularization = check_positive("regularization", regularization)
        self._levels: list[Callable[[Tensor], Tensor]] = []

    def fit(self, features: Features) -> None:
        """See ``PublishedDetector``; at least 2 images."""
        if len(features[0]) < 2:
            raise InputError(f"got {len(features[0])} normal image, expected at least 2: a covariance needs them")
        self._levels = [_mahalanobis(_by_place(level), self._regularization) for level in features]

    def score(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See ``PublishedDetector``; an image's score is the maximum of its map."""
        maps = to_image(self.distances(features), size)
        return maps, maps.amax(dim=(1, 2))

    def distances(self, features: Features) -> Tensor:
        """Mahalanobis distance of every patch, mean over the levels: L maps (B, C, h, w) -> (B, h, w), float32."""
        distances = [distance(_by_place(level)) for distance, level in zip(self._levels, features, strict=True)]
        return torch.stack(distances).mean(dim=0).T.unflatten(1, features[0].shape[-2:]).float()


def embed_patches(features: Sequence[Tensor], width: int) -> Tensor:
    """Embeds every patch (Roth et al. 2022, section 3.1; released ``PatchMaker``, ``Preprocessing``, ``Aggregator``).

    At each level the C x 9 values of the 3 x 3 neighbours, zeros beyond the border, are average-pooled to ``width``;
    the levels one after the other are pooled to ``width`` again. Both together are one sparse linear map, which takes a
    sixth of the time of the two in turn.

    Args:
        features: L maps (B, C, h, w).
        width: D, of an embedding.

    Returns:
        (B, h*w, D), float32.
    """
    parts = zip(*(level.split(_IMAGES) for level in features), strict=True)
    return torch.cat([_pool_levels(part, width) for part in parts])


def _pool_levels(features: Sequence[Tensor], width: int) -> Tensor:
    images, channels, height, breadth = features[0].shape
    embedded = features[0].new_zeros(width, images * height * breadth, dtype=torch.float32)
    for number, level in enumerate(features):
        embedded += torch.sparse.mm(_pooling(channels, len(features), number, width, level.device), _neighbours(level))
    return embedded.unflatten(1, (images, -1)).permute(1, 2, 0)


def _neighbours(level: Tensor) -> Tensor:
    """The 3 x 3 neighbours of every patch, faster than ``F.unfold``: (B, C, h, w) -> (C * 9, B * h*w)."""
    padded = F.pad(level.transpose(0, 1).float().contiguous(), (1, 1, 1, 1))
    windows = padded.unfold(2, level.shape[2], 1).unfold(3, level.shape[3], 1)  # (C, B, 3, 3, h, w)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(level.shape[1] * 9, -1)


@functools.lru_cache(maxsize=16)
def _pooling(channels: int, levels: int, number: int, width: int, device: torch.device) -> Tensor:
    """What one level adds to the embedding, as a sparse matrix (width, channels * 9)."""
    one_level = F.adaptive_avg_pool1d(torch.eye(channels * 9), width)  # (channels * 9, width)
    over_levels = F.adaptive_avg_pool1d(torch.eye(levels * width)[number * width : (number + 1) * width], width)
    return (one_level @ over_levels).T.to_sparse().coalesce().to(device)


def spread_out(points: Tensor, number: int, first: int) -> Tensor:
    """Chooses points (N, D) one after the other, each the farthest from all that were chosen (k-center greedy).

    They are ``number``, at most N, and the one with the index ``first`` is the first: (number,), indices.
    """
    lengths = points.square().sum(dim=1)
    distances = torch.full_like(lengths, torch.inf)
    chosen = [torch.tensor(first, device=points.device)]
    while len(chosen) < number:
        last = chosen[-1]
        distances = torch.minimum(distances, lengths - 2 * (points @ points[last]) + lengths[last])
        distances[last] = -torch.inf  # never again, not even where all others are equal to it
        chosen.append(distances.argmax())
    return torch.stack(chosen)


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Squared Euclidean distances (N, D), (M, D) -> (N, M)."""
    lengths = (one.square().sum(dim=1) for one in (points, others))
    return torch.addmm(next(lengths)[:, None] + next(lengths), points, others.T, alpha=-2).clamp_min(0)


def to_image(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch scores (B, h, w) to maps (B, H, W): bilinear up-sampling, then a Gaussian of sigma 4 px."""
    maps = F.interpolate(patches[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return gaussian_smooth(gaussian_smooth(maps, dim=1), dim=2)


def _by_place(level: Tensor) -> Tensor:
    return level.flatten(2).permute(2, 0, 1).double()  # (h*w, B, C)


def _mahalanobis(normal: Tensor, regularization: float) -> Callable[[Tensor], Tensor]:
    """The distance from normal patches (P, n, C) at each of P places: (P, B, C) -> (P, B)."""
    mean = normal.mean(dim=1, keepdim=True)
    centered = normal - mean
    number, channels = normal.shape[1:]
    if number > channels:  # the covariance itself is the smaller matrix
        covariance = centered.mT @ centered / (number - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(regularization)
        root = torch.linalg.cholesky(covariance)
        return lambda patches: torch.linalg.solve_triangular(root, (patches - mean).mT, upper=False).norm(dim=1)
    identity = torch.eye(number, dtype=normal.dtype, device=normal.device)
    factor = torch.linalg.cholesky(centered @ centered.mT + regularization * (number - 1) * identity)
    explaining = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False) @ centered  # (P, n, C)

    def distance(patches: Tensor) -> Tensor:
        offset = patches - mean
        explained = (explaining @ offset.mT).square().sum(dim=1)
        return ((offset.square().sum(dim=2) - explained).clamp_min(0) / regularization).sqrt()

    return distance


class Detector(NamedTuple):
    """One detector and how it is run.

    Attributes:
        variant: of the projectors that the paper gives it.
        published: its class above, whose protocol is the paper's; None for one of anomalib's models.
        model: name of its class in ``adpretrain_hf.integrations.anomalib``.
        epochs: passes over the training images, unless a plan says otherwise.
        serves_all: one model is fitted on all categories of a data set.
    """

    variant: str
    published: type[PublishedDetector] | None = None
    model: str = ""
    epochs: int = 1
    serves_all: bool = False

    @property
    def kind(self) -> Any:
        """Its class; anomalib is imported only now, for that takes seconds."""
        if self.published is not None:
            return self.published
        return getattr(importlib.import_module("adpretrain_hf.integrations.anomalib"), self.model)


# Epochs are what two cores can do in an evaluation of minutes; published are 25 (CFLOW, with 8 passes over the data in
# each), 640 (GLASS) and 1000 (UniAD). GLASS's are those by which raw features have stopped gaining.
DETECTORS: Mapping[str, Detector] = {
    "featurenorm": Detector("norm", FeatureNorm),
    "patchcore": Detector("angle", PatchCore),
    "padim": Detector("angle", Padim),
    "cflow": Detector("norm", model="ADPretrainCflow", epochs=3),
    "glass": Detector("norm", model="ADPretrainGlass", epochs=60),
    "uniad": Detector("norm", model="ADPretrainUniad", epochs=6, serves_all=True),
    "anomalib_patchcore": Detector("angle", model="ADPretrainPatchcore"),
    "anomalib_padim": Detector("angle", model="ADPretrainPadim"),
}
PAPER = tuple(DETECTORS)[:6]  # those of the paper's tables


def check_settings(detector: str, settings: Mapping[str, Any]) -> None:
    """Checks a detector's own settings: those of its model, and for anomalib's the levels, these by their names alone.

    Raises:
        InputError: one that it does not have (the message lists those that it has), or out of its range.
    """
    own = inspect.signature(DETECTORS[detector].kind.__init__).parameters.values()
    known = [one.name for one in own if one.kind is one.KEYWORD_ONLY]
    known += [] if DETECTORS[detector].published else ["levels"]
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"{detector} has no setting {', '.join(unknown)}: expected some of {', '.join(known)}")
    if DETECTORS[detector].published:
        DETECTORS[detector].kind(**settings)
