"""The data of a run: sources joined into one data set, its categories split into training and validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from adpretrain_hf.errors import InputError
from training import synthetic
from training.real_iad import load_real_iad
from training.settings import PretrainSettings

_VALIDATE_EVERY = 8


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    Attributes:
        dataset: with the columns of ``load_real_iad``.
        training, validation: names of categories.
        positions: of the training images in the data set.
    """

    dataset: Dataset
    training: list[str]
    validation: list[str]
    positions: list[int]


def load_training_data(settings: PretrainSettings, synthetic_folder: Path) -> TrainingData:
    """Opens the sources and splits their categories; ``"synthetic"`` is drawn into a folder, once.

    Raises:
        InputError: a source cannot be read, two have a category in common, or a category that was named is in none.
    """
    parts = [_open(source, settings, synthetic_folder) for source in settings.data]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    names = [name for part in parts for name in dict.fromkeys(part["category"])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"the categories {twice} are in more than one of --data {list(settings.data)}: rename them in one"
        )
    training, validation = _split(names, settings)
    trained = set(training)
    positions = [number for number, name in enumerate(dataset["category"]) if name in trained]
    return TrainingData(dataset, training, validation, positions)


def _open(source: str, settings: PretrainSettings, synthetic_folder: Path) -> Dataset:
    if source == "synthetic":
        return load_real_iad(synthetic.generate(synthetic_folder), resolution=str(synthetic.SIZE))
    return load_real_iad(source, resolution=settings.resolution)


def _split(names: Sequence[str], settings: PretrainSettings) -> tuple[list[str], list[str]]:
    _check_known("categories", settings.categories, names)
    _check_known("exclude-categories", settings.exclude_categories, names)
    excluded = set(settings.exclude_categories)
    chosen = [name for name in settings.categories or names if name not in excluded]
    _check_known("validation-categories", settings.validation_categories, chosen)
    validation = list(settings.validation_categories) or sorted(chosen)[::_VALIDATE_EVERY]
    training = [name for name in chosen if name not in validation]
    if not training:
        raise InputError(f"no category is left to train on: all of {sorted(chosen)} are for validation")
    return training, validation


def _check_known(flag: str, asked: Iterable[str], names: Sequence[str]) -> None:
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise InputError(f"--{flag} names {unknown}, expected some of {sorted(names)}")
