"""PretrainSettings: everything that a pretraining run depends on, as one dataclass and as flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adpretrain_hf.errors import InputError


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PretrainSettings:
    """What a run does; two runs with equal settings end with equal weights on the CPU.

    The help text of a flag is the documentation of its field. Where a default differs from the published run (paper,
    section 4; released ``main.py``), the help says so.

    Raises:
        InputError: a value is out of its range; the message names the flag.
    """

    data: tuple[str, ...] = _setting(
        ("synthetic",),
        "RealIAD folders, a gated Hub repository (Real-IAD/Real-IAD), or 'synthetic'; several are joined",
    )
    resolution: str = _setting("512", "which of RealIAD's resolutions: 256, 512, 1024 or raw")
    categories: tuple[str, ...] = _setting((), "train and validate on these alone; all by default")
    validation_categories: tuple[str, ...] = _setting(
        (), "kept out of training, judge every epoch; each 8th by default"
    )
    shots: int = _setting(8, "references of each validation category and view")
    exclude_categories: tuple[str, ...] = _setting((), "neither trained nor validated on, for a later test")
    backbone: str = _setting("dinov2-base", "preset, transformers id or folder, open_clip:<arch>/<weights>, ...")
    upstream: str = _setting("", "id on the Hub to record as the origin, where the backbone is a folder")
    image_size: int = _setting(0, "side in pixels; that of the backbone's configuration by default")
    levels: tuple[int, ...] = _setting((), "blocks counted from 1; the quarters of the depth by default")
    reference_tokens: int = _setting(2048, "learned reference tokens of a projector")
    init_scale: float = _setting(1.0, "of the projectors' start: 1 as published, 0 the identity")
    normalize_tokens: bool = _setting(True, "tokens of unit length before matching; the published run: no")
    scale_residuals: bool = _setting(True, "every level to a mean normal residual norm of 1; the published run: no")
    references: tuple[int, ...] = _setting((1, 4, 8), "reference images per image, drawn for every step")
    pool_size: int = _setting(64, "normal images per category and view to draw references from; 0, as published: all")
    paint_defects: float = _setting(0.0, "share of the normal images that get a painted defect; the published run: 0")
    plain_first: bool = _setting(False, "leave the first view as it is at test time; the published run augments both")
    epochs: int = _setting(10, "passes over the training images")
    batch_size: int = _setting(32, "images of an optimiser step, over all processes")
    accumulate: int = _setting(1, "parts that a step is computed in; the losses compare patches within a part")
    learning_rate: float = _setting(1e-4, "of Adam; a tenth after 70 %% of the steps and again after 90 %%")
    weight_decay: float = _setting(5e-4, "of Adam")
    clip_norm: float = _setting(0.0, "largest length of a step's gradient; 0, as published: any")
    angle_weight: float = _setting(1.0, "factor on the angle loss")
    temperature: float = _setting(0.15, "of the angle loss")
    margin: float = _setting(0.75, "between normal and anomalous norms")
    seed: int = _setting(0, "of the initial weights, the order, the references and the augmentation")
    precision: str = _setting("bfloat16", "of autocast, float32 or bfloat16; weights and losses are float32")
    device: str = _setting("", "cpu, cuda, ...; the first GPU of each process if there is one")
    workers: int = _setting(2, "processes that decode and augment, for each training process")
    cache_gb: float = _setting(0.0, "memory for reference features, in GB; a share of what is free by default")
    cache_folder: str = _setting("", "where reference features are kept between runs; a temporary folder by default")
    checkpoint_minutes: float = _setting(10.0, "between checkpoints")

    def __post_init__(self) -> None:
        for name in ("reference_tokens", "epochs", "batch_size", "accumulate", "shots"):
            self._require(getattr(self, name) >= 1, name, "an integer >= 1")
        for name in (
            "image_size",
            "pool_size",
            "workers",
            "seed",
            "cache_gb",
            "weight_decay",
            "clip_norm",
            "init_scale",
            "angle_weight",
        ):
            self._require(getattr(self, name) >= 0, name, "a number >= 0")
        for name in ("learning_rate", "temperature", "margin", "checkpoint_minutes"):
            self._require(getattr(self, name) > 0, name, "a number > 0")
        self._require(0 <= self.paint_defects <= 1, "paint_defects", "a share from 0 to 1")
        self._require(bool(self.data), "data", "at least one source")
        self._require(bool(self.references) and min(self.references) >= 1, "references", "integers >= 1")
        self._require(self.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16")
        self._require(
            self.batch_size % self.accumulate == 0, "batch_size", f"a multiple of accumulate={self.accumulate}"
        )

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def _from_lists(cls, values: dict[str, Any]) -> PretrainSettings:
        fixed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fixed)

    def to_json(self) -> str:
        """The settings as JSON, as ``from_json`` reads them."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PretrainSettings:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: not settings, or those of another version.
        """
        try:
            return cls._from_lists(json.loads(text))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"these are not the settings of a pretraining run of this version: {error}") from error


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting: ``--batch-size 32``, ``--levels 3 6 9 12``, ``--no-normalize-tokens``."""
    types = typing.get_type_hints(PretrainSettings)
    for field in dataclasses.fields(PretrainSettings):
        flag, options = f"--{field.name.replace('_', '-')}", {"default": field.default, "help": field.metadata["help"]}
        kind = types[field.name]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, nargs="+", type=typing.get_args(kind)[0], **options)
        else:
            parser.add_argument(flag, type=kind, **options)


def from_flags(args: argparse.Namespace) -> PretrainSettings:
    """The settings that parsed flags stand for.

    Raises:
        InputError: see ``PretrainSettings``.
    """
    names = [field.name for field in dataclasses.fields(PretrainSettings)]
    return PretrainSettings._from_lists({name: getattr(args, name) for name in names})


def differing(old: PretrainSettings, new: PretrainSettings) -> Sequence[str]:
    """The flags in which two settings differ, as texts ``--name old -> new``."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [f"--{n.replace('_', '-')} {before[n]!r} -> {after[n]!r}" for n in before if before[n] != after[n]]
