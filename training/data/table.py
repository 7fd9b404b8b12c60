"""The table of a run's images: a ``datasets.Dataset`` with one row for each, whatever they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset, Features, Image, Value

FEATURES = Features(
    {
        "image": Image(decode=False),
        "mask": Image(decode=False),
        "category": Value("string"),
        "view": Value("string"),
        "anomaly_class": Value("string"),
        "is_anomalous": Value("bool"),
        "is_good": Value("bool"),
        "sample": Value("string"),
    }
)


class Row(NamedTuple):
    """One image, whose columns are those of ``FEATURES``.

    Attributes:
        image, mask: paths, or ``zip://<member>::<zip>``; the mask is None where there is no defect.
        category: of the product.
        view: of the camera, such as ``"C1"``; empty where there is but one.
        anomaly_class: as the data set calls it, e.g. ``"OK"`` or ``"scratch"``.
        is_anomalous: whether it shows a defect.
        is_good: whether it shows an undamaged part, and may be a reference.
        sample: of the part that it shows.
    """

    image: str
    mask: str | None
    category: str
    view: str
    anomaly_class: str
    is_anomalous: bool
    is_good: bool
    sample: str


def make_table(rows: Iterable[Row]) -> Dataset:
    """The table of some rows, of which there is at least one."""
    columns = zip(*rows, strict=True)
    # As Arrow arrays, or datasets would look for each file on the disk.
    arrays = {
        name: pa.array(column, pa.bool_() if name.startswith("is_") else pa.string())
        for name, column in zip(FEATURES, columns, strict=True)
    }
    return Dataset.from_dict(arrays, features=FEATURES)
