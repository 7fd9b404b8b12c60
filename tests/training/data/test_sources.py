"""What people have as the data of a run: their own images in the layouts of the field, read as for evaluation."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from adpretrain_hf.errors import InputError
from tests.conftest import PHOTOS
from tests.training.evaluation.test_data_sets import (
    make_btad,
    make_mvtec3d,
    make_mvtecad,
    make_visa,
    write_images,
    write_mask,
)
from training.data.sources import TrainingData, load_training_data
from training.evaluation.data_sets import category_names, read_category
from training.settings import PretrainSettings


def load_data(*data: object, **settings: object) -> TrainingData:
    options = {"all_categories": True} | settings
    return load_training_data(PretrainSettings(data=tuple(map(str, data)), **options), Path("unused"))


@pytest.mark.parametrize(
    ("make", "data_set"),
    [(make_mvtecad, "folder"), (make_visa, "visa"), (make_btad, "btad"), (make_mvtec3d, "mvtec3d")],
)
def test_training_reads_what_evaluation_reads(make, data_set, tmp_path):
    data = load_data(make(tmp_path))
    expected = [
        (str(one.image), one.mask and str(one.mask), name, one.is_anomalous, not one.is_anomalous, one.defect)
        for name in category_names(data_set, tmp_path)
        for category in [read_category(data_set, tmp_path, name)]
        for one in (*category.train, *category.test)
    ]
    rows = [
        (
            row["image"]["path"],
            row["mask"] and row["mask"]["path"],
            *(row[name] for name in ("category", "is_anomalous", "is_good", "anomaly_class")),
        )
        for row in data.dataset
    ]
    assert rows == expected
    assert data.training == category_names(data_set, tmp_path)
    assert [rows[position][3] for position in data.anomalous] == [True] * sum(row[3] for row in rows)


def test_one_category_may_be_the_folder_itself(tmp_path):
    data = load_data(make_mvtecad(tmp_path) / "bottle")
    assert data.training == ["bottle"] and len(data.positions) == 8


def test_anomalous_images_without_masks_are_left_out_and_told(tmp_path, caplog):
    root = make_mvtecad(tmp_path)
    shutil.rmtree(root / "bottle" / "ground_truth")
    with pytest.raises(InputError, match="none of the 5 training images is anomalous, .* nothing to learn"):
        load_data(root)
    data = load_data(root, paint_defects=0.5)
    assert (len(data.positions), data.anomalous, data.validation) == (5, [], [])
    assert f"left out 3 anomalous images without a mask, such as {root / 'bottle/test/broken/000.png'}" in caplog.text
    assert "no category has anomalous images to judge epochs by" in caplog.text


def test_images_without_damage_need_no_layout(tmp_path):
    write_images(tmp_path / "screws", ["b.png", "a.jpg"])
    data = load_data(tmp_path / "screws", paint_defects=0.5, all_categories=False)
    assert data.training == ["screws"] and not data.validation
    assert [Path(entry["path"]).name for entry in data.dataset["image"]] == ["a.jpg", "b.png"]
    assert data.dataset["is_good"][:] == [True, True]


@pytest.mark.parametrize("folders", [["good", "bad"], ["bottle/train/ng"], []])
def test_a_folder_in_no_layout_is_told_what_is_expected(folders, tmp_path):
    for folder in folders:
        write_images(tmp_path / folder, ["a.png"])
    with pytest.raises(InputError, match=r"is in no layout that is known: expected <category>/train/good .* there are"):
        load_data(tmp_path, paint_defects=0.5)


def test_masks_that_do_not_keep_zero_are_refused_before_anything_is_trained(tmp_path):
    root = make_mvtecad(tmp_path)
    mask = root / "bottle/ground_truth/broken/000_mask.png"
    write_mask(mask.with_suffix(".bmp")).rename(mask.with_suffix(".jpg"))
    mask.unlink()
    with pytest.raises(InputError, match=r"1 masks of the category 'bottle' of folder are no PNG, BMP, TIFF or PGM"):
        load_data(root)


# Weights


def test_each_source_gets_its_share_of_an_epoch(tmp_path):
    make_mvtecad(tmp_path / "few", "cap")
    for name in ("bolt", "nut", "rim"):
        make_mvtecad(tmp_path / "many", name)
    data = load_data(tmp_path / "many", tmp_path / "few", weights=(1.0, 3.0))
    assert [len(group) for group in data.groups] == [24, 8]
    first, second = data.epoch_positions(0, 0), data.epoch_positions(0, 1)
    assert first == data.epoch_positions(0, 0) != second
    for epoch in (first, second):
        counts = Counter(epoch)
        assert len(epoch) == 32
        assert sum(counts[position] for position in data.groups[0]) == 8  # of 24, a third, each once at most
        assert {counts[position] for position in data.groups[0]} == {0, 1}
        assert [counts[position] for position in data.groups[1]] == [3] * 8
    assert load_data(tmp_path / "many", tmp_path / "few").epoch_positions(0, 0) == data.positions


def test_weights_are_one_for_each_source(tmp_path):
    make_mvtecad(tmp_path / "a", "cap")
    make_mvtecad(tmp_path / "b", "nut")
    for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(InputError, match=r"--weights is .*, expected a number > 0 for each of the 2 of --data"):
            load_data(tmp_path / "a", tmp_path / "b", weights=weights)
    with pytest.raises(InputError, match=r"--weights: of .*b no image is trained on"):
        load_data(tmp_path / "a", tmp_path / "b", weights=(1.0, 1.0), exclude_categories=("nut",))


def test_the_photographs_can_be_trained_on():
    data = load_data(PHOTOS)
    assert data.training == category_names("folder", PHOTOS)
    assert 0 < len(data.anomalous) < len(data.positions)
