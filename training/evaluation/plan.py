"""Plan: what is to be evaluated, from the command line or a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adpretrain_hf.errors import InputError, MissingPathError
from training.evaluation.cells import FEATURES
from training.evaluation.data_sets import DATA_SETS
from training.evaluation.detectors import DETECTORS
from training.evaluation.plan_values import (
    names,
    number_by_name,
    numbers,
    settings_by_name,
    shares,
    text,
    text_by_name,
    whole_number,
)

PUBLISHED = "published"

_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "bundle": text,
    "data": text_by_name,
    "output": text,
    "categories": names,
    "detectors": names,
    "features": names,
    "variants": names,
    "shots": numbers,
    "seeds": numbers,
    "noise": shares,
    "fraction": shares,
    "references": text,
    "epochs": number_by_name,
    "set": settings_by_name,
    "batch_size": whole_number,
    "workers": whole_number,
    "device": text,
}


@dataclass(frozen=True)
class Plan:
    """Everything that is to be evaluated; each list is combined with every other.

    Attributes:
        bundle: a folder, or an id on the Hub.
        data: for each data set, e.g. ``"mvtecad"``, the folder that it is in.
        output: the folder of the run.
        categories: names, or ``data_set/name``; all categories where there are none.
        detectors: some of ``DETECTORS``.
        features: some of ``FEATURES``.
        variants: of the bundle's projectors; ``"published"`` stands for the one that the paper gives each detector.
        shots: numbers of reference images.
        seeds: of all that is drawn.
        noise: shares of anomalous images in the training data.
        fraction: shares of the normal training images that detectors are fitted on.
        references: a JSON file ``{category: [paths]}`` of reference images, the first ``shots`` of which are taken;
            drawn by the seed where there is none.
        epochs: for detectors, passes over the training images instead of their default.
        set: for detectors, settings of their models instead of the defaults, by name.
        batch_size: images at a time.
        workers: processes that read images; 0 reads them in the program itself.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; the first GPU, if there is one, by default.

    Raises:
        InputError: a value is not as described; the message names it.
    """

    bundle: str
    data: Mapping[str, str]
    output: str
    categories: tuple[str, ...] = ()
    detectors: tuple[str, ...] = tuple(DETECTORS)
    features: tuple[str, ...] = FEATURES
    variants: tuple[str, ...] = (PUBLISHED,)
    shots: tuple[int, ...] = (8,)
    seeds: tuple[int, ...] = (0,)
    noise: tuple[float, ...] = (0.0,)
    fraction: tuple[float, ...] = (1.0,)
    references: str | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)
    set: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch_size: int = 8
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        _check_known("data sets", self.data, DATA_SETS)
        _check_known("detectors", [*self.detectors, *self.epochs, *self.set], DETECTORS)
        _check_known("features", self.features, FEATURES)
        lists = ("data", "detectors", "features", "variants", "shots", "seeds", "noise", "fraction")
        empty = [name for name in lists if not getattr(self, name)]
        if empty:
            raise InputError(f"no {', '.join(empty)} given: expected at least one of each")
        least = {"batch_size": self.batch_size - 1, "workers": self.workers, "seeds": min(self.seeds)}
        least |= {f"epochs of {name}": number - 1 for name, number in self.epochs.items()}
        below = [name for name, number in least.items() if number < 0]
        if below:
            raise InputError(f"{', '.join(below)}: expected epochs and batch_size >= 1, workers and seeds >= 0")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Plan:
        """Makes a plan of plain values, as YAML holds them; a single one may stand for a list of one.

        Raises:
            InputError: an unknown or missing name, or a value of another kind than expected.
        """
        unknown = [str(name) for name in values if name not in _READERS]
        if unknown:
            raise InputError(f"unknown settings {', '.join(unknown)}: expected some of {', '.join(_READERS)}")
        missing = [name for name in ("bundle", "data", "output") if values.get(name) is None]
        if missing:
            raise InputError(f"{', '.join(missing)} not given, neither as an argument nor in a file of --config")
        return cls(**{name: _READERS[name](name, value) for name, value in values.items() if value is not None})

    def epochs_of(self, detector: str) -> int:
        """How often a detector sees the training images."""
        return self.epochs.get(detector, DETECTORS[detector].epochs)


def read_plan_file(path: str) -> dict[str, Any]:
    """Reads a YAML file of the same names as the arguments.

    Raises:
        MissingPathError: no such file.
        InputError: not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise MissingPathError(f"no such file: {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected names and values, such as `shots: [1, 8]`")
    return values


def _check_known(what: str, names: Any, known: Any) -> None:
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown {what} {', '.join(unknown)}: expected some of {', '.join(known)}")
