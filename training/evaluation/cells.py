"""A cell of an evaluation: one detector on one category, with everything that decides its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from adpretrain_hf.errors import InputError

FEATURES = ("raw", "residual", "pretrained")


@dataclass(frozen=True, order=True)
class Cell:
    """Everything that decides one result.

    Attributes:
        data_set: e.g. ``"mvtecad"``.
        category: of the data set.
        detector: e.g. ``"patchcore"``.
        features: one of ``FEATURES``.
        variant: of the bundle's projectors; ``""`` where none are used.
        shots: reference images that residuals are taken against.
        noise: share of anomalous images in the training data, from 0.0 to 0.2.
        fraction: of the normal training images that a detector is fitted on, in (0, 1].
        seed: of all that is drawn.
    """

    data_set: str
    category: str
    detector: str
    features: str
    variant: str
    shots: int
    noise: float
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("noise", "fraction"):  # 1 and 1.0 are one cell, and one file
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.features not in FEATURES:
            raise InputError(f"unknown features {self.features!r}: expected one of {', '.join(FEATURES)}")
        if (self.variant != "") != (self.features == "pretrained"):
            raise InputError(f"features {self.features!r} with variant {self.variant!r}: only pretrained ones have one")
        if self.shots < 1:
            raise InputError(f"shots is {self.shots}, expected a number of reference images >= 1")
        if not 0 <= self.noise <= 0.2:
            raise InputError(f"noise is {self.noise}, expected a share of anomalous images from 0 to 0.2")
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction is {self.fraction}, expected a share of the training images in (0, 1]")

    @property
    def name(self) -> str:
        """A file name, without a suffix, that only this cell has."""
        return "__".join(str(value) or "-" for value in asdict(self).values()).replace("/", "_")

    def without_category(self) -> Cell:
        """What cells have in common that one model for all categories serves."""
        return replace(self, category="")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """Reads what ``to_dict`` gave; other keys are left alone."""
        return cls(**{one.name: values[one.name] for one in fields(cls)})
