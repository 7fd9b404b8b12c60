"""VisA, read where it lies: anomalib copies it into another layout first, which takes its size on disk again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from adpretrain_hf.errors import InputError
from training.evaluation.categories import Category, Sample, make_category

_SPLIT = "split_csv/1cls.csv"
_COLUMNS = ["object", "split", "label", "image", "mask"]


def visa_names(root: Path) -> list[str]:
    """The categories that the published split names."""
    return sorted(_split(root)["object"].unique())


def read_visa(root: Path, name: str) -> Category:
    """``<category>/Data/Images/{Normal,Anomaly}/*.JPG`` and ``Data/Masks/Anomaly/*.png``, split by ``1cls.csv``."""
    rows = _split(root)
    rows = rows[rows["object"] == name]
    parts = {
        split: [_sample(root, row) for row in rows[rows["split"] == split].to_dict("records")]
        for split in ("train", "test")
    }
    return make_category("visa", name, parts["train"], parts["test"])


def _sample(root: Path, row: dict[str, str]) -> Sample:
    is_anomalous = row["label"] != "normal"
    mask = root / row["mask"] if is_anomalous and row["mask"] else None
    return Sample(root / row["image"], mask, is_anomalous, row["label"])


def _split(root: Path) -> pd.DataFrame:
    path = root / _SPLIT
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): it comes with VisA and says what to train on") from error
    if list(frame.columns) != _COLUMNS:
        raise InputError(f"{path} has the columns {list(frame.columns)}, expected {_COLUMNS}")
    return frame
