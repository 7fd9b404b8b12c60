"""The data sets that can be evaluated on: which categories they have, and the images of each."""

from __future__ import annotations

from pathlib import Path

from adpretrain_hf.errors import InputError, MissingPathError
from training.data.folders import LAYOUTS, Category, Layout, Sample
from training.evaluation.real_iad_split import read_real_iad, real_iad_names
from training.refusal import refuse

__all__ = ["DATA_SETS", "Category", "Sample", "category_names", "read_category"]

DATA_SETS = {name: layout for name, layout in LAYOUTS.items() if name != "images"}  # in which there is no anomaly
DATA_SETS["realiad"] = Layout(real_iad_names, read_real_iad)


def category_names(data_set: str, root: str | Path) -> list[str]:
    """The categories of a data set, in alphabetical order.

    Args:
        data_set: one of ``DATA_SETS``.
        root: its folder.

    Raises:
        MissingPathError: no such folder.
        InputError: an unknown data set, or nothing in the folder that looks like it.
    """
    if data_set not in DATA_SETS:
        raise InputError(f"unknown data set {data_set!r}: expected one of {', '.join(DATA_SETS)}")
    folder = Path(root).absolute()
    if not folder.is_dir():
        raise MissingPathError(f"no folder {root} to read {data_set} from: give the one that it was unpacked to")
    names = DATA_SETS[data_set].names(folder)
    if not names:
        raise InputError(f"{root} has no category in the layout of {data_set}: give the folder with its categories")
    return names


def read_category(data_set: str, root: str | Path, name: str) -> Category:
    """The images of one category that can be evaluated.

    Raises:
        MissingPathError, InputError: see ``category_names``; no such category; no normal image to train on, not both
            normal and anomalous ones to test on, an image or a mask that is not there or of a lossy kind, or masks of
            some anomalous images only.
    """
    there = category_names(data_set, root)
    if name not in there:
        raise InputError(f"{data_set} in {root} has no category {name!r}: expected one of {', '.join(there)}")
    category = DATA_SETS[data_set].read(Path(root).absolute(), name)
    _check(category, f"the category {name!r} of {data_set}")
    return category


def _check(category: Category, where: str) -> None:
    if not category.train or any(sample.is_anomalous for sample in category.train):
        raise InputError(f"{where} has {len(category.train)} training images, expected normal ones, at least 1")
    for is_anomalous, kind in ((True, "anomalous"), (False, "normal")):
        if not any(sample.is_anomalous == is_anomalous for sample in category.test):
            raise InputError(f"{where} has no {kind} test image: nothing can be measured without one")
    remedy = "unpack or download the data set again"
    images = [sample.image for sample in (*category.train, *category.test)]
    refuse([str(image) for image in images if not image.is_file()], f"images of {where} are missing", remedy)
    masks = [sample.mask for sample in category.test if sample.mask]
    refuse([str(mask) for mask in masks if not mask.is_file()], f"masks of {where} are missing", remedy)
    if masks:  # without any, images alone are measured
        without = [str(sample.image) for sample in category.test if sample.is_anomalous and not sample.mask]
        refuse(without, f"anomalous images of {where} have no mask, others do", remedy)
