"""The store of results: all comes back, an unfinished cell is not done, a damaged file is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import BundleError
from tests.training.evaluation.made_up import made_up_cell, made_up_patches, made_up_result, made_up_shown, result_of
from training.evaluation.store import (
    Result,
    is_done,
    load_failures,
    load_patches,
    load_results,
    load_shown,
    patches_file,
    save_failure,
    save_patches,
    save_result,
)

CELL = made_up_cell(noise=0.1, fraction=0.25, features="pretrained")
NUMBERS, PICTURES = (Path("cells", CELL.name + end) for end in (".json", ".npz"))
finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_result(tmp_path, made_up_result(CELL), made_up_shown(CELL))
    return tmp_path


def same_arrays(first: object, second: object) -> bool:
    pairs = [(getattr(first, one.name), getattr(second, one.name)) for one in fields(first)]
    return all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in pairs)


def test_a_cell_comes_back(run: Path) -> None:
    assert is_done(run, CELL)
    assert not is_done(run, replace(CELL, seed=1))
    assert load_results(run) == [made_up_result(CELL)]
    assert same_arrays(load_shown(run, CELL), made_up_shown(CELL))
    assert {path.relative_to(run) for path in run.rglob("*") if path.is_file()} == {NUMBERS, PICTURES}


def test_a_category_may_have_the_longest_name_that_a_folder_can_have(tmp_path: Path) -> None:
    cells = [made_up_cell(category=250 * "a" + end) for end in ("1", "2")]
    for cell in cells:
        save_result(tmp_path, made_up_result(cell), made_up_shown(cell))
        save_failure(tmp_path, cell, "of memory")
        sample = made_up_patches("mvtecad", cell.category, "raw")
        save_patches(tmp_path, sample)
        assert patches_file(tmp_path, sample).is_file() and is_done(tmp_path, cell)
    assert [result.cell for result in load_results(tmp_path)] == [*load_failures(tmp_path)] == cells


@given(
    images=st.lists(st.tuples(finite, st.booleans(), st.text()), max_size=5),
    category=st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=20),
    metric=st.one_of(st.none(), st.floats(0, 1)),
)
def test_any_numbers_and_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, images: list[tuple[float, bool, str]], category: str, metric: float | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    cell = made_up_cell(category=category)
    scores, labels, names = ([one[place] for one in images] for place in range(3))
    result = Result(cell, {"aupro": metric}, scores, labels, names, seconds=0.0)
    save_result(folder, result, made_up_shown(cell, number=0, side=4))
    assert is_done(folder, cell)
    assert load_results(folder) == [result]


def test_a_name_of_unknown_bytes_comes_back(tmp_path: Path) -> None:
    result = replace(result_of(CELL, 0.5), names=["a\udcff.png", "b.png"])
    save_result(tmp_path, result, made_up_shown(CELL))
    assert load_results(tmp_path) == [result]


def test_results_are_in_the_cells_order(tmp_path: Path) -> None:
    cells = [made_up_cell(shots=shots) for shots in (16, 2, 8)]
    for cell in cells:
        save_result(tmp_path, made_up_result(cell), made_up_shown(cell))
    assert [result.cell.shots for result in load_results(tmp_path)] == [2, 8, 16]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert load_results(tmp_path) == load_patches(tmp_path) == []


def test_a_cell_without_its_pictures_is_not_done(run: Path) -> None:
    (run / PICTURES).unlink()
    assert not is_done(run, CELL)
    with pytest.raises(BundleError, match=r"\.npz is damaged or missing .*: delete it"):
        load_shown(run, CELL)


def test_a_write_that_fails_leaves_the_cell_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **others: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # of the JSON, after the pictures
        with pytest.raises(OSError, match=r"\.json cannot be written: No space left on device"):
            save_result(tmp_path, made_up_result(CELL), made_up_shown(CELL))
    assert (tmp_path / PICTURES).is_file()
    assert not is_done(tmp_path, CELL)
    assert load_results(tmp_path) == []
    save_result(tmp_path, made_up_result(CELL), made_up_shown(CELL))
    assert is_done(tmp_path, CELL)


def test_what_an_interrupted_write_left_is_passed_over(run: Path) -> None:
    (run / "cells" / ".1234abcd.json").write_text('{"cell"')
    (run / "patches").mkdir()
    (run / "patches" / ".1234abcd.npz").write_bytes(b"PK")
    assert len(load_results(run)) == 1
    assert load_patches(run) == []


@pytest.mark.parametrize(
    "text",
    ["", '{"cell": {', "[]", "{}", '{"cell": {}}', "\udcff", '{"cell": 3}'],
    ids=["empty", "cut", "list", "nothing", "other", "bytes", "no cell"],
)
def test_damaged_numbers_are_named(run: Path, text: str) -> None:
    (run / NUMBERS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=rf"{NUMBERS.name} is damaged or missing .*: delete it"):
        load_results(run)


def test_numbers_with_more_or_less_than_they_have(run: Path) -> None:
    values = json.loads((run / NUMBERS).read_text())
    for change in (values | {"other": 1}, {name: values[name] for name in values if name != "names"}):
        (run / NUMBERS).write_text(json.dumps(change))
        with pytest.raises(BundleError, match="is damaged"):
            load_results(run)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes(byte ^ 255 for byte in data[place : place + 64]) + data[place + 64 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"text"])
def test_damaged_pictures_are_named(run: Path, damage) -> None:
    (run / PICTURES).write_bytes(damage((run / PICTURES).read_bytes()))
    with pytest.raises(BundleError, match=r"\.npz is damaged or missing .*: delete it, and the file of the same name"):
        load_shown(run, CELL)


def test_nothing_is_unpickled(run: Path) -> None:
    np.savez(run / PICTURES, **dict.fromkeys(("indices", "images", "masks", "maps"), np.array([{}], dtype=object)))
    with pytest.raises(BundleError, match="allow_pickle=False"):
        load_shown(run, CELL)


def test_other_arrays_are_refused(run: Path) -> None:
    np.savez(run / PICTURES, indices=np.arange(2))
    with pytest.raises(BundleError, match="images is not a file in the archive"):
        load_shown(run, CELL)


def test_patches_come_back(tmp_path: Path) -> None:
    samples = [made_up_patches("visa", "candle", features) for features in ("pretrained", "raw")]
    assert not patches_file(tmp_path, samples[1]).is_file()
    for sample in samples:
        save_patches(tmp_path, sample)
    assert patches_file(tmp_path, samples[1]).is_file()
    assert patches_file(tmp_path, samples[0]) != patches_file(tmp_path, replace(samples[0], variant="norm"))
    loaded = load_patches(tmp_path)
    assert all(same_arrays(one, other) for one, other in zip(loaded, samples, strict=True))
    assert all(isinstance(one.category, str) for one in loaded)
