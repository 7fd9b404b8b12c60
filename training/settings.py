"""Settings as one dataclass, as flags and as a YAML file; and all those that a pretraining run depends on."""

import copy
import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from adpretrain_hf.errors import InputError

Settings = TypeVar("Settings")
_OF_BUNDLE = ("reference_tokens", "init_scale", "normalize_tokens", "scale_residuals")
_EMPTY = ("", "null", "~")  # as YAML writes it


def setting(default: Any, help: str) -> Any:
    """A field of a dataclass of settings; what the help says is its documentation."""
    made: dict[str, Any] = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(**made, metadata={"help": help})


def _free(default: Any, help: str) -> Any:
    """A setting that a run may go on with another value of: where and how fast it runs, not what it comes to."""
    return dataclasses.field(default=default, metadata={"help": help, "free": True})


@dataclass(frozen=True)
class PretrainSettings:
    """What a run does; two runs with equal settings end with equal weights on the CPU.

    The help text of a flag is the documentation of its field. Where a default differs from the published run (paper,
    section 4; released ``main.py``), the help says so.

    Raises:
        InputError: a value is out of its range; the message names the flag.
    """

    data: tuple[str, ...] = _free(
        ("synthetic",),
        "folders as of RealIAD, MVTecAD, VisA, BTAD or MVTec3D-AD, or of one product's undamaged images; a gated Hub "
        "repository (Real-IAD/Real-IAD); 'synthetic'. Several are joined",
    )
    weights: tuple[float, ...] = setting((), "shares of --data in an epoch, e.g. 3 1; as many images as each has")
    resolution: str = setting("512", "which of RealIAD's resolutions: 256, 512, 1024 or raw")
    strict: bool = setting(True, "of RealIAD: files that are absent or contradict the json are an error, not left out")
    categories: tuple[str, ...] = setting((), "train and validate on these alone; all by default")
    validation_categories: tuple[str, ...] = setting(
        (), "kept out of training, judge every epoch; each 8th with anomalies by default"
    )
    all_categories: bool = setting(False, "train on the validation categories as well, as published")
    shots: int = setting(8, "references of each validation category and view")
    exclude_categories: tuple[str, ...] = setting((), "neither trained nor validated on, for a later test")
    backbone: str = setting("", "preset, transformers id or folder, open_clip:<arch>/<weights>, ...: dinov2-base")
    init_from: str = setting("", "bundle (id or folder) whose backbone and projectors are trained on")
    upstream: str = setting("", "id on the Hub to record as the origin, where the backbone is a folder")
    image_size: int = setting(0, "side in pixels; that of the backbone's or bundle's configuration by default")
    levels: tuple[int, ...] = setting((), "blocks counted from 1; the quarters of the depth by default")
    reference_tokens: int = setting(2048, "learned reference tokens of a projector")
    init_scale: float = setting(1.0, "of the projectors' start: 1 as published, 0 the identity")
    normalize_tokens: bool = setting(True, "tokens of unit length before matching; the published run: no")
    scale_residuals: bool = setting(True, "every level to a mean normal residual norm of 1; the published run: no")
    references: tuple[int, ...] = setting((1, 4, 8), "reference images per image, drawn for every step")
    pool_size: int = setting(64, "good images per category and view to draw references from; 0, as published: all")
    paint_defects: float = setting(0.0, "share of the normal images that get a painted defect; the published run: 0")
    plain_first: bool = setting(False, "leave the first view as it is at test time; the published run augments both")
    patch_labels: str = setting("coverage", "one rule for both losses, or 'published': two, see training/README.md")
    balanced: bool = setting(False, "fill every batch up to a quarter of anomalous images; the published run: no")
    epochs: int = setting(10, "passes over the training images")
    max_steps: int = setting(0, "end after so many optimiser steps; 0: after the epochs")
    time_budget: float = _free(0.0, "end after so many minutes of training; 0: after the epochs")
    batch_size: int = setting(32, "images of an optimiser step, over all processes")
    accumulate: int = setting(1, "parts that a step is computed in; the losses compare patches within a part")
    learning_rate: float = setting(1e-4, "of Adam; a tenth after 70 %% of the run and again after 90 %%")
    weight_decay: float = setting(5e-4, "of Adam")
    clip_norm: float = setting(0.0, "largest length of a step's gradient; 0, as published: any")
    ema: float = setting(0.0, "decay of a moving average of the weights, which is what is kept; 0, as published: none")
    angle_weight: float = setting(1.0, "factor on the angle loss")
    temperature: float = setting(0.15, "of the angle loss")
    margin: float = setting(0.75, "between normal and anomalous norms")
    seed: int = setting(0, "of the initial weights, the order, the references and the augmentation")
    precision: str = setting("bfloat16", "of autocast, float32 or bfloat16; weights and losses are float32")
    device: str = _free("", "cpu, cuda (each process its own GPU), ...; a GPU if there is one")
    compile: bool = _free(False, "compile backbone and projectors: a minute at the start, then faster on a GPU")
    workers: int = _free(2, "processes that decode, crop and paint, for each training process")
    cache_gb: float = _free(0.0, "of a GPU's memory for the references' patches; half of what is free by default")
    cache_crops: bool = _free(True, "keep decoded crops on the disk where it has room, for the epochs to come")
    cache_folder: str = _free("", "where crops and patches are kept between runs; by default until this one ends")
    checkpoint_minutes: float = _free(10.0, "between checkpoints")
    tracker: str = _free("tensorboard", "tensorboard (if it is installed), wandb, mlflow or none")

    def __post_init__(self) -> None:
        for name in ("reference_tokens", "epochs", "batch_size", "accumulate", "shots"):
            self._require(getattr(self, name) >= 1, name, "an integer >= 1")
        for name in (
            *("image_size", "pool_size", "workers", "seed", "cache_gb", "weight_decay", "clip_norm", "init_scale"),
            *("angle_weight", "max_steps", "time_budget"),
        ):
            self._require(getattr(self, name) >= 0, name, "a number >= 0")
        for name in ("learning_rate", "temperature", "margin", "checkpoint_minutes"):
            self._require(getattr(self, name) > 0, name, "a number > 0")
        self._require(self.seed < 2**64, "seed", "a number below 2**64")
        self._require(self.pool_size != 1, "pool_size", "0 or at least 2: images are compared with others")
        self._require(0 <= self.paint_defects <= 1, "paint_defects", "a share from 0 to 1")
        self._require(0 <= self.ema < 1, "ema", "a number from 0 to below 1")
        self._require(bool(self.data), "data", "at least one source")
        fits = len(self.weights) in (0, len(self.data)) and all(weight > 0 for weight in self.weights)
        self._require(fits, "weights", f"a number > 0 for each of the {len(self.data)} of --data")
        self._require(bool(self.references) and min(self.references) >= 1, "references", "integers >= 1")
        self._require(self.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16")
        self._require(self.patch_labels in ("coverage", "published"), "patch_labels", "coverage or published")
        trackers = ("tensorboard", "wandb", "mlflow", "none")
        self._require(self.tracker in trackers, "tracker", f"one of {', '.join(trackers)}")
        parts = self.accumulate
        self._require(self.batch_size % parts == 0, "batch_size", f"a multiple of accumulate={parts}")
        fixed = ("backbone", "upstream", "levels", *_OF_BUNDLE)
        given = [_flag(one) for one in fixed if self.init_from and getattr(self, one) != getattr(PretrainSettings, one)]
        self._require(not given, "init_from", f"no --{' and --'.join(given)} beside it: the bundle has its own")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise InputError(f"--{_flag(name)} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def from_json(cls, text: str) -> "PretrainSettings":
        """Reads the JSON of the fields; InputError if it is none of this version."""
        try:
            values: dict[str, Any] = json.loads(text)
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"these are not the settings of a pretraining run of this version: {error}") from error


def parse(kind: type[Settings], parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Reads the values of settings from flags, and from the YAML file of the same names after ``--config``; flags win.

    ``--batch-size 32``, ``--levels 3 6 9 12``, ``--no-normalize-tokens``, ``--data visa=VisA/``; in the file
    ``batch_size: 32`` (or ``batch-size``), ``levels: [3, 6, 9, 12]``, ``normalize_tokens: false``, and
    ``data: {visa: VisA/}``. ``--print_config`` prints such a file.

    Args:
        kind: their dataclass.
        parser: with the program's other flags.
        argv: the words; those of the command line by default.

    Returns:
        All values, by name, for ``settings_of``.

    Raises:
        SystemExit: flags or names that there are not, or values of another kind, which has been printed.
        InputError: the file cannot be read as one of settings, or a word is no ``name=value``.
    """
    kinds = typing.get_type_hints(kind)
    known = {action.dest: action.default for action in parser._actions} | dict.fromkeys(kinds)
    parser.add_argument("--config", action="config", help="YAML file of settings, named as the flags; flags win")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type] # which has no name for dataclasses
        default = {} if field.default is dataclasses.MISSING else field.default
        own: dict[str, Any] = {"type": kinds[field.name]}
        if kinds[field.name] is bool:
            own = {"action": ActionYesNo(no_prefix="no-")}
        parser.add_argument(f"--{_flag(field.name)}", default=default, help=field.metadata["help"], **own)
    return parser.parse_args(_words(sys.argv[1:] if argv is None else argv, kinds, known))


def settings_of(kind: type[Settings], values: Namespace) -> Settings:
    """The settings of a kind that are among some values; InputError: see the dataclass."""
    return kind(**{name: values[name] for name in typing.get_type_hints(kind)})


def differing(old: PretrainSettings, new: PretrainSettings) -> Sequence[str]:
    """The flags in which two settings differ that decide what a run comes to, as texts ``--name old -> new``."""
    names = [field.name for field in dataclasses.fields(PretrainSettings) if "free" not in field.metadata]
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return [f"--{_flag(name)} {before!r} -> {after!r}" for name, before, after in pairs if before != after]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _words(argv: Sequence[str], kinds: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The words as jsonargparse takes them: lists and mappings as JSON, and the file before the flags that win."""
    groups: list[list[str]] = [[]]  # a flag and what follows it
    for word in argv:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    words, of_file, mappings = groups[0], dict[str, Any](), dict[str, list[str]]()
    for group in groups[1:]:
        flag, equals, first = group[0].partition("=")
        values = [first, *group[1:]] if equals else group[1:]
        name = flag[2:].replace("-", "_")
        kind = typing.get_origin(kinds.get(name))
        if name == "config" and values:
            for value in values:
                of_file |= _read_config(value, kinds, known)
        elif kind is Mapping:
            mappings.setdefault(name, []).extend(values)
        elif kind is tuple:
            # A path may have a comma.
            split = values if name == "data" else [part for value in values for part in value.split(",") if part]
            words += [flag, json.dumps(split, ensure_ascii=False)]
        else:
            words += group
    for name, values in mappings.items():
        # Settings go over those of the file one by one; what is evaluated is chosen anew.
        before = {} if name == "data" else of_file.get(name) or {}
        words += [f"--{_flag(name)}", json.dumps(_mapping(f"--{_flag(name)}", values, before), ensure_ascii=False)]
    return [*(["--config", json.dumps(of_file, ensure_ascii=False)] if of_file else []), *words]


def _mapping(flag: str, words: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """``name=value`` as a mapping, and ``group.name=value`` as one of mappings; over what the file says of it."""
    mapping: dict[str, Any] = copy.deepcopy(dict(before))
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise InputError(f"{flag}: got {word!r}, expected name=value")
        group, _, own = name.rpartition(".")
        (mapping.setdefault(group, {}) if group else mapping)[own] = value
    return mapping


def _read_config(file: str, kinds: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A YAML file of settings, all values texts as those of flags; one that stands for a list is one."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader)  # noqa: S506 # makes texts alone
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds {values!r:.80}, expected settings such as 'batch_size: 32'")
    settings = {str(name).replace("-", "_"): value for name, value in values.items() if value not in _EMPTY}
    if unknown := sorted(settings.keys() - known.keys()):
        raise InputError(f"{file} names {unknown}, which are no settings: expected some of {sorted(kinds)}")
    for name, value in settings.items():
        if typing.get_origin(kinds.get(name)) is tuple and isinstance(value, str):
            settings[name] = [value] if name == "data" else value.split(",")
        elif known[name] is False:  # a flag of the program, which any text would raise, ``public: no`` as well
            settings[name] = yaml.safe_load(value) is True
    return settings
