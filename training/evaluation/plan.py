"""What is to be evaluated: plans, the cells that they come to, and plan.json in the folder of a run."""

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from training.evaluation.data import DATA_SETS, category_names, read_category, views
from training.evaluation.detectors import DETECTORS, PAPER
from training.evaluation.encoded import FEATURES
from training.settings import parse, setting, settings_of

PUBLISHED = "published"

_FILE = "plan.json"


@dataclass(frozen=True, order=True)
class Cell:
    """Everything that decides one result.

    Attributes:
        data_set: e.g. ``"mvtecad"``.
        category: of the data set.
        detector: e.g. ``"patchcore"``.
        features: one of ``FEATURES``.
        variant: of the bundle's projectors; ``""`` where none are used.
        shots: reference images that residuals are taken against.
        noise: share of anomalous images in the training data, from 0.0 to 0.2.
        fraction: of the normal training images that a detector is fitted on, in (0, 1].
        seed: of all that is drawn.
        view: of the category, where the views are evaluated each on its own.
    """

    data_set: str
    category: str
    detector: str
    features: str
    variant: str
    shots: int
    noise: float
    fraction: float
    seed: int
    view: str = ""

    def __post_init__(self) -> None:
        for name in ("noise", "fraction"):  # 1 and 1.0 are one cell, and one file
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.shots < 1:
            raise InputError(f"shots is {self.shots}, expected a number of reference images >= 1")
        if not 0 <= self.noise <= 0.2:
            raise InputError(f"noise is {self.noise}, expected a share of anomalous images from 0 to 0.2")
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction is {self.fraction}, expected a share of the training images in (0, 1]")

    @property
    def name(self) -> str:
        """A file name, without a suffix, that only this cell has."""
        *values, view = asdict(self).values()
        return "__".join([*(str(value) or "-" for value in values), *filter(None, [view])]).replace("/", "_")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """Reads what ``dataclasses.asdict`` gave; other keys are left alone."""
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})


