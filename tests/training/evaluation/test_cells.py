"""Cells: names that tell them apart, and values that cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from training.evaluation.cells import FEATURES, Cell

VALUES = {
    "data_set": "mvtecad",
    "category": "bolt",
    "detector": "padim",
    "features": "pretrained",
    "variant": "angle",
    "shots": 8,
    "noise": 0.1,
    "fraction": 0.5,
    "seed": 3,
}
OTHERS = [("category", "nut"), ("detector", "cflow"), ("variant", "norm"), ("shots", 4), ("noise", 0.0), ("seed", 2)]


def test_dictionaries_and_back():
    cell = Cell(**VALUES)
    assert cell.to_dict() == VALUES
    assert Cell.from_dict(VALUES | {"seconds": 1.0}) == cell


@pytest.mark.parametrize(("name", "value"), [*OTHERS, ("fraction", 1.0), ("data_set", "visa")])
def test_names_tell_cells_apart(name, value):
    assert Cell(**VALUES).name != Cell(**VALUES | {name: value}).name


@given(category=st.text(min_size=1, max_size=20))
def test_names_are_one_part_of_a_path(category):
    assert "/" not in Cell(**VALUES | {"category": category}).name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "best"}, f"unknown features 'best': expected one of {', '.join(FEATURES)}"),
        ({"variant": ""}, "features 'pretrained' with variant '': only pretrained ones have one"),
        ({"features": "raw"}, "features 'raw' with variant 'angle': only pretrained ones have one"),
        ({"shots": 0}, "shots is 0, expected a number of reference images >= 1"),
        ({"noise": 0.3}, "noise is 0.3, expected a share of anomalous images from 0 to 0.2"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"fraction": 0.0}, r"fraction is 0.0, expected a share of the training images in \(0, 1\]"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Cell(**VALUES | changes)


def test_cells_of_one_model_for_all_categories_are_alike():
    assert Cell(**VALUES).without_category() == Cell(**VALUES | {"category": "nut"}).without_category()
