"""The arguments of ``training.evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from adpretrain_hf.cli import Values
from training.evaluation.cells import FEATURES
from training.evaluation.data_sets import DATA_SETS
from training.evaluation.detectors import DETECTORS

_MAPPINGS = ("data", "epochs")


def parse_values(argv: Sequence[str] | None, description: str) -> dict[str, Any]:
    """The values that are given on the command line, by name; those that are not are left out.

    Args:
        argv: the arguments; those of the process by default.
        description: of the program, one line.
    """
    values = vars(_parser(description).parse_args(argv))
    values |= {name: dict(values[name]) for name in _MAPPINGS if name in values}
    if "set" in values:
        chosen = values.pop("set")
        values["set"] = {detector: {name: v for d, name, v in chosen if d == detector} for detector, *_ in chosen}
    return values


def _parser(description: str) -> argparse.ArgumentParser:
    # What is not given is left out: then the plan's file, or its default, says it.
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("bundle", nargs="?", help="a folder, or an id on the Hub")
    parser.add_argument("--output", help="the folder of the run")
    parser.add_argument("--config", help="a YAML file of the same names")
    _add_lists(parser)
    parser.add_argument("--epochs", nargs="+", type=_named_number, metavar="DETECTOR=NUMBER", help="of training")
    own = "settings of a detector's model"
    parser.add_argument("--set", nargs="+", type=_setting, metavar="DETECTOR.NAME=VALUE", help=own)
    parser.add_argument("--references", help="a JSON file {category: [paths of reference images]}")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    parser.add_argument("--workers", type=int, help="processes that read images")
    parser.add_argument("--device", help="cpu, cuda, ...; the first GPU if there is one")
    parser.add_argument("--export-card", metavar="FOLDER", help="a bundle, whose card gets the results as model-index")
    return parser


def _add_lists(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", type=_named_text, metavar="NAME=FOLDER", help=f"of {', '.join(DATA_SETS)}")
    lists: dict[str, tuple[Callable[[str], object], str]] = {
        "categories": (str, "names, or data_set/name; all by default"),
        "detectors": (str, f"some of {', '.join(DETECTORS)}"),
        "features": (str, f"some of {', '.join(FEATURES)}"),
        "variants": (str, "of the bundle's projectors; published: the one that the paper gives a detector"),
        "shots": (int, "numbers of reference images"),
        "seeds": (int, "of all that is drawn"),
        "noise": (float, "shares of anomalous images in the training data, from 0 to 0.2"),
        "fraction": (float, "shares of the normal training images that are used, in (0, 1]"),
    }
    for name, (kind, text) in lists.items():
        parser.add_argument(f"--{name}", action=Values, type=kind, help=text)


def _named_text(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected name=value")
    return name, value


def _setting(text: str) -> tuple[str, str, Any]:
    name, value = _named_text(text)
    detector, dot, setting = name.partition(".")
    if not (detector and dot and setting):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected detector.name=value")
    return detector, setting, yaml.safe_load(value)


def _named_number(text: str) -> tuple[str, int]:
    name, value = _named_text(text)
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected name=number")
    return name, int(value)
