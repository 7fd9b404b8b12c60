"""The images of a ``datasets.Dataset``, by row: encoded bytes or paths, read as files are and not by ``datasets``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import ImageSource, decode_image

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetImages:
    """The images of a data set, in the order of its rows.

    Args:
        dataset: the data set; its formats and transforms are left aside.
        column: the column of the images; by default the only one of the kind ``Image``.

    Attributes:
        names: what errors call an image (``"row 7"``), and its name in the results, the zero-padded number of its row.

    Raises:
        InputError: no rows, no such column, or several to choose from.
    """

    def __init__(self, dataset: Dataset, column: str | None = None) -> None:
        from datasets import Image

        column = _image_column(dataset, column)
        if not len(dataset):
            raise InputError("the data set has no rows: expected at least one image")
        self._column = column
        # Of the whole data set, for that of the selected column depends on how datasets hashes its own functions.
        self._identity = f"{dataset._fingerprint} {column}"
        self._rows = dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
        digits = len(str(len(dataset) - 1))
        self.names = {f"row {number}": f"{number:0{digits}}" for number in range(len(dataset))}

    def source(self, image: str) -> ImageSource:
        """An image, decoded, or its path where the data set holds only that.

        Raises:
            ImageError: the row holds none, or one that cannot be read.
        """
        encoded = self._rows[int(image.removeprefix("row "))][self._column] or {}
        if encoded.get("bytes") is not None:
            return decode_image(encoded["bytes"], image)
        if encoded.get("path") is not None:
            return Path(encoded["path"])
        raise ImageError(f"{image} of the data set holds no image")

    def identity(self, image: str) -> str:
        """What changes when an image does: the fingerprint of the data set, for all its rows together."""
        return self._identity


def is_dataset(images: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; nobody has one who has not imported ``datasets``."""
    return isinstance(images, getattr(sys.modules.get("datasets"), "Dataset", ()))


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` writes."""
    is_one = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    return is_one or (path / "dataset_dict.json").is_file()


def load_dataset(folder: Path) -> Dataset:
    """Opens what ``Dataset.save_to_disk`` wrote; the rows stay on the disk.

    Raises:
        InputError: ``datasets`` is not installed, the folder holds several data sets, or a damaged one.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise InputError(
            f"{folder} is a data set, and datasets is not installed: pip install 'datasets>=4.0'"
        ) from error
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise InputError(f"{folder} holds several data sets: give one of them, {folder.name}/{{{','.join(parts)}}}")
    try:
        return Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a readable data set: {error}") from error


def _image_column(dataset: Dataset, column: str | None) -> str:
    from datasets import Image

    features = dataset.features
    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if column is not None and column not in columns:
        raise InputError(f"the data set has no column of images called {column!r}, only {columns}")
    if not columns:
        raise InputError(
            f"the data set has no column of images: its columns are {list(features)}; cast one to datasets.Image"
        )
    if column is None and len(columns) > 1:
        raise InputError(f"the data set has several columns of images, {columns}: name one (--image-column)")
    return column or columns[0]
