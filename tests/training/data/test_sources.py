"""What people have as the data of a run: their own images in the layouts of the field, read as for evaluation."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from PIL import Image

from adpretrain_hf.errors import InputError
from tests.conftest import PHOTOS
from tests.training.evaluation.test_data_sets import (
    make_btad,
    make_mvtec3d,
    make_mvtecad,
    make_visa,
    write_image,
    write_images,
    write_mask,
)
from tests.training.real_iad_tree import RealIADClass
from training.data.__main__ import main as push_data
from training.data.sources import TrainingData, load_table, load_training_data
from training.data.table import read_encoded
from training.evaluation.data import category_names, read_category
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
        (one.image, one.mask, name, one.is_anomalous, not one.is_anomalous, one.anomaly_class)
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
    with pytest.raises(InputError, match="none of the 5 training images .* or --paint-defects 0.5 without --balanced"):
        load_data(root, paint_defects=0.5, balanced=True)
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


# What the datasets library loads, and pushing to there

OWNER = "hf_owner"


def labels(data: TrainingData) -> list[tuple[object, ...]]:
    names = ("category", "view", "anomaly_class", "is_anomalous", "is_good")
    return sorted(zip(*(list(data.dataset[name]) for name in names), strict=True))


def pixels(data: TrainingData) -> list[tuple[bytes, bytes | None]]:
    return sorted((read_encoded(row["image"]), row["mask"] and read_encoded(row["mask"])) for row in data.dataset)


@pytest.fixture
def pushed(tmp_path, hub, monkeypatch) -> str:
    """Two products in MVTecAD's layout and a class of RealIAD in a zip, on the Hub as Parquet."""
    monkeypatch.setenv("HF_TOKEN", OWNER)
    make_mvtecad(make_mvtecad(tmp_path / "own"), "cap")
    made = RealIADClass("zipper")
    made.write_zip(tmp_path / "real")
    made.write_json(tmp_path / "real")
    sources = [str(tmp_path / "own"), str(tmp_path / "real")]
    assert push_data(["push", "acme/parts", "--data", *sources]) == 0
    return "acme/parts"


def test_a_pushed_set_is_read_back_as_it_was(pushed, tmp_path, hub):
    expected, got = load_data(tmp_path / "own", tmp_path / "real"), load_data(pushed)
    assert HfApi(token=OWNER).dataset_info(pushed).private
    assert pixels(got) == pixels(expected)
    assert labels(got) == sorted(
        (category, view, kind if is_anomalous else "good" if is_good else "hidden", is_anomalous, is_good)
        for category, view, kind, is_anomalous, is_good in labels(expected)
    )
    assert {row[2] for row in labels(got)} == {"good", "hidden", "AK", "broken", "contamination"}
    first = next(iter(load_dataset(pushed, split="train", streaming=True, token=OWNER)))
    assert list(first) == ["image", "mask", "category", "view", "anomaly"]


def test_a_pushed_set_is_trained_on_from_parquet_and_from_disk_alike(pushed, tmp_path, hub):
    expected = load_data(pushed)
    dataset = load_dataset(pushed, split="train", token=OWNER)
    dataset.save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(str(tmp_path / "parquet" / "a.parquet"))
    for source in (tmp_path / "disk", tmp_path / "parquet", f"parquet:{tmp_path / 'parquet'}"):
        data = load_data(source)
        assert pixels(data) == pixels(expected) and labels(data) == labels(expected)


