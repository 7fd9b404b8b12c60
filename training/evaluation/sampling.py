"""Which images a cell takes as references, trains on, and tests on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adpretrain_hf.errors import InputError
from training.evaluation.categories import Category, Sample
from training.evaluation.cells import Cell
from training.seeds import named_generator


@dataclass(frozen=True)
class Drawn:
    """The images of one cell.

    Attributes:
        references: that residuals are taken against.
        train: that a detector is fitted on; normal ones, and with label noise some anomalous ones.
        test: all test images that are not trained on.
    """

    references: tuple[Sample, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def draw_training(category: Category, cell: Cell, references: Sequence[Path] | None = None) -> Drawn:
    """Draws the images of a cell.

    A draw depends on the category and the cell's seed alone, and is nested: one image of it is the first of two, a
    tenth is part of the whole, little noise is part of more. So detectors, features, shots and fractions are compared
    on the same images. With label noise, references are drawn from the noisy training images too: nobody knew.

    Args:
        category: its images.
        cell: ``shots``, ``fraction``, ``noise`` and ``seed`` are looked at.
        references: paths of a fixed list, whose first ``shots`` take the place of drawn ones.

    Raises:
        InputError: fewer images than the cell asks for.
    """
    random = named_generator(cell.seed, category.data_set, category.name)
    normal = [category.train[place] for place in random.permutation(len(category.train))]
    anomalous = [sample for sample in category.test if sample.is_anomalous]
    anomalous = [anomalous[place] for place in random.permutation(len(anomalous))]
    kept = normal[: math.ceil(cell.fraction * len(normal))]
    noisy = _mistaken(anomalous, len(kept), cell)
    # Spread by a generator of its own, or more noise would change the order of the rest.
    places = (
        named_generator(cell.seed, category.data_set, category.name, "places").random(len(normal) + len(noisy)).tolist()
    )
    keys = places[: len(kept)] + places[len(normal) :]
    train = [sample for _, sample in sorted(zip(keys, kept + noisy, strict=True), key=lambda pair: pair[0])]
    chosen = _fixed(references, cell, category) if references is not None else _drawn(normal, noisy, places, cell)
    moved = set(noisy)
    return Drawn(tuple(chosen), tuple(train), tuple(sample for sample in category.test if sample not in moved))


def read_reference_lists(path: str | Path) -> dict[str, list[Path]]:
    """Reads fixed references, ``{category: [paths]}`` in JSON; relative paths are taken from the file's folder.

    Raises:
        InputError: not readable, or not of that form.
    """
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): expected a JSON file of reference lists") from error
    well_formed = isinstance(lists, dict) and all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in lists.values()
    )
    if not well_formed:
        raise InputError(f"{path} is not of the form {{category: [paths of reference images]}}")
    return {category: [Path(path).parent / name for name in names] for category, names in lists.items()}


def _mistaken(anomalous: list[Sample], normal: int, cell: Cell) -> list[Sample]:
    """The anomalous images that make up the share ``noise`` of a training set with so many normal ones."""
    number = round(cell.noise * normal / (1 - cell.noise))
    number = max(number, 1) if cell.noise > 0 else 0
    if number >= len(anomalous):
        raise InputError(
            f"noise {cell.noise} takes {number} of {len(anomalous)} anomalous images of {cell.category}: at least one "
            "must be left to test on; use less noise"
        )
    return anomalous[:number]


def _drawn(normal: list[Sample], noisy: list[Sample], places: Sequence[float], cell: Cell) -> list[Sample]:
    """The first ``shots`` of all training images in their order, whatever fraction of them a detector sees."""
    pool = [sample for _, sample in sorted(zip(places, normal + noisy, strict=True), key=lambda pair: pair[0])]
    if cell.shots > len(pool):
        raise InputError(f"{cell.category} has {len(pool)} training images, fewer than {cell.shots} shots")
    return pool[: cell.shots]


def _fixed(references: Sequence[Path], cell: Cell, category: Category) -> list[Sample]:
    if cell.shots > len(references):
        raise InputError(
            f"the list for {cell.category} has {len(references)} references, fewer than {cell.shots} shots"
        )
    known = {sample.image: sample for sample in category.train}
    missing = [str(path) for path in references[: cell.shots] if not path.is_file()]
    if missing:
        raise InputError(f"the list for {cell.category} names images that are not there: {', '.join(missing)}")
    return [
        known.get(path.absolute(), Sample(path.absolute(), None, False, "good")) for path in references[: cell.shots]
    ]
