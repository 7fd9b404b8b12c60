"""What is to be evaluated: plans, the cells that they come to, and plan.json in the folder of a run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from training.evaluation.data import DATA_SETS, category_names, read_category, views
from training.evaluation.detectors import DETECTORS, PAPER
from training.evaluation.encoded import FEATURES

PUBLISHED = "published"

_FILE = "plan.json"
_json = functools.partial(json.dumps, ensure_ascii=False, default=str)  # YAML has dates
_USAGE = """%(prog)s [BUNDLE] [--config plan.yaml] [--data NAME=FOLDER ...] [--output FOLDER]
       [--shots 1 2 4 ...] [--epochs DETECTOR=NUMBER ...] [--set DETECTOR.NAME=VALUE ...] [--NAME VALUE ...]
names: """


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
        if self.features not in FEATURES:
            raise InputError(f"unknown features {self.features!r}: expected one of {', '.join(FEATURES)}")
        if (self.variant != "") != (self.features == "pretrained"):
            raise InputError(f"features {self.features!r} with variant {self.variant!r}: only pretrained ones have one")
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
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """Reads what ``dataclasses.asdict`` gave; other keys are left alone."""
        return cls(**{"view": "", **{one.name: values[one.name] for one in fields(cls) if one.name in values}})


@dataclass(frozen=True)
class Plan:
    """Everything that is to be evaluated; each list is combined with every other.

    Attributes:
        bundle: a folder, or an id on the Hub.
        data: for each data set, e.g. ``mvtecad``, the folder that it is in.
        output: the folder of the run.
        protocol: ``full``, detectors are fitted on the training images; or ``few-shot``, on the references alone, view
            by view of a category, each taken against the others, and tested on all other images.
        categories: names, or ``data_set/name``; all categories where there are none.
        detectors: those that are fitted; ``anomalib_patchcore`` and ``anomalib_padim`` there are besides the default.
        features: that they are fitted on.
        variants: of the bundle's projectors; ``published`` stands for the one that the paper gives each detector.
        shots: numbers of reference images.
        seeds: of all that is drawn.
        noise: shares of anomalous images in the training data, from 0 to 0.2.
        fraction: shares of the normal training images that detectors are fitted on, in (0, 1].
        references: a JSON file ``{category: [paths]}`` whose first ``shots`` are the references; drawn without it.
        epochs: for detectors, passes over the training images instead of their default.
        set: for detectors, settings of their models instead of the defaults, by name.
        image_size: side in pixels that images are prepared to; the bundle's by default.
        resize_mode: ``crop`` or ``resize``, as ``ADPretrainConfig`` has it; the bundle's by default.
        batch_size: images at a time.
        workers: processes that read images; 0 reads them in the program itself.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; the first GPU, if there is one, by default.

    Raises:
        InputError: a value is not as described; the message names it.
    """

    bundle: str
    data: Mapping[str, str]
    output: str
    protocol: Literal["full", "few-shot"] = "full"
    categories: tuple[str, ...] = ()
    detectors: tuple[str, ...] = PAPER
    features: tuple[str, ...] = FEATURES
    variants: tuple[str, ...] = (PUBLISHED,)
    shots: tuple[int, ...] = (8,)
    seeds: tuple[int, ...] = (0,)
    noise: tuple[float, ...] = (0.0,)
    fraction: tuple[float, ...] = (1.0,)
    references: str | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)
    set: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    image_size: int | None = None
    resize_mode: Literal["crop", "resize"] | None = None
    batch_size: int = 8
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                object.__setattr__(self, name, tuple(dict.fromkeys(value)))
        named = {"data sets": (self.data, DATA_SETS), "features": (self.features, FEATURES)}
        named["detectors"] = ([*self.detectors, *self.epochs, *self.set], DETECTORS)
        for what, (names, known) in named.items():
            if unknown := [name for name in names if name not in known]:
                raise InputError(f"unknown {what} {', '.join(unknown)}: expected some of {', '.join(known)}")
        may_be_empty = ("categories", "epochs", "set")
        if empty := [name for name, value in vars(self).items() if value in ((), {}) and name not in may_be_empty]:
            raise InputError(f"no {', '.join(empty)} given: expected at least one of each")
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
        return {"image_size": self.image_size, "resize_mode": self.resize_mode}

    def epochs_of(self, detector: str) -> int:
        """How often a detector sees the training images."""
        return self.epochs.get(detector, DETECTORS[detector].epochs)


_KINDS = {name: get_origin(kind) for name, kind in get_type_hints(Plan).items()}  # tuple and Mapping among them


def parse_plan(words: Sequence[str], description: str = "") -> tuple[Plan, str | None]:
    """Reads a plan from the words of the command line, and the YAML file of the same names after ``--config``.

    Flags win over the file, where a single value may stand for a list of one. Lists go with spaces or commas, and a
    word that no flag takes is the bundle.

    Returns:
        The plan, and the bundle whose card gets the results, if one is named.

    Raises:
        SystemExit: a value of another kind than expected, or an unknown or missing name, which has been printed.
        InputError: see ``Plan``; or the file is not YAML, or not a mapping.
        OSError: the file cannot be read.
    """
    about = f"{description} Data sets: {', '.join(DATA_SETS)}."
    parser = ArgumentParser("python -m training.evaluate", _USAGE + ", ".join(_KINDS), about, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of the same names; flags win")
    parser.add_argument("--export_card", metavar="FOLDER", help="a bundle, whose card gets the results as model-index")
    parser.add_class_arguments(Plan, as_group=False)
    values = parser.parse_args(_arguments(parser, words)).as_dict()
    return Plan(**{name: values[name] for name in _KINDS}), values["export_card"]


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected names and values, such as `shots: [1, 8]`")
    given = {name: value for name, value in values.items() if value is not None}
    single = [name for name, value in given.items() if _KINDS.get(name) is tuple and not isinstance(value, list)]
    return given | {name: [given[name]] for name in single}


def _arguments(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words as jsonargparse reads lists and mappings: ``--shots 1 2`` becomes ``--shots '["1", "2"]'``."""
    given: dict[str, list[str]] = {}
    flag = "--bundle"
    for word in words:
        if re.match("--?[a-z]", word):
            flag, *first = word.split("=", maxsplit=1)
            flag = flag[:2] + flag[2:].replace("-", "_")
            given[flag] = first
        else:
            is_full = given.get(flag) and _KINDS.get(flag[2:]) not in (tuple, Mapping)
            given.setdefault("--bundle" if is_full else flag, []).append(word)
    for flag, values in given.items():
        kind = _KINDS.get(flag[2:])
        if kind is tuple:
            given[flag] = [_json([part for word in values for part in word.split(",") if part])]
        elif kind is Mapping:
            given[flag] = [_json(_mapping(parser, flag, values))]
        elif flag == "--config":
            given[flag] = [_json(_read_file(file)) for file in values]
    flags = sorted(given, key=lambda flag: flag != "--config")  # what comes later wins
    return [word for flag in flags for word in (flag, *given[flag])]


