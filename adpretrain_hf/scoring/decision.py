"""From a score to a decision, by what normal images score: split conformal p-values.

Of n calibration scores, a score s has p = (1 + #{scores >= s}) / (n + 1), and is anomalous at a false-alarm rate of
alpha where p <= alpha. As long as normal images are exchangeable with those of the calibration, at most a share of
alpha of them is called anomalous, whatever the scores' distribution is (Vovk, Gammerman and Shafer, 2005; Bates et al.,
2023, "Testing for outliers with conformal p-values").
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.scoring.interest import region_at, region_mask

IMAGE_SCORES = ("max", "top")
_ROUNDING = 1e-9  # 0.29 x 100 is less than 29
_FAR = 5  # interquartile ranges above the upper quartile


@dataclass(frozen=True)
class Calibration:
    """What normal images of a product score.

    Attributes:
        scores: of n images, ascending.
        peaks: the maxima of their maps, ascending; empty where they are the scores.
        typical: the median over the images of the medians of their maps: the value of an ordinary pixel.
        made_by: identity of what computed the scores, see ``extractor.scoring_identity``.
        approximate: whether the images are the references, each compared with the others (leave-one-out): the others
            are fewer than a new image is compared with, and the scores depend on each other, so that the rate of false
            alarms is kept about, not as a promise.
        false_alarms: alpha where none is given; the smallest rate that n images allow, but at least 0.01, by default.

    Raises:
        InputError: no scores, scores that are not finite, or a rate that n images do not allow.
    """

    scores: tuple[float, ...]
    peaks: tuple[float, ...] = ()
    typical: float = 0.0
    made_by: str = ""
    approximate: bool = False
    false_alarms: float | None = None

    def __post_init__(self) -> None:
        for name in ("scores", "peaks"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        if not self.scores or not all(map(math.isfinite, (*self.scores, *self.peaks, self.typical))):
            raise InputError(f"the calibration scores are {self.scores[:8]}, expected at least one, all finite")
        if self.false_alarms is None:
            object.__setattr__(self, "false_alarms", max(0.01, self.smallest_rate))
        self.threshold()

    def __str__(self) -> str:
        kind = "normal images" + (", references compared with the others: about" if self.approximate else ":")
        return f"{len(self.scores)} {kind} {self.false_alarms:.3g} of normal images are called anomalous"

    @property
    def smallest_rate(self) -> float:
        """1 / (n + 1), the smallest p-value and so the smallest false-alarm rate that n images allow."""
        return 1 / (len(self.scores) + 1)

    @cached_property
    def scale(self) -> float:
        """The spread of normal scores: their standard deviation, but at least 1 % of their mean."""
        return max(float(np.std(self.scores)), 0.01 * abs(float(np.mean(self.scores))), 1e-6)

    def threshold(self, alpha: float | None = None) -> float:
        """The score that an anomalous image exceeds: p <= alpha above it, and nowhere else.

        Args:
            alpha: the false-alarm rate; ``false_alarms`` by default.

        Raises:
            InputError: a rate outside (0, 1), or one that n images do not allow.
        """
        return self.scores[-self._rank(alpha)]

    def pixel_threshold(self, alpha: float | None = None) -> float:
        """The value that at most a share of alpha of the normal images exceed anywhere in their maps; see above."""
        return (self.peaks or self.scores)[-self._rank(alpha)]

    def p_value(self, score: float) -> float:
        """(1 + #{calibration scores >= score}) / (n + 1)."""
        number = len(self.scores)
        return (1 + number - bisect_left(self.scores, score)) / (number + 1)

    def is_anomalous(self, score: float, alpha: float | None = None) -> bool:
        """Whether p <= alpha; see ``threshold``."""
        return score > self.threshold(alpha)

    def is_borderline(self, score: float, alpha: float | None = None, band: float = 1.0) -> bool:
        """Whether a score lies within ``band`` times ``scale`` of the threshold, on either side: one to look at."""
        return abs(score - self.threshold(alpha)) <= band * self.scale

    def confidence(self, score: float, alpha: float | None = None) -> float:
        """How clearly a score is anomalous, from 0 to 1, comparable between products.

        ``sigmoid((score - t) / scale)``, 0.5 at the threshold t of alpha. It is no probability of a defect:
        nothing is known of how often there are any.
        """
        return 0.5 * (1 + math.tanh((score - self.threshold(alpha)) / self.scale / 2))

    @property
    def outliers(self) -> int:
        """How many scores lie more than 5 interquartile ranges above the upper quartile: those of anomalies?"""
        low, high = np.quantile(self.scores, (0.25, 0.75))
        return int(np.sum(np.array(self.scores) > high + _FAR * max(high - low, 0.01 * abs(high))))

    def _rank(self, alpha: float | None) -> int:
        return rank_of_threshold(self.false_alarms if alpha is None else alpha, len(self.scores))


def rank_of_threshold(alpha: Any, number: int) -> int:
    """k, of which calibration score from the top is the threshold: the largest whole number <= alpha (n + 1).

    Args:
        alpha: the false-alarm rate.
        number: n, of the calibration images.

    Raises:
        InputError: a rate outside (0, 1), or one that n images do not allow.
    """
    rate = float(alpha) if isinstance(alpha, Real) else math.nan
    if not 0 < rate < 1:
        raise InputError(f"the false-alarm rate is {alpha!r}, expected a number above 0 and below 1")
    rank = math.floor(rate * (number + 1) + _ROUNDING)
    if not rank:
        needed = math.ceil(1 / rate - 1 - _ROUNDING)
        raise InputError(
            f"a false-alarm rate of {alpha} cannot be promised by {number} calibration images: it needs at least "
            f"{needed}, and the smallest rate that {number} allow is {1 / (number + 1):.4g}"
        )
    return rank


@dataclass(frozen=True)
class Judgement:
    """How a product's anomaly maps become scores and decisions; a part of its bank.

    Attributes:
        image_score: ``"max"``, the maximum of the map, or ``"top"``, the mean of its highest pixels.
        top: their share of the pixels that count.
        region: the region of interest as ``encode_region`` gives it, or None: all pixels count. Maps are 0 outside.
        calibration: what normal images score, or None: then there are scores and no decisions.

    Raises:
        InputError: another image score, a share out of its range, or a damaged region.
    """

    image_score: str = "max"
    top: float = 0.005
    region: str | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.image_score not in IMAGE_SCORES:
            raise InputError(f"image_score is {self.image_score!r}, expected one of {IMAGE_SCORES}")
        if not isinstance(self.top, Real) or not 0 < self.top <= 1:
            raise InputError(f"top is {self.top!r}, expected the share of a map's pixels, above 0 and at most 1")
        if self.region is not None:
            region_mask(self.region)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Judgement":
        """Reads what ``to_dict`` wrote."""
        calibration = values.get("calibration")
        return cls(**dict(values) | {"calibration": Calibration(**calibration) if calibration else None})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def calibrated(self, calibration: Calibration | None) -> "Judgement":
        """The same with another calibration, or without one."""
        return replace(self, calibration=calibration)

    def image_scores(self, maps: Tensor, counting: int | None = None) -> Tensor:
        """Anomaly maps (B, H, W) to scores (B,); ``counting``: how many of their pixels count, all by default."""
        if self.image_score == "max":
            return maps.amax(dim=(1, 2))
        pixels = maps.flatten(1)
        return pixels.topk(max(1, round(self.top * (counting or pixels.shape[1]))), dim=1).values.mean(dim=1)

    def within(self, anomaly: Tensor) -> Tensor:
        """A map of the whole image, (H, W), with 0 where nothing counts."""
        return anomaly if self.region is None else anomaly.where(region_at(self.region, tuple(anomaly.shape)), 0)


BY_MAXIMUM = Judgement()
"""The published one: the maximum of the map, and no decision."""


def required(calibration: Calibration | None) -> Calibration:
    """The calibration that a decision needs.

    Raises:
        InputError: there is none.
    """
    if calibration is None:
        raise InputError(
            "a decision needs a calibrated reference, and this one has no calibration that was made by this extractor: "
            "make_reference(images, calibrate=more_normal_images), extractor.calibrate(bank, normal_images), or "
            "adpretrain reference --calibrate"
        )
    return calibration


@contextmanager
def of_product(category: str) -> Iterator[None]:
    """What is wrong inside is told of the product, where it has a name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{category}: {error}" if category else str(error)) from error