@dataclass(frozen=True)
class Plan:
    """Everything that is to be evaluated; each list is combined with every other.

    Raises:
        InputError: a value is not as described; the message names it.
    """

    bundle: str = setting("", "a folder, or an id on the Hub")
    data: Mapping[str, str] = setting({}, "for each data set, e.g. mvtecad, the folder that it is in")
    output: str = setting("", "the folder of the run")
    protocol: str = setting(
        "full",
        "full: detectors are fitted on the training images; few-shot: on the references alone, view by view of a "
        "category, each taken against the others, and tested on all other images",
    )
    categories: tuple[str, ...] = setting((), "names, or data_set/name; all categories where there are none")
    detectors: tuple[str, ...] = setting(
        PAPER, "those that are fitted; anomalib_patchcore and anomalib_padim there are besides the default"
    )
    features: tuple[str, ...] = setting(FEATURES, "that they are fitted on")
    variants: tuple[str, ...] = setting((PUBLISHED,), "of the projectors; published: that the paper gives a detector")
    shots: tuple[int, ...] = setting((8,), "numbers of reference images")
    seeds: tuple[int, ...] = setting((0,), "of all that is drawn")
    noise: tuple[float, ...] = setting((0.0,), "shares of anomalous images in the training data, from 0 to 0.2")
    fraction: tuple[float, ...] = setting((1.0,), "shares of the normal training images that are fitted on, in (0, 1]")
    references: str = setting("", "JSON file {category: [paths]} whose first shots are the references; else drawn")
    epochs: Mapping[str, int] = setting({}, "for detectors, passes over the training images instead of their default")
    set: Mapping[str, Mapping[str, Any]] = setting(
        {}, "settings of detectors, instead of defaults: detector.name=value"
    )
    image_size: int = setting(0, "side in pixels that images are prepared to; the bundle's by default")
    resize_mode: str = setting("", "crop or resize, as ADPretrainConfig has it; the bundle's by default")
    batch_size: int = setting(8, "images at a time")
    workers: int = setting(0, "processes that read images; 0 reads them in the program itself")
    device: str = setting("", "cpu, cuda, cuda:1, ...; the first GPU, if there is one, by default")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                object.__setattr__(self, name, tuple(dict.fromkeys(value)))
        named = {"data sets": (self.data, DATA_SETS), "features": (self.features, FEATURES)}
        named["detectors"] = ([*self.detectors, *self.epochs, *self.set], DETECTORS)
        for what, (names, known) in named.items():
            if unknown := [name for name in names if name not in known]:
                raise InputError(f"unknown {what} {', '.join(unknown)}: expected some of {', '.join(known)}")
        if self.protocol not in ("full", "few-shot"):
            raise InputError(f"protocol is {self.protocol!r}, expected full or few-shot")
        may_be_empty = ("categories", "epochs", "set", "references", "resize_mode", "device")
        if empty := [name for name, value in vars(self).items() if value in ((), {}, "") and name not in may_be_empty]:
            raise InputError(f"no {', '.join(empty)} given: expected at least one of each")
        if once := [name for name in self.epochs if DETECTORS[name].epochs == 1]:
            raise InputError(f"epochs of {', '.join(once)}: it is fitted in one pass, expected none")
        least = {"batch_size": self.batch_size - 1, "workers": self.workers, "seeds": min(self.seeds)}
        least |= {f"epochs of {name}": number - 1 for name, number in self.epochs.items()}
        if below := [name for name, number in least.items() if number < 0]:
            raise InputError(f"{', '.join(below)}: expected epochs and batch_size >= 1, workers and seeds >= 0")

        if self.protocol == "few-shot" and (self.noise, self.fraction) != ((0.0,), (1.0,)):
            raise InputError("noise and fraction are of training images, of which the protocol few-shot takes none")
        if self.protocol == "few-shot" and self.references:
            raise InputError("references: the protocol few-shot draws its own, by the seed")
        if self.protocol == "few-shot" and min(self.shots) < 2:
            raise InputError("shots: the protocol few-shot takes each reference against the others, expected >= 2")

    @property
    def preparation(self) -> dict[str, Any]:
        """How images are prepared, where it is not as the bundle says; arguments of ``from_pretrained``."""
        return {"image_size": self.image_size or None, "resize_mode": self.resize_mode or None}

    def epochs_of(self, detector: str) -> int:
        """How often a detector sees the training images."""
        return self.epochs.get(detector, DETECTORS[detector].epochs)


def parse_plan(words: Sequence[str], description: str = "") -> tuple[Plan, str | None]:
    """Reads a plan from the words of the command line, and the YAML file of the same names after ``--config``.

    Returns:
        The plan, and the bundle whose card gets the results, if one is named.

    Raises:
        SystemExit, InputError: see ``Plan`` and ``training.settings.parse``.
    """
    about = f"{description} Data sets: {', '.join(DATA_SETS)}."
    parser = ArgumentParser(prog="python -m training.evaluate", description=about, allow_abbrev=False)
    parser.add_argument("word", nargs="?", metavar="BUNDLE", help="the same as --bundle")
    parser.add_argument("--export-card", metavar="FOLDER", help="a bundle, whose card gets the results as model-index")
    values = parse(Plan, parser, words)
    values.bundle = values.word or values.bundle
    return settings_of(Plan, values), values.export_card


