"""The split of the categories, joined sources, and errors that name what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from adpretrain_hf.errors import InputError
from tests.training.real_iad_tree import RealIADClass
from training.settings import PretrainSettings
from training.training_data import TrainingData, load_training_data

NAMES = [f"part{number:02}" for number in range(10)]


def make_tree(root: Path, names: list[str]) -> str:
    for name in names:
        one = RealIADClass(name)
        one.write_folder(root)
        one.write_json(root)
    return str(root)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    return make_tree(tmp_path_factory.mktemp("tree"), NAMES)


def load(*data: str, **settings) -> TrainingData:
    return load_training_data(PretrainSettings(data=data, **settings), Path("unused"))


def test_each_eighth_category_validates_by_default(tree):
    data = load(tree)
    assert data.validation == ["part00", "part08"]
    assert data.training == [name for name in NAMES if name not in data.validation]
    assert {data.dataset[position]["category"] for position in data.positions} == set(data.training)
    assert len(data.positions) == sum(name in data.training for name in data.dataset["category"])


def test_named_categories(tree):
    data = load(tree, validation_categories=("part03",), exclude_categories=("part01", "part02"))
    assert data.validation == ["part03"]
    assert set(NAMES) - set(data.training) == {"part01", "part02", "part03"}
    data = load(tree, categories=("part04", "part05"), validation_categories=("part05",))
    assert data.training == ["part04"]


def test_sources_are_joined(tree, tmp_path):
    data = load(tree, make_tree(tmp_path, ["other"]))
    assert set(data.training + data.validation) == {*NAMES, "other"}
    assert data.dataset[data.positions[-1]]["category"] in data.training


def test_a_category_in_two_sources_is_refused(tree, tmp_path):
    with pytest.raises(InputError, match=r"the categories \['part03'\] are in more than one of --data"):
        load(tree, make_tree(tmp_path, ["part03"]))


@pytest.mark.parametrize("flag", ["categories", "exclude_categories", "validation_categories"])
def test_unknown_names_are_refused(tree, flag):
    name = flag.replace("_", "-")
    with pytest.raises(InputError, match=rf"--{name} names \['nut'\], expected some of \['part00', "):
        load(tree, **{flag: ("nut",)})


def test_nothing_left_to_train_on(tree):
    with pytest.raises(InputError, match=r"no category is left to train on: all of \['part04'\] are for validation"):
        load(tree, categories=("part04",))
