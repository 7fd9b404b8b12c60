"""The data of a run: sources joined into one data set, its categories split into training and validation."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from huggingface_hub.errors import EntryNotFoundError

from adpretrain_hf.errors import BundleError, InputError
from training import synthetic
from training.data.folders import LAYOUTS, Category, layout_of
from training.data.loaded import is_loadable, load_table
from training.data.real_iad import list_categories, load_real_iad
from training.data.real_iad_files import resolution_of
from training.data.table import Row, make_table
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
        names = (os.path.basename(str(entry["path"]).partition("::")[0]) for entry in self.dataset["image"])
        digest = hashlib.sha256()
        for row in zip(*columns, names, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()


def load_training_data(settings: PretrainSettings, synthetic_folder: Path) -> TrainingData:
    """Opens the sources and splits their categories; ``"synthetic"`` is drawn into a folder, once.

    Of a repository on the Hub, only the categories that are asked for are downloaded.

    Raises:
        InputError: a source cannot be read, two have a category in common, a category that was named is in none, or
            there is no anomaly to learn from.
    """
    options: dict[str, Any] = {"resolution": settings.resolution, "strict": settings.strict}
    sources = [open_source(source, synthetic_folder=synthetic_folder, **options) for source in settings.data]
    names = [name for source in sources for name in source.categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"the categories {twice} are in more than one of --data {list(settings.data)}: rename them in one"
        )
    chosen = _choose(names, settings)
    parts = [(source.categories, [name for name in source.categories if name in chosen]) for source in sources]
    dataset = concatenate_datasets([source.load(own) for source, (_, own) in zip(sources, parts, strict=True) if own])
    training, validation = _split(chosen, dataset, settings)
    trained, categories = set(training), list(dataset["category"])
    groups = [
        [number for number, name in enumerate(categories) if name in own and name in trained]
        for own in (set(every) for every, _ in parts)
    ]
    is_anomalous = list(dataset["is_anomalous"])
    anomalous = [position for group in groups for position in group if is_anomalous[position]]
    if not anomalous and not settings.paint_defects:
        raise InputError(
            f"none of the {sum(map(len, groups))} training images is anomalous, so that there is nothing to learn: "
            "give anomalous images with masks, or --paint-defects 0.5"
        )
    if settings.weights and not all(groups):
        empty = settings.data[[bool(group) for group in groups].index(False)]
        raise InputError(f"--weights: of {empty} no image is trained on: leave it out of --data, or its categories in")
    return TrainingData(dataset, training, validation, groups, anomalous, settings.weights)


class Source(NamedTuple):
    """A place that images come from.

    Attributes:
        categories: their names.
        load: some of them, at least one.
    """

    categories: list[str]
    load: Callable[[list[str]], Dataset]


def open_source(source: str, *, resolution: str, strict: bool, synthetic_folder: Path) -> Source:
    """Opens one of ``--data``: RealIAD, a layout of folders, or whatever the datasets library loads.

    Args:
        source: ``"synthetic"``, a folder, the id of a repository on the Hub, or as of ``is_loadable``.
        resolution, strict: of RealIAD.
        synthetic_folder: where synthetic data are drawn.

    Raises:
        InputError: it cannot be read.
    """
    if source == "synthetic":
        return _real_iad(synthetic.generate(synthetic_folder), str(synthetic.SIZE))
    folder = Path(os.path.abspath(source))
    if is_loadable(source):
        return _loaded(source)
    if not folder.is_dir():
        try:
            return _real_iad(source, resolution, strict)
        except BundleError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            return _loaded(source)  # it is on the Hub, and is not RealIAD
    if any(entry.is_dir() and resolution_of(entry.name) for entry in folder.iterdir()):
        return _real_iad(source, resolution, strict)
    layout = LAYOUTS[layout_of(folder)]
    return Source(layout.names(folder), lambda names: _table_of(layout.read(folder, name) for name in names))


def _real_iad(place: str | Path, resolution: str, strict: bool = True) -> Source:
    names = list_categories(place, resolution=resolution)
    return Source(names, lambda wanted: load_real_iad(place, resolution=resolution, categories=wanted, strict=strict))


def _loaded(source: str) -> Source:
    table = load_table(source)
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(table["category"]):
        places[name].append(place)
    return Source(sorted(places), lambda names: table.select([place for name in names for place in places[name]]))


def _table_of(categories: Iterable[Category]) -> Dataset:
    """Training and test images together, as of RealIAD, but for anomalous ones without a mask: they teach nothing."""
    rows, without = list[Row](), list[str]()
    for category in categories:
        for sample in (*category.train, *category.test):
            if sample.is_anomalous and sample.mask is None:
                without.append(str(sample.image))
                continue
            mask = None if sample.mask is None else str(sample.mask)
            labels = sample.defect, sample.is_anomalous, not sample.is_anomalous
            rows.append(Row(str(sample.image), mask, category.name, "", *labels, sample.image.stem))
    if without:
        _LOG.warning("left out %d anomalous images without a mask, such as %s", len(without), without[0])
    return make_table(rows)


def _choose(names: Sequence[str], settings: PretrainSettings) -> list[str]:
    """The categories that are trained or validated on."""
    _check_known("categories", settings.categories, names)
    _check_known("exclude-categories", settings.exclude_categories, names)
    excluded = set(settings.exclude_categories)
    chosen = [name for name in settings.categories or names if name not in excluded]
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