def plan_cells(plan: Plan) -> list[tuple[Cell, ...]]:
    """The cells, in the order in which they are run; those that one model serves are together.

    All cells of a category follow each other, so that what its images are encoded to is computed once.

    Raises:
        InputError: a category that no data set has, or a share that is out of its range.
    """
    groups: list[tuple[Cell, ...]] = []
    draws = list(itertools.product(plan.shots, plan.noise, plan.fraction, plan.seeds))
    detectors = [name for name in DETECTORS if name in plan.detectors]
    for data_set, names in chosen_categories(plan).items():
        categories = [(one, view) for one in names for view in _views(plan, data_set, one)]
        models: dict[bool, list[tuple[Cell, ...]]] = {False: [], True: []}  # by whether one serves all categories
        for detector, draw, features in itertools.product(detectors, draws, plan.features):
            named = [DETECTORS[detector].variant if one == PUBLISHED else one for one in plan.variants]
            for variant in dict.fromkeys(named) if features == "pretrained" else [""]:
                cells = tuple(Cell(data_set, one, detector, features, variant, *draw, view) for one, view in categories)
                models[DETECTORS[detector].serves_all].append(cells)
        groups += [(cell,) for of_category in zip(*models[False], strict=True) for cell in of_category]
        groups += filter(None, models[True])
    return groups


def chosen_categories(plan: Plan) -> dict[str, list[str]]:
    """The categories that are evaluated, of each data set.

    Raises:
        InputError: a category that no data set has.
    """
    there = {name: category_names(name, root) for name, root in plan.data.items()}
    known = {text for name, names in there.items() for one in names for text in (one, f"{name}/{one}")}
    if unknown := [text for text in plan.categories if text not in known]:
        listed = "; ".join(f"{name}: {', '.join(names)}" for name, names in there.items())
        raise InputError(f"unknown categories {', '.join(unknown)}: expected some of {listed}")
    chosen = set(plan.categories) or known
    return {name: [one for one in names if {one, f"{name}/{one}"} & chosen] for name, names in there.items()}


def _views(plan: Plan, data_set: str, category: str) -> list[str]:
    return views(read_category(data_set, plan.data[data_set], category)) if plan.protocol == "few-shot" else [""]


def write_plan(plan: Plan, bundle: Mapping[str, str], finished: Collection[Cell] = ()) -> None:
    """Writes a plan into the folder of its run, which may hold the results of others that decide them alike.

    Args:
        plan: to write.
        bundle: what of the bundle decides the results, such as its weights, by name.
        finished: the cells that have results in the folder; without any, nothing was decided yet.

    Raises:
        InputError: the folder holds results that something else has decided, which is not in a cell.
    """
    deciding = {**bundle, **_deciding(plan)}
    kept = {cell.detector for cell in finished}
    free = tuple(f" {text}" for name in DETECTORS if name not in kept for text in (f"of {name}", f"{name} serves"))
    decided = _decided(plan.output) if kept else {}
    decided = {key: value for key, value in decided.items() if not key.endswith(free)}
    if changed := [f"{key} {decided[key]} -> {new}" for key, new in deciding.items() if decided.get(key, new) != new]:
        changes = "; ".join(changed)
        raise InputError(f"{plan.output} holds results of something else ({changes}): choose another --output")
    values = {"plan": asdict(plan), "decided by": decided | deciding}
    write_text(Path(plan.output, _FILE), json.dumps(values, indent=2) + "\n")


def _deciding(plan: Plan) -> dict[str, Any]:
    """What decides results besides the bundle and what a cell says, by name; as JSON holds it."""
    settings: dict[str, Any] = {}
    for name in plan.detectors:
        settings |= {f"epochs of {name}": plan.epochs_of(name), f"settings of {name}": dict(plan.set.get(name, {}))}
    settings |= {f"folder of {name}": str(Path(root).resolve()) for name, root in plan.data.items()}
    for data_set, names in chosen_categories(plan).items():
        served = [one for one in plan.detectors if DETECTORS[one].serves_all]
        settings |= {f"categories of {data_set} that {one} serves": names for one in served}
    listed = hashlib.sha256(Path(plan.references).read_bytes()).hexdigest()[:16] if plan.references else "drawn"
    return settings | {"protocol": plan.protocol, "reference list": listed, "batch_size": plan.batch_size}


def _decided(folder: str | Path) -> dict[str, Any]:
    """What has decided the results in a folder, as its plan.json says; empty if there is none."""
    file = Path(folder, _FILE)
    if not file.is_file():
        return {}
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))["decided by"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error!r}): choose another --output, or remove the folder") from error
