"""Which images a cell takes as references, trains on, and tests on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adpretrain_hf.errors import InputError
from training.data.folders import Category
from training.data.table import Row
from training.evaluation.plan import Cell
from training.seeds import named_generator


class Drawn(NamedTuple):
    """The images of one cell.

    Attributes:
        references: that residuals are taken against.
        train: that a detector is fitted on; normal ones, and with label noise some anomalous ones.
        test: all test images that are not trained on.
    """

    references: tuple[Row, ...]
    train: tuple[Row, ...]
    test: tuple[Row, ...]


def draw_training(category: Category, cell: Cell, references: Sequence[Path] | None = None) -> Drawn:
    """Draws the images of a cell.

    A draw depends on the category and the cell's seed alone, and is nested: one image of it is the first of two, a
    tenth is part of the whole, little noise is part of more. So detectors, features, shots and fractions are compared
    on the same images. References are the first of the training images, also of a fraction, as far as it has so many,
    but for images of damaged parts that show no damage; with label noise some are anomalous: nobody knew.

    Args:
        category: its images.
        cell: ``shots``, ``fraction``, ``noise`` and ``seed`` are looked at.
        references: paths of a fixed list, whose first ``shots`` take the place of drawn ones.

    Raises:
        InputError: fewer images than the cell asks for, or a list that cannot be used.
    """
    normal = max(1, math.ceil(round(cell.fraction * len(category.train), 9)))  # 0.07 * 100 is a little more than 7
    mistaken, order = _ordered(category, cell, normal)
    train, moved = tuple(order[: normal + len(mistaken)]), set(mistaken)
    test = tuple(sample for sample in category.test if sample not in moved)
    # Those that show an anomaly nobody knew of.
    usable = [sample for sample in order if sample.is_anomalous or sample.is_good]
    if references is None and cell.shots > len(usable):
        raise InputError(f"{cell.category} has {len(usable)} training images, fewer than {cell.shots} shots")
    chosen = usable[: cell.shots] if references is None else _fixed(references, cell, [*order, *test])
    if tested := sorted(sample.image for sample in set(chosen) & set(test)):
        raise InputError(f"the list for {cell.category} names images that are tested on: {', '.join(tested)}")
    return Drawn(tuple(chosen), train, test)


def draw_few_shot(category: Category, cell: Cell) -> Drawn:
    """Draws references of a cell's view, which are all that is trained on; the other images of the view are tested.

    A draw depends on the names of category and view and on the cell's seed alone. Normal images of damaged parts are no
    references.

    Raises:
        InputError: too few normal images.
    """
    samples = sorted((*category.train, *category.test), key=lambda sample: Path(sample.image))
    own = [sample for sample in samples if sample.view == cell.view]
    good = [sample for sample in own if sample.is_good]
    normal = sum(not sample.is_anomalous for sample in own)
    if cell.shots > len(good) or cell.shots >= normal:
        raise InputError(
            f"{cell.category} {cell.view} has {normal} normal images, {len(good)} of them of undamaged parts: too few "
            f"to draw {cell.shots} shots and test on one more"
        )
    places = named_generator(cell.seed, category.name, cell.view).choice(len(good), cell.shots, replace=False)
    references = tuple(good[place] for place in sorted(places))
    return Drawn(references, references, tuple(sample for sample in own if sample not in references))


def read_reference_lists(path: str | Path) -> dict[str, list[Path]]:
    """Reads fixed references, ``{category: [paths]}`` in JSON, or ``data_set/category``; relative to the file's folder.

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


def unlabelled(path: Path) -> Row:
    """A reference of which nothing is known but where it lies."""
    return Row(str(path.absolute()), None, "", "", "good", False, True, "")


def _ordered(category: Category, cell: Cell, normal: int) -> tuple[list[Row], list[Row]]:
    """The anomalous images that are mistaken for normal ones, and all that may be trained on in the order of use.

    ``normal`` is how many normal images are trained on.
    """
    random = named_generator(cell.seed, category.data_set, category.name)
    images = [category.train[place] for place in random.permutation(len(category.train))]
    anomalous = [sample for sample in category.test if sample.is_anomalous]
    number = max(round(cell.noise * normal / (1 - cell.noise)), int(cell.noise > 0))
    if number >= len(anomalous):
        raise InputError(
            f"noise {cell.noise} takes {number} of {len(anomalous)} anomalous images of {cell.category}: at least one "
            "must be left to test on; use less noise"
        )
    mistaken = [anomalous[place] for place in random.permutation(len(anomalous))[:number]]
    # Spread by a generator of its own, or more noise would change the order of the rest.
    random = named_generator(cell.seed, category.data_set, category.name, "places")
    places = random.random(len(images) + number)
    # Among the normal images that are trained on: the others come after all of these.
    places[len(images) :] *= [*np.sort(places[: len(images)]), 1.0][normal]
    both = [*images, *mistaken]
    return mistaken, [both[place] for place in np.argsort(places)]


def _fixed(references: Sequence[Path], cell: Cell, known: Sequence[Row]) -> list[Row]:
    """Samples of a list; those of the category are recognised, however their paths are written.

    A training image that is a reference would else be compared with itself.
    """
    listed, where = references[: cell.shots], f"the list for {cell.category}"
    if cell.shots > len(references):
        raise InputError(f"{where} has {len(references)} references, fewer than {cell.shots} shots")
    if missing := [str(path) for path in listed if not path.is_file()]:
        raise InputError(f"{where} names images that are not there: {', '.join(missing)}")
    of_file = {Path(sample.image).resolve(): sample for sample in known}
    chosen = [of_file.get(path.resolve(), unlabelled(path)) for path in listed]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{where} names an image twice among its first {cell.shots}")
    return chosen
