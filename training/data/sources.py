"""The data of a run: sources joined into one data set, its categories split into training and validation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, concatenate_datasets

from adpretrain_hf.errors import InputError
from training import synthetic
from training.real_iad import list_categories, load_real_iad
from training.settings import PretrainSettings

_VALIDATE_EVERY = 8


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        dataset: with the columns of ``load_real_iad``.
        training, validation: names of categories; apart, but with ``all_categories``.
        positions: of the training images in the data set.
        anomalous: of the anomalous ones among them.
    """

    dataset: Dataset
    training: list[str]
    validation: list[str]
    positions: list[int]
    anomalous: list[int]

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
    sources = [_open(source, settings, synthetic_folder) for source in settings.data]
    names = [name for source in sources for name in source.categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"the categories {twice} are in more than one of --data {list(settings.data)}: rename them in one"
        )
    training, validation = _split(names, settings)
    parts = [source.load({*training, *validation}) for source in sources]
    dataset = concatenate_datasets([part for part in parts if part is not None])
    trained = set(training)
    positions = [number for number, name in enumerate(dataset["category"]) if name in trained]
    is_anomalous = list(dataset["is_anomalous"])
    anomalous = [position for position in positions if is_anomalous[position]]
    if not anomalous and not settings.paint_defects:
        raise InputError(
            f"none of the {len(positions)} training images is anomalous, so that there is nothing to learn: give "
            "anomalous images with masks, or --paint-defects 0.5"
        )
    return TrainingData(dataset, training, validation, positions, anomalous)


class _Source(NamedTuple):
    place: str | Path
    resolution: str
    categories: list[str]

    def load(self, wanted: Collection[str]) -> Dataset | None:
        own = [name for name in self.categories if name in wanted]
        return load_real_iad(self.place, resolution=self.resolution, categories=own) if own else None


def _open(source: str, settings: PretrainSettings, synthetic_folder: Path) -> _Source:
    place: str | Path = synthetic.generate(synthetic_folder) if source == "synthetic" else source
    resolution = str(synthetic.SIZE) if source == "synthetic" else settings.resolution
    return _Source(place, resolution, list_categories(place, resolution=resolution))


def _split(names: Sequence[str], settings: PretrainSettings) -> tuple[list[str], list[str]]:
    _check_known("categories", settings.categories, names)
    _check_known("exclude-categories", settings.exclude_categories, names)
    excluded = set(settings.exclude_categories)
    chosen = [name for name in settings.categories or names if name not in excluded]
    _check_known("validation-categories", settings.validation_categories, chosen)
    validation = list(settings.validation_categories) or sorted(chosen)[::_VALIDATE_EVERY]
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
