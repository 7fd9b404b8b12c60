"""FeatureNorm: the length of a pretrained feature is an anomaly score (paper, section 4; released ``feature_norm``)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import OnError, PreparedImage, Windows, by_image
from adpretrain_hf.scoring.decision import BY_MAXIMUM, Calibration, Judgement, of_product, required
from adpretrain_hf.scoring.interest import check_size, network_mask
from adpretrain_hf.scoring.regions import Region, find_regions

T = TypeVar("T")
SIGMA = 4.0
_MAPPED = 2**23  # values of a block that the system extends without a copy; those that are not used take no memory
_TRUNCATE = 4.0  # a Gaussian is cut off after this many sigmas, as scipy.ndimage does


@dataclass(frozen=True)
class AnomalyScores:
    """What ``score`` returns; ``maps, scores = extractor.score(images)`` takes it apart.

    Decisions need a reference with a calibration, see ``extractor.calibrate``, or raise InputError.

    Attributes:
        maps: anomaly maps at the images' own size, or the one that was asked for: (B, H, W), or a list of B maps (H, W)
            where sizes differ; None if none were asked for.
        scores: (B,), by default the maximum of each map before it is brought to the image's size.
        calibrations: for each image what its product's normal images score, or None.
        categories: of the images, by which errors name their products; empty where they are not told.
    """

    maps: Tensor | list[Tensor] | None
    scores: Tensor
    calibrations: Sequence[Calibration | None] = ()
    categories: Sequence[str] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.maps, self.scores))

    @property
    def p_values(self) -> Tensor:
        """(B,), float64: how rarely a normal image scores as high; see ``Calibration.p_value``."""
        return torch.tensor(self._each(Calibration.p_value), dtype=torch.float64)

    @property
    def confidence(self) -> Tensor:
        """(B,), float64, 0.5 at the threshold of ``false_alarms``; see ``Calibration.confidence``."""
        return torch.tensor(self._each(Calibration.confidence), dtype=torch.float64)

    def is_anomalous(self, alpha: float | None = None) -> Tensor:
        """(B,), bool: the decisions at a false-alarm rate of alpha; see ``Calibration.threshold``."""
        return torch.tensor(self._each(partial(Calibration.is_anomalous, alpha=alpha)))

    def is_borderline(self, alpha: float | None = None, band: float = 1.0) -> Tensor:
        """(B,), bool: which scores lie near the threshold; see ``Calibration.is_borderline``."""
        return torch.tensor(self._each(partial(Calibration.is_borderline, alpha=alpha, band=band)))

    def regions(
        self, alpha: float | None = None, *, min_area: int = 1, at_most: int | None = None
    ) -> list[list[Region]]:
        """For each image the regions above the pixel threshold of alpha; see ``find_regions``."""
        if self.maps is None:
            raise InputError("regions are found in maps, and there are none: score with maps=True")
        thresholds = self._each(lambda own, _: own.pixel_threshold(alpha))
        found = zip(self.maps, thresholds, strict=True)
        return [find_regions(one, threshold, min_area=min_area, at_most=at_most) for one, threshold in found]

    def _each(self, ask: Callable[[Calibration, float], T]) -> list[T]:
        """What is asked of the calibration of each image, with its score."""
        answers, number = list[T](), len(self.scores)
        about = self.calibrations or [None] * number, self.categories or [""] * number
        for own, category, score in zip(*about, self.scores.tolist(), strict=True):
            with of_product(category):
                answers.append(ask(required(own), score))
        return answers


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
        anomaly: (H', W'), the map at the size of the network's input, on the CPU; with tiles, at the resolution at
            which the network sees the windows.
        score: its maximum, or as the judgement says.
        judgement: how the score was taken, and what it is compared with for a decision.
    """

    image: PreparedImage
    anomaly: Tensor
    score: float
    judgement: Judgement = BY_MAXIMUM

    @property
    def category(self) -> str:
        """Of the reference that it was compared with; empty where that has none."""
        return self.image.category

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
        box = (first_row, first_column, end_row - first_row, end_column - first_column)
        return self.judgement.within(place_map(self.anomaly, size, box))


