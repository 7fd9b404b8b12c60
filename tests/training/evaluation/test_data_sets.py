"""Every data set's layout, as a miniature tree with its quirks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("anomalib")
from adpretrain_hf.errors import InputError, MissingPathError
from tests.training.evaluation import trees
from tests.training.real_iad_tree import RealIADClass
from training.evaluation.data_sets import DATA_SETS, category_names, read_category


def shape(category) -> tuple[int, int, int]:
    """Numbers of training, normal test and anomalous test images."""
    anomalous = sum(sample.is_anomalous for sample in category.test)
    return len(category.train), len(category.test) - anomalous, anomalous


def assert_masks(category, pairs: dict[str, str], root: Path) -> None:
    got = {
        str(sample.image.relative_to(root)): str(sample.mask.relative_to(root))
        for sample in category.test
        if sample.mask
    }
    assert got == pairs
    assert all(sample.is_anomalous for sample in category.test if sample.mask)


@pytest.mark.parametrize("data_set", ["mvtecad", "mpdd", "folder"])
def test_mvtecads_layout(data_set, tmp_path):
    root = trees.mvtecad(trees.mvtecad(tmp_path), "cable")
    assert category_names(data_set, root) == ["bottle", "cable"]
    category = read_category(data_set, root, "cable")
    assert shape(category) == (3, 2, 3)
    assert (category.data_set, category.name) == (data_set, "cable")
    assert sorted({sample.defect for sample in category.test}) == ["broken", "contamination", "good"]
    assert_masks(
        category,
        {
            f"cable/test/{name}.png": f"cable/ground_truth/{name}_mask.png"
            for name in ("broken/000", "broken/001", "contamination/000")
        },
        root,
    )


def test_order_is_that_of_the_paths(tmp_path):
    category = read_category("mvtecad", trees.mvtecad(tmp_path), "bottle")
    for samples in (category.train, category.test):
        assert [sample.image for sample in samples] == sorted(sample.image for sample in samples)


def test_folder_of_one_category_without_masks(tmp_path):
    root = tmp_path / "screws"
    trees.images(root / "train/good", ["a.jpg", "b.JPG"])
    trees.images(root / "test/bent", ["c.jpg"])
    assert category_names("folder", root) == ["screws"]
    category = read_category("folder", root, "screws")
    assert shape(category) == (2, 0, 1)
    assert category.test[0].mask is None
    assert category.test[0].defect == "bent"


def test_folder_with_masks_called_like_their_images(tmp_path):
    category = read_category("folder", trees.mvtecad(tmp_path, suffix=""), "bottle")
    assert shape(category) == (3, 2, 3)
    assert all(sample.mask.stem == sample.image.stem for sample in category.test if sample.is_anomalous)


def test_visa(tmp_path):
    root = trees.visa(tmp_path)
    assert category_names("visa", root) == ["candle"]
    category = read_category("visa", root, "candle")
    assert shape(category) == (2, 1, 2)
    assert_masks(
        category,
        {
            f"candle/Data/Images/Anomaly/{number}.JPG": f"candle/Data/Masks/Anomaly/{number}.png"
            for number in ("0003", "0004")
        },
        root,
    )
    assert sorted(path.name for path in root.iterdir()) == ["candle", "split_csv"]  # nothing was copied


@pytest.mark.parametrize(("name", "suffix"), [("01", ".png"), ("03", ".bmp")])
def test_btad(name, suffix, tmp_path):
    root = trees.btad(tmp_path)
    assert category_names("btad", root) == ["01", "03"]
    category = read_category("btad", root, name)
    assert shape(category) == (2, 1, 2)
    pairs = {f"{name}/test/ko/{n}.bmp": f"{name}/ground_truth/ko/{n}{suffix}" for n in ("0007", "0008")}
    assert_masks(category, pairs, root)


def test_mvtec3d_takes_colour_and_leaves_validation_out(tmp_path):
    root = trees.mvtec3d(tmp_path)
    assert category_names("mvtec3d", root) == ["bagel"]
    category = read_category("mvtec3d", root, "bagel")
    assert shape(category) == (2, 2, 2)
    assert {sample.image.parent.name for sample in (*category.train, *category.test)} == {"rgb"}
    assert_masks(
        category, {f"bagel/test/hole/rgb/{n}.png": f"bagel/test/hole/gt/{n}.png" for n in ("000", "001")}, root
    )


@pytest.mark.parametrize("jsons", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
def test_real_iad_by_its_own_split(jsons, tmp_path):
    for one in (RealIADClass("toy", normals=4), RealIADClass("u__block", between="__")):
        one.write_folder(tmp_path)
        one.write_json(tmp_path, jsons)
    assert category_names("realiad", tmp_path) == ["toy", "u__block"]
    category = read_category("realiad", tmp_path, "toy")
    # Of three views of a damaged sample the last does not show the damage.
    assert shape(category) == (6, 7, 2)
    assert all(sample.mask.stem == sample.image.stem for sample in category.test if sample.is_anomalous)
    assert {sample.defect for sample in category.test if sample.is_anomalous} == {"AK"}
    assert shape(read_category("realiad", tmp_path, "u__block")) == (3, 4, 2)


def test_real_iad_at_several_resolutions_needs_one(tmp_path):
    RealIADClass("toy").write_folder(tmp_path)
    RealIADClass("toy").write_json(tmp_path)
    (tmp_path / "realiad_1024" / "toy").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has the resolutions \['1024', '512'\], expected one: give its folder"):
        category_names("realiad", tmp_path)
    assert category_names("realiad", tmp_path / "realiad_512") == ["toy"]
    assert shape(read_category("realiad", tmp_path / "realiad_512", "toy")) == (3, 4, 2)


def test_real_iad_in_a_zip_says_what_to_do(tmp_path):
    RealIADClass("toy").write_zip(tmp_path)
    RealIADClass("toy").write_json(tmp_path)
    with pytest.raises(InputError, match=r"toy\.zip is not unpacked: unpack it beside itself to evaluate on it"):
        read_category("realiad", tmp_path, "toy")


@pytest.mark.parametrize("data_set", [name for name in DATA_SETS if name not in ("realiad", "visa")])
def test_empty_folder_is_refused(data_set, tmp_path):
    with pytest.raises(InputError, match=f"has no category in the layout of {data_set}"):
        category_names(data_set, tmp_path)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'imagenet': expected one of mvtecad, visa"):
        category_names("imagenet", tmp_path)
    with pytest.raises(MissingPathError, match="no folder .*nowhere to read mvtecad from"):
        category_names("mvtecad", tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no category 'screw': expected one of bottle"):
        read_category("mvtecad", trees.mvtecad(tmp_path), "screw")


def test_missing_masks_are_listed(tmp_path):
    root = trees.mvtecad(tmp_path)
    (root / "bottle/ground_truth/broken/001_mask.png").unlink()
    for data_set in ("mvtecad", "mpdd", "folder"):
        with pytest.raises(InputError, match=r"1 images have no mask: .*\n  broken/001"):
            read_category(data_set, root, "bottle")


def test_masks_without_an_image_are_listed(tmp_path):
    root = trees.mvtecad(tmp_path)
    (root / "bottle/test/broken/001.png").unlink()
    with pytest.raises(InputError, match=r"1 masks have no image: .*\n  broken/001"):
        read_category("mvtecad", root, "bottle")


@pytest.mark.parametrize(
    ("data_set", "name", "path"),
    [
        ("visa", "candle", "candle/Data/Masks/Anomaly/0003.png"),
        ("btad", "03", "03/ground_truth/ko/0007.bmp"),
        ("mvtec3d", "bagel", "bagel/test/hole/gt/000.png"),
    ],
)
def test_masks_that_are_named_but_absent_are_listed(data_set, name, path, tmp_path):
    root = getattr(trees, data_set)(tmp_path)
    (root / path).unlink()
    with pytest.raises(InputError, match=rf"1 masks of the category '{name}' of {data_set} are missing: .*\n  .*"):
        read_category(data_set, root, name)


def test_categories_that_cannot_be_measured_are_refused(tmp_path):
    trees.images(tmp_path / "nut/train/good", ["0.png"])
    trees.images(tmp_path / "nut/test/good", ["0.png"])
    with pytest.raises(InputError, match="the category 'nut' of mvtecad has no anomalous test image"):
        read_category("mvtecad", tmp_path, "nut")


def test_visa_without_its_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"1cls\.csv cannot be read .* it comes with VisA and says what to train on"):
        category_names("visa", tmp_path)
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"has the columns \['a', 'b'\], expected"):
        category_names("visa", tmp_path)
