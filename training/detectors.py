"""Detectors over features that are already in memory: small, for comparing features; pipelines use a detector library.

Each is fitted on the features of a few normal images and maps others, (B, H, W), float32; the score of an image is the
maximum of its map. Features are L maps (B, C, h, w), as the extractor gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError
from adpretrain_hf.scoring import anomaly_map, gaussian_smooth
from training.neighbourhoods import embed_patches

Features = Sequence[Tensor]
State = TypeVar("State")
_QUERIES = 4096  # patches whose distances are computed at a time


class Detector(Protocol):
    """What all detectors have in common."""

    def fit(self, features: Features) -> None:
        """Takes the features of normal images, L maps (B, C, h, w), as what is normal."""

    def score_maps(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Anomaly maps (B, H, W) of L maps (B, C, h, w), at ``size``: H and W of the network's input, in pixels."""


class FeatureNorm:
    """The length of a feature is its score; nothing is fitted (``adpretrain_hf.scoring.anomaly_map``)."""

    def fit(self, features: Features) -> None:
        """Needs nothing."""

    def score_maps(self, features: Features, size: tuple[int, int]) -> Tensor:
        """See ``Detector``."""
        return anomaly_map(features, size)


class PatchCore:
    """Squared distance to the nearest of a chosen tenth of the normal patches (Roth et al. 2022, as released).

    Args:
        width: of a patch's embedding, which pools 3 x 3 patches of the last 3 levels.
        share: of the normal patches that are kept, spread over them by k-center greedy choice.
        projected: dimensions that the choice is made in, by a random projection.
        seed: of the projection and the first patch.
    """

    def __init__(self, *, width: int = 1024, share: float = 0.1, projected: int = 128, seed: int = 0) -> None:
        self._width, self._share, self._projected, self._seed = width, share, projected, seed
        self._bank: Tensor | None = None

    def fit(self, features: Features) -> None:
        """See ``Detector``."""
        patches = embed_patches(features[-3:], self._width).flatten(0, 1)
        number = max(1, round(self._share * len(patches)))
        generator = torch.Generator().manual_seed(self._seed)
        first = int(torch.randint(len(patches), (1,), generator=generator))
        projection = torch.randn(patches.shape[1], self._projected, generator=generator) / self._projected**0.5
        self._bank = patches[spread_out(patches @ projection.to(patches.device), number, first)]

    def score_maps(self, features: Features, size: tuple[int, int]) -> Tensor:
        """See ``Detector``."""
        bank = _fitted(self._bank)
        patches = embed_patches(features[-3:], self._width)  # (B, h*w, width)
        nearest = [squared_distances(part, bank).amin(dim=1) for part in patches.flatten(0, 1).split(_QUERIES)]
        return to_image(torch.cat(nearest).view(-1, *features[-1].shape[-2:]), size)


class Padim:
    """Mahalanobis distance to the normal patches at the same place, mean over levels (Defard et al. 2021, as released).

    The covariance of n normal images plus 0.01 I is never inverted, nor even built: with a few images and hundreds of
    channels, ``d' (X'X / (n - 1) + e I)^-1 d = (||d||^2 - ||L^-1 X d||^2) / e`` with ``L L' = X X' + e (n - 1) I``,
    n x n (Woodbury). It is computed in float64, for it subtracts.

    Args:
        regularization: e, added to every variance.
    """

    def __init__(self, *, regularization: float = 0.01) -> None:
        self._regularization = regularization
        self._levels: list[Callable[[Tensor], Tensor]] | None = None

    def fit(self, features: Features) -> None:
        """See ``Detector``; at least 2 images."""
        if len(features[0]) < 2:
            raise InputError(f"got {len(features[0])} normal image, expected at least 2: a covariance needs them")
        self._levels = [_mahalanobis(_by_place(level), self._regularization) for level in features]

    def score_maps(self, features: Features, size: tuple[int, int]) -> Tensor:
        """See ``Detector``."""
        return to_image(self.distances(features), size)

    def distances(self, features: Features) -> Tensor:
        """Mahalanobis distance of every patch, mean over the levels: L maps (B, C, h, w) -> (B, h, w), float32."""
        levels = _fitted(self._levels)
        distances = [distance(_by_place(level)) for distance, level in zip(levels, features, strict=True)]
        return torch.stack(distances).mean(dim=0).T.unflatten(1, features[0].shape[-2:]).float()


def spread_out(points: Tensor, number: int, first: int) -> Tensor:
    """Chooses points (N, D) one after the other, each the farthest from all that were chosen (k-center greedy).

    Args:
        points: (N, D).
        number: how many, at most N.
        first: the index of the one to begin with.

    Returns:
        (number,), indices.
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
    """Patch scores (B, h, w) to maps (B, H, W): bilinear up-sampling, then a Gaussian of sigma 4 px.

    Both are linear and act on rows and columns alike: two products with small matrices, 50 times faster.
    """
    rows, columns = (_up_sampling(*sides).to(patches) for sides in zip(patches.shape[1:], size, strict=True))
    return rows @ patches @ columns.T


@functools.lru_cache(maxsize=16)
def _up_sampling(patches: int, pixels: int) -> Tensor:
    """The matrix (pixels, patches) that up-samples and smooths one axis."""
    each = F.interpolate(torch.eye(patches)[None], size=pixels, mode="linear", align_corners=False)
    return gaussian_smooth(each, dim=2)[0].T


def _by_place(level: Tensor) -> Tensor:
    return level.flatten(2).permute(2, 0, 1).double()  # (h*w, B, C)


def _mahalanobis(normal: Tensor, regularization: float) -> Callable[[Tensor], Tensor]:
    """The distance from normal patches (P, n, C) at each of P places: (P, B, C) -> (P, B)."""
    mean = normal.mean(dim=1, keepdim=True)
    centered = normal - mean
    number = normal.shape[1]
    identity = torch.eye(number, dtype=normal.dtype, device=normal.device)
    factor = torch.linalg.cholesky(centered @ centered.mT + regularization * (number - 1) * identity)
    explaining = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False) @ centered  # (P, n, C)

    def distance(patches: Tensor) -> Tensor:
        offset = patches - mean
        explained = (explaining @ offset.mT).square().sum(dim=1)
        return ((offset.square().sum(dim=2) - explained).clamp_min(0) / regularization).sqrt()

    return distance


def _fitted(state: State | None) -> State:
    if state is None:
        raise InputError("the detector has nothing to compare with: call fit with the features of normal images first")
    return state