def score_images(
    batches: Iterable[tuple[list[PreparedImage], list[Tensor]]],
    judgements: Mapping[str, Judgement],
    on_error: OnError | None = None,
) -> Iterator[tuple[ScoredImage, list[Tensor]]]:
    """Scores image by image what comes in batches; the maps of an image's windows become one.

    Args:
        batches: prepared images, maps (B, H', W') and other tensors (B, ...), on the CPU.
        judgements: how those of a category are scored; others are by their maxima.
        on_error: called with the name and the error of an image that cannot be used, which is then left out; by default
            the error is raised.

    Returns:
        An iterator of scored images and their other tensors, see ``by_image``.

    Raises:
        InputError: a score is not a finite number.
        ImageError: an image of another size than the region of interest.
    """
    for image, (maps, *others) in by_image(batches):
        anomaly = maps if image.windows is None else blend_windows(maps, image.windows)
        try:
            scored = _score(image, anomaly, judgements.get(image.category, BY_MAXIMUM))
        except ImageError as error:
            if on_error is None:
                raise
            on_error(image.name, error)
        else:
            yield scored, others


def _score(image: PreparedImage, anomaly: Tensor, judgement: Judgement) -> ScoredImage:
    counting = None
    if judgement.region is not None:
        check_size(judgement.region, image.size, image.name)
        mask = network_mask(judgement.region, image.box, (anomaly.shape[0], anomaly.shape[1]))
        anomaly, counting = anomaly.where(mask, 0), int(mask.sum())
    score = float(judgement.image_scores(anomaly[None], counting))
    if not math.isfinite(score):
        reason = f"it holds NaN, or its features overflow {anomaly.dtype}"
        raise InputError(f"the score of {image.name} is {score}: {reason}")
    return ScoredImage(image, anomaly, score, judgement)


def blend_windows(maps: Tensor, windows: Windows) -> Tensor:
    """Lays the maps of an image's windows into one, at their resolution.

    Where windows overlap, the value is their mean, weighted by the distance from the edge of each: one fades into the
    next. A window is laid to the nearest pixel of the map.

    Args:
        maps: (T, h, w), row by row.
        windows: where they lie.

    Returns:
        (H', W'); T = 1 gives the map itself.
    """
    maps = maps.unflatten(0, windows.grid)
    strips = _blend_along(maps.permute(1, 3, 0, 2), windows.lefts, windows.width)  # (W', rows, h)
    return _blend_along(strips.permute(1, 2, 0), windows.tops, windows.height)


def _blend_along(parts: Tensor, starts: Sequence[int], extent: int) -> Tensor:
    """Parts (n, length, ...), each of so many pixels of the image from its start on, as one (total, ...)."""
    number, length = parts.shape[:2]
    first = torch.tensor([(start * length + extent // 2) // extent for start in starts])
    places = (first[:, None] + torch.arange(length)).flatten()
    weights = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1)).to(parts.dtype).repeat(number)
    weights /= weights.new_zeros(int(places[-1]) + 1).index_add_(0, places, weights)[places]
    blended = parts.new_zeros(int(places[-1]) + 1, *parts.shape[2:])
    return blended.index_add_(0, places, parts.flatten(0, 1) * weights.view(-1, *[1] * (parts.ndim - 2)))


class MapStack:
    """Maps that come one after the other: those of one size as one tensor, which grows in place.

    A list of them would be in memory twice when it is stacked.
    """

    def __init__(self) -> None:
        self._block, self._used = np.empty(_MAPPED, dtype=np.float32), 0
        self._shape = (0, 0)
        self._apart: list[Tensor] = []  # where their sizes differ

    def add(self, anomaly: Tensor) -> None:
        """Adds a map (H, W), float32."""
        shape, end = (anomaly.shape[0], anomaly.shape[1]), self._used + anomaly.numel()
        if self._used and shape != self._shape:
            self._apart = [one.clone() for one in self._stacked()]
            self._block, self._used = np.empty(0, dtype=np.float32), 0
        if self._apart:
            self._apart.append(anomaly)
            return
        if end > self._block.size:
            self._block.resize(end, refcheck=False)
        self._block[self._used : end] = anomaly.flatten()
        self._shape, self._used = shape, end

    def maps(self) -> Tensor | list[Tensor]:
        """(B, H, W), or a list of (H, W) where sizes differ; then nothing more is added."""
        return self._apart or self._stacked()

    def _stacked(self) -> Tensor:
        self._block.resize(self._used, refcheck=False)
        return torch.from_numpy(self._block).view(-1, *self._shape)


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