def _mapping(parser: ArgumentParser, flag: str, words: Sequence[str]) -> dict[str, Any]:
    """``name=value`` as a mapping; ``detector.name=value`` as one of mappings."""
    outer, expected = (r"([^.=]+)\.", "detector.name=value") if flag == "--set" else ("", "name=value")
    mapping: dict[str, Any] = {}
    for word in words:
        if not (match := re.fullmatch(outer + "([^=]+)=(.+)", word)):
            parser.error(f"{flag}: got {word!r}, expected {expected}")
        *detector, name, value = match.groups()
        (mapping.setdefault(detector[0], {}) if detector else mapping)[name] = value
    return mapping


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


def write_plan(plan: Plan, bundle: Mapping[str, str], made_by: Mapping[str, str]) -> None:
    """Writes a plan into the folder of its run, which may hold the results of others that decide them alike.

    Args:
        plan: to write.
        bundle: what of the bundle decides the results, such as its weights, by name.
        made_by: what people want to know beside the results: command, date and versions.

    Raises:
        InputError: the folder holds results that something else has decided, which is not in a cell.
    """
    deciding = {**bundle, **_deciding(plan)}
    decided = _read(plan.output).get("decided by", {})
    if decided:  # earlier versions had one protocol, and another PatchCore and PaDiM
        decided = {"protocol": "an earlier version's"} | decided
    if changed := [f"{key} {decided[key]} -> {new}" for key, new in deciding.items() if decided.get(key, new) != new]:
        changes = "; ".join(changed)
        raise InputError(f"{plan.output} holds results of something else ({changes}): choose another --output")
    values = {"plan": asdict(plan), "decided by": decided | deciding, "made by": dict(made_by)}
    write_text(Path(plan.output, _FILE), json.dumps(values, indent=2) + "\n")


def read_origin(folder: str | Path) -> dict[str, str]:
    """What a run's results come from, for people: bundle, command, date and versions; empty if it is not known."""
    values = _read(folder)
    return {"bundle": str(values["plan"]["bundle"])} | values.get("made by", {}) if values else {}


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


def _read(folder: str | Path) -> dict[str, Any]:
    """What plan.json holds; empty if there is none."""
    file = Path(folder, _FILE)
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return values | {"plan": {**values["plan"]}, "decided by": {**values["decided by"]}}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error!r}): choose another --output, or remove the folder") from error
