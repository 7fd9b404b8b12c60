"""FeatureNorm: the length of a pretrained feature is an anomaly score (paper, section 4; released ``feature_norm``)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import PreparedImage

SIGMA = 4.0
_TRUNCATE = 4.0  # a Gaussian is cut off after this many sigmas, as scipy.ndimage does


class AnomalyScores(NamedTuple):
    """What ``score`` returns.

    Attributes:
        maps: anomaly maps at the images' own size, or the one that was asked for: (B, H, W), or a list of B maps (H, W)
            where sizes differ; None if none were asked for.
        scores: (B,), the maximum of each map before it is brought to the image's size.
    """

    maps: Tensor | list[Tensor] | None
    scores: Tensor


def feature_norm(features: Tensor) -> Tensor:
    """``sqrt(||f|| + 1) - 1`` of every patch: (B, C, h, w) -> (B, h, w), in float32.

    The paper writes the squared norm; the released code, and so this, has no square.
    """
    return (features.float().norm(dim=1) + 1).sqrt() - 1


def anomaly_map(features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The FeatureNorm map: mean over the levels of the up-sampled norms, smoothed by a Gaussian of sigma 4 px.

    Args:
        features: L maps (B, C, h, w).
        size: H and W of the network's input, in pixels.

    Returns:
        (B, H, W), float32.
    """
    norms = (feature_norm(level)[:, None] for level in features)
    levels = [F.interpolate(norm, size=size, mode="bilinear", align_corners=True)[:, 0] for norm in norms]
    mean = torch.stack(levels).mean(dim=0)
    with torch.autocast(mean.device.type, enabled=False):
        return gaussian_smooth(gaussian_smooth(mean, dim=1), dim=2)


def gaussian_smooth(maps: Tensor, dim: int) -> Tensor:
    """Smooths maps (B, H, W) along one axis by a Gaussian of sigma 4 px, borders mirrored.

    Equal to ``scipy.ndimage.gaussian_filter1d(..., mode="reflect")``, which the released code uses, and differentiable.
    """
    side, radius = maps.shape[dim], int(_TRUNCATE * SIGMA + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    positions = torch.arange(-radius, side + radius, device=maps.device) % (2 * side)
    positions = torch.where(positions < side, positions, 2 * side - 1 - positions)
    shape = (1, 1, -1, 1) if dim == 1 else (1, 1, 1, -1)
    padded = maps.index_select(dim, positions)[:, None]
    return F.conv2d(padded, (weights / weights.sum()).view(shape))[:, 0]


@dataclass(frozen=True)
class ScoredImage:
    """One image's result.

    Attributes:
        image: the image as it was prepared.
        anomaly: (H', W'), the map at the size of the network's input, on the CPU.
        score: its maximum.
    """

    image: PreparedImage
    anomaly: Tensor
    score: float

    def full_size_map(self) -> Tensor:
        """The map at the image's own size, (H, W)."""
        return self.map_at(self.image.size)

    def map_at(self, size: tuple[int, int]) -> Tensor:
        """The map of the whole image at a size (H, W); pixels that are partly cut off count as seen."""
        top, left, height, width = self.image.box
        (first_row, end_row), (first_column, end_column) = (
            (start * new // old, -(-(start + extent) * new // old))
            for start, extent, new, old in zip((top, left), (height, width), size, self.image.size, strict=True)
        )
        return place_map(self.anomaly, size, (first_row, first_column, end_row - first_row, end_column - first_column))


def score_batch(images: Sequence[PreparedImage], maps: Tensor) -> list[ScoredImage]:
    """Scores a batch by its anomaly maps.

    Args:
        images: B prepared images.
        maps: (B, H', W'), on the CPU.

    Raises:
        InputError: a score is not a finite number.
    """
    scores = maps.amax(dim=(1, 2)).tolist()
    for image, score in zip(images, scores, strict=True):
        if not math.isfinite(score):
            reason = f"it holds NaN, or its features overflow {maps.dtype}"
            raise InputError(f"the score of {image.name} is {score}: {reason}")
    return [ScoredImage(*result) for result in zip(images, maps, scores, strict=True)]


def maps_of(results: Sequence[ScoredImage], size: tuple[int, int] | None = None) -> Tensor | list[Tensor]:
    """The maps of images, at their own sizes or at one (H, W): (B, H, W), or a list of (H, W) where sizes differ."""
    sizes = [size or one.image.size for one in results]
    if len(set(sizes)) > 1:
        return [one.full_size_map() for one in results]
    maps = results[0].anomaly.new_empty(len(results), *sizes[0])
    for place, one in enumerate(results):  # to stack them, all would be in memory twice
        maps[place] = one.map_at(sizes[0])
    return maps


def place_map(anomaly: Tensor, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Tensor:
    """Brings a map of the network's input to the size of the image it comes from.

    Args:
        anomaly: (H', W').
        size: H and W of the image.
        box: top, left, height and width of the part of the image that the network saw; all of it by default.

    Returns:
        (H, W); 0, the score of a perfectly normal patch, where the network saw nothing.
    """
    top, left, height, width = box or (0, 0, *size)
    if (height, width) == tuple(anomaly.shape) == tuple(size):
        return anomaly
    seen = F.interpolate(anomaly[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    if (height, width) == tuple(size):  # padding copies also where there is nothing to add
        return seen
    return F.pad(seen, (left, size[1] - left - width, top, size[0] - top - height))