def test_an_imagefolder_goes_by_its_folders_names(tmp_path, caplog):
    write_images(tmp_path / "parts" / "good", ["0.png", "1.png"])
    write_images(tmp_path / "parts" / "scratched", ["0.png"])
    data = load_data(f"imagefolder:{tmp_path / 'parts'}", paint_defects=0.5)
    assert labels(data) == [("parts", "", "good", False, True)] * 2
    assert "left out 1 anomalous images without a mask" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("parquet:nowhere", "parquet:nowhere cannot be loaded by datasets: "),
        ("acme/nothing", "no repository acme/nothing on the Hub"),
    ],
)
def test_what_cannot_be_loaded_is_told(source, message, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_data(source)


def test_a_set_without_images_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(InputError, match=r"has the columns \['text'\], expected one of images, called image"):
        load_data(tmp_path / "set")


# Labels and masks as people have them


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["good", "OK", "Normal", "Hidden", "scratch"], "gggha"),
        (["0", "1", "none", "", None], "gagmm"),
        ([0.0, 1.0, None, 0.0, 1.0], "gamga"),
        ([0, 1, 0, 1, 1], "gagaa"),
        ([False, True, False, True, True], "gagaa"),
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["some", "of all"])
def test_labels_say_what_an_image_is_and_masks_where_there_is_none(labels, expected, masks, tmp_path):
    """g: good, h: hidden, a: anomalous, m: as the mask says; normal ones may have masks that are black."""
    images, own = [write_image(tmp_path / f"{row}.png") for row in range(5)], []
    for row, kind in enumerate(expected):
        write_mask(tmp_path / f"{row}_mask.png")
        own.append(str(tmp_path / f"{row}_mask.png") if masks == "of all" or kind in "am" else None)
    columns = {"image": [str(image) for image in images], "mask": own, "anomaly": labels}
    table = Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "set")
    rows = load_table(str(tmp_path / "set"))
    are_anomalous = [kind in "am" for kind in expected]
    assert rows["is_anomalous"][:] == are_anomalous
    assert rows["is_good"][:] == [kind == "g" for kind in expected]
    assert [mask is not None for mask in rows["mask"]] == are_anomalous


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mask": [1, 2]}, r"the column mask of .* is of Value\('int64'\), expected images or their paths"),
        ({"image": [None]}, "1 rows of .* have no image: leave them out.\n  row 1"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_used_are_told(columns, message, tmp_path):
    image = str(write_image(tmp_path / "0.png"))
    images = [image, *columns.pop("image", [image])]
    Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        load_table(str(tmp_path / "s"))


def test_kinds_of_defects_that_are_called_like_normal_ones_stay_defects(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    root = make_mvtecad(tmp_path / "own")
    for folder in ("test", "ground_truth"):
        (root / "bottle" / folder / "broken").rename(root / "bottle" / folder / "0")
    assert push_data(["push", "acme/kinds", "--data", str(root)]) == 0
    pushed, own = load_data("acme/kinds"), load_data(root)
    for name in ("is_anomalous", "is_good"):
        assert sorted(pushed.dataset[name][:]) == sorted(own.dataset[name][:])
    assert "defect 0" in pushed.dataset["anomaly_class"][:]


def test_what_cannot_be_trained_on_is_not_pushed(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    root = make_mvtecad(tmp_path / "own")
    (mask,) = [*(root / "bottle" / "ground_truth").rglob("*.png")][:1]
    Image.new("L", (5, 5), 255).save(mask)
    for arguments, message in (
        (["acme/own", "--data", str(root)], f"the mask {mask} has 5 x 5 pixels, its image "),
        (["acme/own", "--data", str(root), str(root)], "are in more than one of --data"),
        (["acme own", "--data", str(root)], "acme own is no id of a repository, expected owner/name"),
    ):
        assert push_data(["push", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not HfApi(token=OWNER).repo_exists("acme/own", repo_type="dataset")


def test_the_right_to_push_is_asked_for_before_anything_is_read(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert push_data(["push", "acme/own", "--data", str(tmp_path / "nowhere")]) == 1
    assert "no token, or one that the Hub does not accept" in capsys.readouterr().err


def test_a_mask_of_several_images_is_refused(tmp_path):
    root = make_mvtecad(tmp_path) / "bottle"
    image = next((root / "test" / "broken").iterdir())
    shutil.copy(image, image.with_name(f"{image.stem}_mask{image.suffix}"))
    with pytest.raises(InputError, match="1 masks of the category 'bottle' of folder are those of several images"):
        load_data(root)


def test_masks_of_normal_images_are_passed_over(tmp_path):
    root = make_mvtecad(tmp_path) / "bottle"
    image = next((root / "test" / "good").iterdir())
    write_mask(root / "ground_truth" / "good" / f"{image.stem}_mask.png")
    assert len(load_data(root).positions) == 8


def test_an_imagefolder_whose_parts_differ_in_their_folders(tmp_path):
    """Labels of one part alone: those of the other are missing, and go by masks."""
    write_images(tmp_path / "nut" / "train" / "good", ["0.png"])
    for kind in ("good", "scratched"):
        write_images(tmp_path / "nut" / "test" / kind, ["1.png"])
    data = load_data(f"imagefolder:{tmp_path / 'nut'}", paint_defects=0.5)
    assert [row[3:] for row in labels(data)] == [(False, True)] * 2


def test_a_category_without_images_is_told(tmp_path):
    (tmp_path / "nut" / "train" / "good").mkdir(parents=True)
    with pytest.raises(InputError, match="none of the 0 training images is anomalous|no image"):
        load_data(tmp_path)
