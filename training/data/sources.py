"""The data of a run: sources joined into one data set, its categories split into training and validation.

Sources are RealIAD, layouts of folders, and whatever the ``datasets`` library loads: Parquet, imagefolder, what it has
saved to disk, data sets on the Hub.
"""

import functools
import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Value, concatenate_datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import EntryNotFoundError

from adpretrain_hf.bundle import check_rights
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.images import read_image
from training import synthetic
from training.data.folders import LAYOUTS, Category, layout_of
from training.data.real_iad import open_real_iad, resolution_of
from training.data.table import FEATURES, Source, file_name, make_table, read_encoded, read_mask_of, refuse
from training.seeds import generator
from training.settings import PretrainSettings

_VALIDATE_EVERY = 8
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        dataset: with the columns of ``FEATURES``.
        training, validation: names of categories; apart, but with ``all_categories``. There is none for validation
            where none has anomalies to judge by.
        groups: positions of the training images in the data set, of each source.
        anomalous: of the anomalous ones among them.
        weights: of the groups, their shares of an epoch; empty for as many as there are of each.
    """

    dataset: Dataset
    training: list[str]
    validation: list[str]
    groups: list[list[int]]
    anomalous: list[int]
    weights: tuple[float, ...] = ()

    @functools.cached_property
    def positions(self) -> list[int]:
        """Of the training images in the data set."""
        return [position for group in self.groups for position in group]

    def epoch_positions(self, seed: int, epoch: int) -> list[int]:
        """The images of an epoch: all, or by the sources' weights some not at all and others more than once."""
        if not self.weights:
            return self.positions
        random, total = generator(seed, "weights", epoch), len(self.positions)
        ends = np.rint(np.cumsum(self.weights) / sum(self.weights) * total).astype(int)
        drawn = []
        for group, number in zip(self.groups, np.diff(ends, prepend=0), strict=True):
            passes = [random.permutation(group) for _ in range(-(-number // len(group)))]
            drawn += np.concatenate([*passes, np.empty(0, int)])[:number].tolist()
        return drawn

    def digest(self) -> str:
        """64 hex digits that tell the images by their names and labels, wherever the folder lies."""
        columns = (self.dataset[name] for name in ("category", "view", "anomaly_class", "sample", "is_anomalous"))
        digest = hashlib.sha256()
        for row in zip(*columns, map(file_name, self.dataset["image"]), strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()


def load_training_data(settings: PretrainSettings, synthetic_folder: Path) -> TrainingData:
    """Opens the sources and splits their categories; ``"synthetic"`` is drawn into a folder, once.

    Of a repository on the Hub, only the categories that are asked for are downloaded.

    Raises:
        InputError: a source cannot be read, two have a category in common, a category that was named is in none, or
            there is no anomaly to learn from.
    """
    sources = open_sources(settings.data, settings.resolution, settings.strict, synthetic_folder)
    names = [name for source in sources for name in source.categories]
    chosen = _choose(names, settings)
    asked = [[name for name in source.categories if name in chosen] for source in sources]
    dataset = concatenate_datasets([source.load(own) for source, own in zip(sources, asked, strict=True) if own])
    training, validation = _split(chosen, dataset, settings)
    trained = [set(training).intersection(own) for own in asked]
    categories, is_anomalous = list(dataset["category"]), list(dataset["is_anomalous"])
    groups = [[number for number, name in enumerate(categories) if name in own] for own in trained]
    anomalous = [position for group in groups for position in group if is_anomalous[position]]
    if not anomalous and (settings.balanced or not settings.paint_defects):
        raise InputError(
            f"none of the {sum(map(len, groups))} training images is anomalous, so that there is nothing to learn: "
            "give anomalous images with masks, or --paint-defects 0.5 without --balanced"
        )
    if settings.weights and not all(groups):
        empty = settings.data[[bool(group) for group in groups].index(False)]
        raise InputError(f"--weights: of {empty} no image is trained on: leave it out of --data, or its categories in")
    return TrainingData(dataset, training, validation, groups, anomalous, settings.weights)


def open_sources(sources: Sequence[str], resolution: str, strict: bool, synthetic_folder: Path) -> list[Source]:
    """Opens all of ``--data``, see ``open_source``; InputError where two have a category in common."""
    opened = [open_source(source, resolution, strict, synthetic_folder) for source in sources]
    number = Counter(name for source in opened for name in source.categories)
    if twice := sorted(name for name, count in number.items() if count > 1):
        raise InputError(f"the categories {twice} are in more than one of --data {[*sources]}: rename them in one")
    return opened


def open_source(source: str, resolution: str, strict: bool, synthetic_folder: Path) -> Source:
    """Opens one of ``--data``: RealIAD, a layout of folders, or whatever the datasets library loads.

    Args:
        source: ``"synthetic"``, a folder, the id of a repository on the Hub, or as of ``is_loadable``.
        resolution, strict: of RealIAD.
        synthetic_folder: where synthetic data are drawn.

    Raises:
        InputError: it cannot be read.
    """
    if source == "synthetic":
        return open_real_iad(synthetic.generate(synthetic_folder), resolution=str(synthetic.SIZE))
    folder = Path(os.path.abspath(source))
    if is_loadable(source):
        return _loaded(source)
    if not folder.is_dir():
        try:
            return open_real_iad(source, resolution=resolution, strict=strict)
        except BundleError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            return _loaded(source)  # it is on the Hub, and is not RealIAD
    if any(entry.is_dir() and resolution_of(entry.name) for entry in folder.iterdir()):
        return open_real_iad(source, resolution=resolution, strict=strict)
    layout = LAYOUTS[layout_of(folder)]
    return Source(layout.names(folder), lambda names: _table_of(layout.read(folder, name) for name in names))


def _loaded(source: str) -> Source:
    table = load_table(source)
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(table["category"]):
        places[name].append(place)
    return Source(sorted(places), lambda names: table.select([place for name in names for place in places[name]]))


def _table_of(categories: Iterable[Category]) -> Dataset:
    """Training and test images together, as of RealIAD, but for anomalous ones without a mask: they teach nothing."""
    rows = [row for category in categories for row in (*category.train, *category.test)]
    without = [row.image for row in rows if row.is_anomalous and row.mask is None]
    if without:
        _LOG.warning("left out %d anomalous images without a mask, such as %s", len(without), without[0])
    return make_table(row for row in rows if row.mask is not None or not row.is_anomalous)


def _choose(names: Sequence[str], settings: PretrainSettings) -> list[str]:
    """The categories that are trained or validated on."""
    _check_known("categories", settings.categories, names)
    _check_known("exclude-categories", settings.exclude_categories, names)
    excluded = set(settings.exclude_categories)
    chosen = [name for name in settings.categories or names if name not in excluded]
    if not chosen:
        raise InputError(f"--categories and --exclude-categories leave none of {sorted(names)}")
    _check_known("validation-categories", settings.validation_categories, chosen)
    return chosen


def _split(chosen: Sequence[str], dataset: Dataset, settings: PretrainSettings) -> tuple[list[str], list[str]]:
    """The categories to train and to validate on: those that are named, or each 8th of those that have anomalies."""
    validation = list(settings.validation_categories)
    if not validation:
        damaged = {name for name, is_one in zip(dataset["category"], dataset["is_anomalous"], strict=True) if is_one}
        validation = [name for name in sorted(chosen) if name in damaged][::_VALIDATE_EVERY]
    if not validation:
        _LOG.warning("no category has anomalous images to judge epochs by: the weights of the last one are kept")
    training = [name for name in chosen if settings.all_categories or name not in validation]
    if not training:
        raise InputError(
            f"no category is left to train on: all of {sorted(chosen)} are for validation. --all-categories trains on "
            "them as well"
        )
    return training, validation


def _check_known(flag: str, asked: Iterable[str], names: Sequence[str]) -> None:
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise InputError(f"--{flag} names {unknown}, expected some of {sorted(names)}")


_BUILDERS = ("parquet", "imagefolder")
_LABELS = ("anomaly", "anomaly_class", "label")
_GOOD, _ANOMALOUS = "good", "anomalous"
_NORMAL = (_GOOD, "ok", "normal", "none", "false", "0")
_HIDDEN = "hidden"  # of an image that does not show the damage of its part: normal, but no reference
_PUSHED = datasets.Features(
    {name: datasets.Image() for name in ("image", "mask")}
    | {name: Value("string") for name in ("category", "view", "anomaly")}
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
    is ``"good"``, ``"ok"``, ``"normal"`` or 0 of normal images, whatever their mask, and ``"hidden"`` of those that do
    not show the damage of their part, and are no references. Without a label, an image is anomalous if it has a mask.
    Anomalous images without a mask, of which nothing can be learned, are left out.

    Args:
        source: see ``is_loadable``, or the id of a repository on the Hub.

    Raises:
        InputError: it cannot be loaded, has no such columns, or lacks an image.
    """
    dataset = _load(source)
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image) and name != "mask"]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None:
        raise InputError(f"{source} has the columns {list(features)}, expected one of images, called image")
    size, label = len(dataset), next((name for name in _LABELS if name in features), None)
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    without = [f"row {row}" for row, one in enumerate(dataset.data.column(image).is_valid().to_pylist()) if not one]
    refuse(without, f"rows of {source} have no image", "leave them out")
    masks: Any = pa.nulls(size, datasets.Image().pa_type)
    has_mask = [False] * size
    if "mask" in features:
        if not isinstance(features["mask"], datasets.Image) and features["mask"] != Value("string"):
            raise InputError(f"the column mask of {source} is of {features['mask']}, expected images or their paths")
        dataset = dataset.cast_column("mask", datasets.Image(decode=False))
        masks = dataset.data.column("mask")
        has_mask = masks.is_valid().to_pylist()
    labels = _texts(dataset, label, "")
    kinds = list(map(_kind, labels, has_mask))
    is_anomalous = [kind == _ANOMALOUS for kind in kinds]
    places = (row if one else None for row, one in enumerate(is_anomalous))  # normal ones may have masks, all black
    masks = masks.take(pa.array(places, pa.int64()))
    columns = {
        "image": dataset.data.column(image),
        "mask": masks,
        "category": _texts(dataset, "category", Path(source.partition(":")[2] or source).name),
        "view": _texts(dataset, "view", ""),
        "anomaly_class": labels,
        "is_anomalous": is_anomalous,
        "is_good": [kind == _GOOD for kind in kinds],
        "sample": list(map(str, range(size))),
    }
    table = Dataset(pa.table(columns, schema=FEATURES.arrow_schema), info=datasets.DatasetInfo(features=FEATURES))
    usable = [place for place, (one, mask) in enumerate(zip(is_anomalous, has_mask, strict=True)) if mask or not one]
    if len(usable) < size:
        _LOG.warning("%s: left out %d anomalous images without a mask", source, size - len(usable))
    return table.select(usable)


def _kind(label: str, has_mask: bool) -> str:
    """Whether an image is good, hidden or anomalous: by its label, and where that is empty by its mask."""
    word = label.strip().lower().removesuffix(".0")  # integers of which some are missing are floats in pandas
    if word in ("", "nan"):
        return _ANOMALOUS if has_mask else _GOOD
    return word if word == _HIDDEN else _GOOD if word in _NORMAL else _ANOMALOUS


def push_sources(
    sources: Sequence[str], repository: str, *, resolution: str = "512", strict: bool = True, public: bool = False
) -> str:
    """Pushes sources to the Hub as one data set of Parquet files, and returns the commit's address.

    With the columns ``image``, ``mask``, ``category``, ``view`` and ``anomaly``, see ``load_table``;
    ``load_dataset(repository, streaming=True)`` reads it row by row.

    Args:
        sources: see ``open_source``; whatever their images lie in is read.
        repository: ``owner/name``; made if it is not there.
        resolution, strict: of RealIAD.
        public: a new one is private otherwise.

    Raises:
        InputError: see ``open_sources`` and ``check_rights``; an image or a mask cannot be used.
    """
    check_rights(repository, repo_type="dataset")
    with TemporaryDirectory() as folder:
        opened = open_sources(sources, resolution, strict, Path(folder) / "synthetic")
        table = concatenate_datasets([source.load(source.categories) for source in opened])
        try:
            rows = Dataset.from_generator(_rows, features=_PUSHED, gen_kwargs={"table": table}, cache_dir=folder)
        except DatasetsError as error:
            raise (error.__cause__ if isinstance(error.__cause__, InputError) else error) from None
        return str(rows.push_to_hub(repository, private=not public).commit_url)


def _rows(table: Dataset) -> Iterator[dict[str, Any]]:
    def file(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"bytes": read_encoded(entry), "path": file_name(entry)}

    for row in table:
        image, place = file(row["image"]), str(row["image"]["path"])
        picture = read_image(image["bytes"], place)
        if row["mask"] is not None:
            read_mask_of(row["mask"], picture.size, place)
        name = row["anomaly_class"]
        if not row["is_anomalous"]:
            name = _GOOD if row["is_good"] else _HIDDEN
        elif _kind(name, True) != _ANOMALOUS:
            name = f"defect {name}"  # a kind that is called 0 or ok would be read as normal
        mask = row["mask"] and file(row["mask"])
        yield {"image": image, "mask": mask, "category": row["category"], "view": row["view"], "anomaly": name}


def _load(source: str) -> Dataset:
    builder, _, folder = source.partition(":")
    try:
        if builder in _BUILDERS:
            loaded = datasets.load_dataset(builder, data_dir=folder)
        elif (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"{source} cannot be loaded by datasets: {error}") from error
    parts = list(loaded.values()) if isinstance(loaded, datasets.DatasetDict) else [loaded]
    return concatenate_datasets(parts).flatten_indices()


def _texts(dataset: Dataset, column: str | None, default: str) -> list[str]:
    """A column as texts; the default for all where there is none, and where it is empty."""
    if column is None or column not in dataset.features:
        return [default] * len(dataset)
    feature = dataset.features[column]
    values = dataset.data.column(column).to_pylist()
    text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    return [default if value is None else text(value) for value in values]
