"""The data sets that can be evaluated on: which categories they have, and the images of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adpretrain_hf.errors import InputError, MissingPathError
from training.evaluation.categories import Category, Sample
from training.evaluation.mvtec_layouts import (
    folder_names,
    names_with,
    read_btad,
    read_folder,
    read_mpdd,
    read_mvtec3d,
    read_mvtecad,
)
from training.evaluation.real_iad_split import read_real_iad, real_iad_names
from training.evaluation.visa import read_visa, visa_names

__all__ = ["DATA_SETS", "Category", "Sample", "category_names", "read_category"]


class Reader(NamedTuple):
    """How a data set is read; nothing is ever downloaded."""

    names: Callable[[Path], list[str]]
    read: Callable[[Path, str], Category]


DATA_SETS = {
    "mvtecad": Reader(functools.partial(names_with, training="train/good"), read_mvtecad),
    "visa": Reader(visa_names, read_visa),
    "btad": Reader(functools.partial(names_with, training="train/ok"), read_btad),
    "mvtec3d": Reader(functools.partial(names_with, training="train/good/rgb"), read_mvtec3d),
    "mpdd": Reader(functools.partial(names_with, training="train/good"), read_mpdd),
    "realiad": Reader(real_iad_names, read_real_iad),
    "folder": Reader(folder_names, read_folder),
}


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
    """The images of one category.

    Args:
        data_set, root: see ``category_names``.
        name: of the category.

    Raises:
        MissingPathError, InputError: see ``category_names``; no such category; or what is there is incomplete.
    """
    there = category_names(data_set, root)
    if name not in there:
        raise InputError(f"{data_set} in {root} has no category {name!r}: expected one of {', '.join(there)}")
    return DATA_SETS[data_set].read(Path(root).absolute(), name)
