"""The cells that a plan comes to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from adpretrain_hf.errors import InputError
from training.evaluation.cells import Cell
from training.evaluation.data_sets import category_names
from training.evaluation.detectors import DETECTORS
from training.evaluation.plan import PUBLISHED, Plan


def plan_cells(plan: Plan) -> list[tuple[Cell, ...]]:
    """The cells, in the order in which they are run; those that one model serves are together.

    All cells of a category follow each other, so that what its images are encoded to is computed once.

    Raises:
        InputError: a category that no data set has, or a share that is out of its range.
    """
    chosen = chosen_categories(plan)
    return [group for name in plan.data for group in _data_set_groups(plan, name, chosen[name])]


def chosen_categories(plan: Plan) -> dict[str, list[str]]:
    """The categories that are evaluated, of each data set.

    Raises:
        InputError: a category that no data set has.
    """
    there = {name: category_names(name, Path(root)) for name, root in plan.data.items()}
    known = {text for name, names in there.items() for one in names for text in (one, f"{name}/{one}")}
    unknown = [text for text in plan.categories if text not in known]
    if unknown:
        listed = "; ".join(f"{name}: {', '.join(names)}" for name, names in there.items())
        raise InputError(f"unknown categories {', '.join(unknown)}: expected some of {listed}")
    if not plan.categories:
        return there
    return {
        name: [one for one in names if {one, f"{name}/{one}"} & set(plan.categories)] for name, names in there.items()
    }


def _data_set_groups(plan: Plan, data_set: str, categories: Sequence[str]) -> Iterator[tuple[Cell, ...]]:
    settings = list(_settings(plan, data_set))
    for category, cell in itertools.product(categories, settings):
        if not DETECTORS[cell.detector].serves_all:
            yield (replace(cell, category=category),)
    for cell in settings:
        if DETECTORS[cell.detector].serves_all and categories:
            yield tuple(replace(cell, category=category) for category in categories)


def _settings(plan: Plan, data_set: str) -> Iterator[Cell]:
    """The cells of a data set, but for the category."""
    draws = list(itertools.product(plan.shots, plan.noise, plan.fraction, plan.seeds))
    detectors = [name for name in DETECTORS if name in plan.detectors]
    for detector, draw, features in itertools.product(detectors, draws, plan.features):
        for variant in _variants(plan, detector, features):
            yield Cell(data_set, "", detector, features, variant, *draw)


def _variants(plan: Plan, detector: str, features: str) -> list[str]:
    if features != "pretrained":
        return [""]
    return list(dict.fromkeys(DETECTORS[detector].variant if one == PUBLISHED else one for one in plan.variants))
