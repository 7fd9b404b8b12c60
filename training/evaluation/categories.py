"""The images of one category of a data set, whatever layout they come in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adpretrain_hf.errors import InputError
from training.refusal import refuse


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        image: its path.
        mask: of its anomalies, any non-zero pixel is one; None for normal images, or where it is not known.
        is_anomalous: its label.
        defect: the kind of its anomaly, as the data set calls it.
    """

    image: Path
    mask: Path | None
    is_anomalous: bool
    defect: str


@dataclass(frozen=True)
class Category:
    """One category, in order of the images' paths.

    Attributes:
        data_set: its name in ``DATA_SETS``.
        name: of the category.
        train: normal images.
        test: normal and anomalous images.
    """

    data_set: str
    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def make_category(data_set: str, name: str, train: Iterable[Sample], test: Iterable[Sample]) -> Category:
    """A category that can be evaluated.

    Raises:
        InputError: no normal image to train on, not both normal and anomalous ones to test on, an image or a mask that
            is not there or of a lossy kind, or masks of some anomalous images only.
    """
    in_order = [sorted(samples, key=lambda sample: sample.image) for samples in (train, test)]
    category = Category(data_set, name, tuple(in_order[0]), tuple(in_order[1]))
    where = f"the category {name!r} of {data_set}"
    if not category.train or any(sample.is_anomalous for sample in category.train):
        raise InputError(f"{where} has {len(category.train)} training images, expected normal ones, at least 1")
    for is_anomalous, kind in ((True, "anomalous"), (False, "normal")):
        if not any(sample.is_anomalous == is_anomalous for sample in category.test):
            raise InputError(f"{where} has no {kind} test image: nothing can be measured without one")
    _refuse_missing(category, where)
    return category


def _refuse_missing(category: Category, where: str) -> None:
    remedy = "unpack or download the data set again"
    samples = [*category.train, *category.test]
    refuse(
        [str(sample.image) for sample in samples if not sample.image.is_file()],
        f"images of {where} are missing",
        remedy,
    )
    masks = [sample.mask for sample in category.test if sample.mask]
    refuse([str(mask) for mask in masks if not mask.is_file()], f"masks of {where} are missing", remedy)
    lossy = [str(mask) for mask in masks if mask.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif")]
    exact = "whatever is not 0 is a defect, and they do not keep 0: convert them to PNG, 0 where there is none"
    refuse(lossy, f"masks of {where} are no PNG, BMP, TIFF or PGM", exact)
    if masks:  # without any, images alone are measured
        without = [str(sample.image) for sample in category.test if sample.is_anomalous and not sample.mask]
        refuse(without, f"anomalous images of {where} have no mask, others do", remedy)
