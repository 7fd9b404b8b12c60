"""Data sets that the ``datasets`` library loads: Parquet, imagefolder, saved to disk, on the Hub; and pushing there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from adpretrain_hf.errors import InputError
from training.data.table import FEATURES, read_encoded

_LOG = logging.getLogger(__name__)
_BUILDERS = ("parquet", "imagefolder")
_LABELS = ("anomaly", "anomaly_class", "label")
_NORMAL = ("", "good", "ok", "normal", "none", "false", "0")
_HIDDEN = "hidden"  # of an image that does not show the damage of its part: normal, but no reference
_PUSHED = Features(
    {"image": Image(), "mask": Image(), **{name: Value("string") for name in ("category", "view", "anomaly")}}
)


def is_loadable(source: str) -> bool:
    """Whether a source is ``parquet:FOLDER``, ``imagefolder:FOLDER``, or a folder that the library has written."""
    folder, written = Path(source), ("state.json", "dataset_dict.json", "metadata.csv", "metadata.jsonl")
    if source.partition(":")[0] in _BUILDERS or any((folder / name).is_file() for name in written):
        return True
    return any(True for pattern in ("*.parquet", "data/*.parquet") for _ in folder.glob(pattern))


def load_table(source: str) -> Dataset:
    """Loads a data set, all of its splits, as the table of a run.

    Its columns: ``image``, or the only one of images; ``mask``, an image in which what is not 0 is a defect, or None;
    ``category`` (one of the source's name by default), ``view``; and ``anomaly``, ``anomaly_class`` or ``label``, which
    is ``"good"``, ``"ok"`` or ``"normal"`` of normal images, and ``"hidden"`` of those that do not show the damage of
    their part, and are no references. Without a label, an image is anomalous if it has a mask. Anomalous images without
    a mask, of which nothing can be learned, are left out.

    Args:
        source: see ``is_loadable``, or the id of a repository on the Hub.

    Raises:
        InputError: it cannot be loaded, or has no such columns.
    """
    dataset = _load(source)
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, Image) and name != "mask"]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None:
        raise InputError(f"{source} has the columns {list(features)}, expected one of images, called image")
    size, label = len(dataset), next((name for name in _LABELS if name in features), None)
    dataset = dataset.cast_column(image, Image(decode=False))
    masks: Any = pa.nulls(size, Image().pa_type)
    has_mask = [False] * size
    if "mask" in features:
        dataset = dataset.cast_column("mask", Image(decode=False))
        masks = dataset.data.column("mask")
        has_mask = masks.is_valid().to_pylist()
    labels = _texts(dataset, label, "")
    is_anomalous = has_mask if label is None else [text.lower() not in (*_NORMAL, _HIDDEN) for text in labels]
    columns = {
        "image": dataset.data.column(image),
        "mask": masks,
        "category": _texts(dataset, "category", Path(source.partition(":")[2] or source).name),
        "view": _texts(dataset, "view", ""),
        "anomaly_class": labels,
        "is_anomalous": is_anomalous,
        "is_good": [not one and text != _HIDDEN for one, text in zip(is_anomalous, labels, strict=True)],
        "sample": list(map(str, range(size))),
    }
    table = Dataset(pa.table(columns, schema=FEATURES.arrow_schema), info=DatasetInfo(features=FEATURES))
    usable = [place for place, (one, mask) in enumerate(zip(is_anomalous, has_mask, strict=True)) if mask or not one]
    if len(usable) < size:
        _LOG.warning("%s: left out %d anomalous images without a mask", source, size - len(usable))
    return table.select(usable)


def push_table(table: Dataset, repository: str, *, public: bool = False) -> str:
    """Pushes a table to the Hub as Parquet, and returns the commit's address.

    With the columns ``image``, ``mask``, ``category``, ``view`` and ``anomaly``, see ``load_table``;
    ``load_dataset(repository, streaming=True)`` reads it row by row.

    Args:
        table: with the columns of ``FEATURES``; whatever its images lie in is read.
        repository: ``owner/name``; made if it is not there.
        public: a new one is private otherwise.
    """
    with TemporaryDirectory() as folder:
        rows = Dataset.from_generator(_rows, features=_PUSHED, gen_kwargs={"table": table}, cache_dir=folder)
        return str(rows.push_to_hub(repository, private=not public).commit_url)


def _rows(table: Dataset) -> Iterator[dict[str, Any]]:
    for row in table:
        normal = "good" if row["is_good"] else _HIDDEN
        yield {
            "image": _file(row["image"]),
            "mask": row["mask"] and _file(row["mask"]),
            "category": row["category"],
            "view": row["view"],
            "anomaly": row["anomaly_class"] if row["is_anomalous"] else normal,
        }


def _file(entry: Mapping[str, Any]) -> dict[str, Any]:
    name = os.path.basename(str(entry["path"]).partition("::")[0])
    return {"bytes": read_encoded(entry), "path": name}


def _load(source: str) -> Dataset:
    builder, _, folder = source.partition(":")
    try:
        if builder in _BUILDERS:
            loaded = load_dataset(builder, data_dir=folder)
        elif (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            loaded = load_from_disk(source)
        else:
            loaded = load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"{source} cannot be loaded by datasets: {error}") from error
    parts = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    return concatenate_datasets(parts).flatten_indices()


def _texts(dataset: Dataset, column: str | None, default: str) -> list[str]:
    """A column as texts; the default for all where there is none, and where it is empty."""
    if column is None or column not in dataset.features:
        return [default] * len(dataset)
    feature = dataset.features[column]
    values = dataset.data.column(column).to_pylist()
    names = feature.int2str(values) if isinstance(feature, ClassLabel) else values
    return [default if name is None else str(name) for name in names]
