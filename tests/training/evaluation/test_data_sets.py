"""Every data set's layout, as a miniature tree with its quirks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adpretrain_hf.errors import InputError, MissingPathError
from tests.training.real_iad_tree import RealIADClass
from training.evaluation.data import DATA_SETS, category_names, read_category

# Miniature trees of the layouts, with their quirks


SIZE = (12, 10)  # width and height


def write_image(path: Path) -> Path:
    """Writes a small image; its suffix says which kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format={".jpg": "JPEG", ".bmp": "BMP"}.get(path.suffix.lower(), "PNG"))
    return path


def write_mask(path: Path, value: int = 255) -> Path:
    """Writes a mask with a square of a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    pixels[2:5, 3:7] = value
    Image.fromarray(pixels).save(path)
    return path


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Writes images with these names."""
    for name in names:
        write_image(folder / name)


def make_mvtecad(root: Path, name: str = "bottle", suffix: str = "_mask") -> Path:
    """Three images to train on, two normal and three anomalous ones of two kinds to test on."""
    write_images(root / name / "train/good", ["000.png", "001.png", "002.png"])
    write_images(root / name / "test/good", ["000.png", "001.png"])
    for kind, numbers in {"broken": ("000", "001"), "contamination": ("000",)}.items():
        for number in numbers:
            write_image(root / name / "test" / kind / f"{number}.png")
            write_mask(root / name / "ground_truth" / kind / f"{number}{suffix}.png")
    return root


def make_visa(root: Path) -> Path:
    """Images called .JPG, masks with the class's number, and the split in a table."""
    rows = ["object,split,label,image,mask"]
    for number, (split, label) in enumerate(
        [("train", "normal"), ("train", "normal"), ("test", "normal"), ("test", "anomaly"), ("test", "anomaly")]
    ):
        kind = "Normal" if label == "normal" else "Anomaly"
        path = f"candle/Data/Images/{kind}/{number:04}.JPG"
        mask_path = f"candle/Data/Masks/Anomaly/{number:04}.png" if label == "anomaly" else ""
        write_image(root / path)
        if mask_path:
            write_mask(root / mask_path, value=number - 2)
        rows.append(f"candle,{split},{label},{path},{mask_path}")
    write_image(root / "candle/Data/Images/Normal/9999.JPG")  # that no split names
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


def make_btad(root: Path) -> Path:
    """Classes of images and masks called .bmp and .png, of .png both, and of .bmp both."""
    for name, image_suffix, mask_suffix in (("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")):
        write_images(root / name / "train/ok", [f"{number:04}{image_suffix}" for number in range(2)])
        write_images(root / name / "test/ok", [f"0005{image_suffix}"])
        write_images(root / name / "test/ko", [f"0007{image_suffix}", f"0008{image_suffix}"])
        for number in ("0007", "0008"):
            write_mask(root / name / "ground_truth/ko" / f"{number}{mask_suffix}")
    return root


def make_mvtec3d(root: Path) -> Path:
    """Colour images beside depth, with validation images that nobody asks for."""
    for split, kinds in (("train", ["good"]), ("validation", ["good"]), ("test", ["good", "hole"])):
        for kind in kinds:
            for number in ("000", "001"):
                write_image(root / "bagel" / split / kind / "rgb" / f"{number}.png")
                (root / "bagel" / split / kind / "xyz").mkdir(exist_ok=True)
                (root / "bagel" / split / kind / "xyz" / f"{number}.tiff").write_bytes(b"not read")
                if split == "test":
                    write_mask(
                        root / "bagel" / split / kind / "gt" / f"{number}.png", value=0 if kind == "good" else 255
                    )
    return root


# What is read of them


def shape(category) -> tuple[int, int, int]:
    """Numbers of training, normal test and anomalous test images."""
    anomalous = sum(sample.is_anomalous for sample in category.test)
    return len(category.train), len(category.test) - anomalous, anomalous


def assert_masks(category, pairs: dict[str, str], root: Path) -> None:
    got = {
        str(Path(sample.image).relative_to(root)): str(Path(sample.mask).relative_to(root))
        for sample in category.test
        if sample.mask
    }
    assert got == pairs
    assert all(sample.is_anomalous for sample in category.test if sample.mask)


@pytest.mark.parametrize("data_set", ["mvtecad", "mpdd", "folder"])
def test_mvtecads_layout(data_set, tmp_path):
    root = make_mvtecad(make_mvtecad(tmp_path), "cable")
    assert category_names(data_set, root) == ["bottle", "cable"]
    category = read_category(data_set, root, "cable")
    assert shape(category) == (3, 2, 3)
    assert (category.data_set, category.name) == (data_set, "cable")
    assert sorted({sample.anomaly_class for sample in category.test}) == ["broken", "contamination", "good"]
    assert_masks(
        category,
        {
            f"cable/test/{name}.png": f"cable/ground_truth/{name}_mask.png"
            for name in ("broken/000", "broken/001", "contamination/000")
        },
        root,
    )


def test_order_is_that_of_the_paths(tmp_path):
    category = read_category("mvtecad", make_mvtecad(tmp_path), "bottle")
    for samples in (category.train, category.test):
        paths = [Path(sample.image) for sample in samples]
        assert paths == sorted(paths)


LAYOUTS = [
    ("mvtecad", make_mvtecad, "bottle"),
    ("mpdd", make_mvtecad, "bottle"),
    ("folder", make_mvtecad, "bottle"),
    ("visa", make_visa, "candle"),
    ("btad", make_btad, "01"),
    ("mvtec3d", make_mvtec3d, "bagel"),
]


@pytest.mark.parametrize(("data_set", "make", "name"), LAYOUTS)
@pytest.mark.parametrize("way", ["link", "dots", "category", "files"])
def test_links_and_dots_are_called_as_they_were_given(way, data_set, make, name, tmp_path):
    real, root = make(tmp_path / "real"), tmp_path / "link"
    if way == "link":
        root.symlink_to(real)
    elif way == "dots":
        root = real / ".." / "real"
    else:
        root.mkdir()
        for path in real.iterdir() if way == "category" else real.rglob("*.*"):
            (root / path.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(real)).symlink_to(path)
    expected = read_category(data_set, real, name)
    category = read_category(data_set, root, name)
    for got, plain in ((category.train, expected.train), (category.test, expected.test)):
        for column in ("image", "mask"):
            paths = [
                [path and Path(path).relative_to(below) for path in (getattr(sample, column) for sample in samples)]
                for samples, below in ((got, root), (plain, real))
            ]
            assert paths[0] == paths[1]


@pytest.mark.parametrize(("data_set", "make", "name"), [one for one in LAYOUTS if one[0] != "mvtec3d"])
def test_what_a_mac_leaves_is_passed_over(data_set, make, name, tmp_path):
    expected = shape(read_category(data_set, make(tmp_path), name))
    for path in [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".bmp", ".JPG")]:
        path.with_name(f"._{path.name}").write_bytes(b"no image")
    assert shape(read_category(data_set, tmp_path, name)) == expected


@pytest.mark.parametrize(("data_set", "make", "name"), LAYOUTS)
def test_categories_without_normal_test_images_are_refused(data_set, make, name, tmp_path):
    make(tmp_path)
    if data_set == "visa":
        split = tmp_path / "split_csv/1cls.csv"
        split.write_text("".join(line for line in split.open() if "test,normal" not in line))
    else:
        shutil.rmtree(tmp_path / name / ("test/ok" if data_set == "btad" else "test/good"))
    with pytest.raises(InputError, match=f"the category '{name}' of {data_set} has no normal test image"):
        read_category(data_set, tmp_path, name)


def test_folder_with_numbers_of_any_length_is_paired_by_name(tmp_path):
    write_images(tmp_path / "nut/train/good", ["1.png", "2.png"])
    write_images(tmp_path / "nut/test/good", ["1.png"])
    for number in (1, 2, 10, 11, 100):
        write_image(tmp_path / f"nut/test/bent/{number}.png")
        write_mask(tmp_path / f"nut/ground_truth/bent/{number}_mask.png")
    category = read_category("folder", tmp_path, "nut")
    pairs = {f"nut/test/bent/{n}.png": f"nut/ground_truth/bent/{n}_mask.png" for n in (1, 2, 10, 11, 100)}
    assert_masks(category, pairs, tmp_path)


def test_folder_with_an_empty_kind(tmp_path):
    root = make_mvtecad(tmp_path)
    (root / "bottle/test/scratched").mkdir()
    assert shape(read_category("folder", root, "bottle")) == (3, 2, 3)


def test_linked_folders_are_followed(tmp_path):
    root = make_mvtecad(tmp_path / "real")
    (root / "bottle/train/good").rename(tmp_path / "elsewhere")
    (root / "bottle/train/good").symlink_to(tmp_path / "elsewhere")
    assert shape(read_category("mvtecad", root, "bottle")) == (3, 2, 3)


@pytest.mark.parametrize("stray", ["overview.png", "test/overview.pgm", "train/broken/0.png"])
@pytest.mark.parametrize(("data_set", "make", "name"), [LAYOUTS[0], LAYOUTS[1]])
def test_images_outside_the_layout_are_named(data_set, make, name, stray, tmp_path):
    path = make(tmp_path) / name / stray
    path.parent.mkdir(exist_ok=True)
    write_image(path)
    what = "images have no mask" if stray.startswith("test") else f"images of {data_set} are in none of its folders"
    message = rf"1 {what}: expected .*\n  .*/{path.name}"
    with pytest.raises(InputError, match=message):
        read_category(data_set, tmp_path, name)


def test_what_a_mac_leaves_is_passed_over_and_named(tmp_path, caplog):
    root = make_mvtecad(tmp_path)
    write_image(root / "bottle/test/good/._000.png")
    assert shape(read_category("mvtecad", root, "bottle")) == (3, 2, 3)
    assert "passed over hidden images: good/._000.png" in caplog.text


@pytest.mark.parametrize("data_set", ["mvtecad", "folder"])
def test_paths_outside_ascii_and_all_suffixes_are_read(data_set, tmp_path):
    root = make_mvtecad(tmp_path / "Flächen")
    for number, suffix in enumerate((".pgm", ".ppm", ".gif", ".bmp", ".TIF", ".webp")):
        write_image(root / f"bottle/train/good/new{number}{suffix}")
    assert shape(read_category(data_set, root, "bottle")) == (9, 2, 3)


@pytest.mark.parametrize("data_set", ["mvtecad", "folder"])
def test_images_of_one_stem_do_not_share_a_mask(data_set, tmp_path):
    root = make_mvtecad(tmp_path)
    path = min((root / "bottle/test").glob("[!g]*/*"))
    write_image(path.with_suffix(".jpg"))
    message = (
        rf"2 images differ in their suffix alone and would share a mask: .*\n  .*{path.stem}.jpg\n  .*{path.stem}.png"
    )
    with pytest.raises(InputError, match=message):
        read_category(data_set, root, "bottle")


@pytest.mark.parametrize(
    ("folder", "message"),
    [("test_public", "is of MVTec AD 2 .it has test_public"), ("test/logical_anomalies", "is of MVTec LOCO")],
)
@pytest.mark.parametrize("data_set", ["mvtecad", "folder"])
def test_relatives_of_mvtecad_are_refused_by_name(data_set, folder, message, tmp_path):
    root = make_mvtecad(tmp_path)
    (root / "bottle" / folder).mkdir()
    with pytest.raises(InputError, match=message):
        read_category(data_set, root, "bottle")


@pytest.mark.parametrize("data_set", ["mvtecad", "folder"])
def test_folder_without_training_images_is_refused(data_set, tmp_path):
    for path in (make_mvtecad(tmp_path) / "bottle/train/good").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=f"the category 'bottle' of {data_set} has 0 training images, expected normal"):
        read_category(data_set, tmp_path, "bottle")


def test_images_that_visas_split_names_but_are_absent_are_listed(tmp_path):
    (make_visa(tmp_path) / "candle/Data/Images/Anomaly/0003.JPG").unlink()
    with pytest.raises(InputError, match=r"1 images of the category 'candle' of visa are missing: .*\n  .*0003\.JPG"):
        read_category("visa", tmp_path, "candle")


def test_masks_of_some_anomalous_images_only_are_refused(tmp_path):
    split = make_visa(tmp_path) / "split_csv/1cls.csv"
    split.write_text(split.read_text().replace("candle/Data/Masks/Anomaly/0003.png", ""))
    with pytest.raises(InputError, match=r"1 anomalous images of .* have no mask, others do: .*\n  .*0003\.JPG"):
        read_category("visa", tmp_path, "candle")


def test_folder_of_one_category_without_masks(tmp_path):
    root = tmp_path / "screws"
    write_images(root / "test/good", ["d.jpg"])
    write_images(root / "train/good", ["a.jpg", "b.JPG"])
    write_images(root / "test/bent", ["c.jpg"])
    assert category_names("folder", root) == ["screws"]
    category = read_category("folder", root, "screws")
    assert shape(category) == (2, 1, 1)
    assert category.test[0].mask is None
    assert category.test[0].anomaly_class == "bent"


def test_folder_with_masks_called_like_their_images(tmp_path):
    category = read_category("folder", make_mvtecad(tmp_path, suffix=""), "bottle")
    assert shape(category) == (3, 2, 3)
    assert all(Path(sample.mask).stem == Path(sample.image).stem for sample in category.test if sample.is_anomalous)


def test_visa(tmp_path):
    root = make_visa(tmp_path)
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


@pytest.mark.parametrize(
    ("name", "image_suffix", "suffix"), [("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")]
)
def test_btad(name, image_suffix, suffix, tmp_path):
    root = make_btad(tmp_path)
    assert category_names("btad", root) == ["01", "02", "03"]
    category = read_category("btad", root, name)
    assert shape(category) == (2, 1, 2)
    pairs = {f"{name}/test/ko/{n}{image_suffix}": f"{name}/ground_truth/ko/{n}{suffix}" for n in ("0007", "0008")}
    assert_masks(category, pairs, root)


def test_mvtec3d_takes_colour_and_leaves_validation_out(tmp_path):
    root = make_mvtec3d(tmp_path)
    assert category_names("mvtec3d", root) == ["bagel"]
    category = read_category("mvtec3d", root, "bagel")
    assert shape(category) == (2, 2, 2)
    assert {Path(sample.image).parent.name for sample in (*category.train, *category.test)} == {"rgb"}
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
    assert all(Path(sample.mask).stem == Path(sample.image).stem for sample in category.test if sample.is_anomalous)
    assert {sample.anomaly_class for sample in category.test if sample.is_anomalous} == {"AK"}
    assert shape(read_category("realiad", tmp_path, "u__block")) == (3, 4, 2)


def test_real_iad_at_several_resolutions_needs_one(tmp_path):
    RealIADClass("toy").write_folder(tmp_path)
    RealIADClass("toy").write_json(tmp_path)
    (tmp_path / "realiad_1024" / "toy").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has the resolutions \['1024', '512'\], expected one: give its folder"):
        category_names("realiad", tmp_path)
    assert category_names("realiad", tmp_path / "realiad_512") == ["toy"]
    assert shape(read_category("realiad", tmp_path / "realiad_512", "toy")) == (3, 4, 2)


def test_real_iads_jsons_are_no_resolution(tmp_path):
    RealIADClass("toy").write_json(tmp_path, "realiad_jsons")
    with pytest.raises(InputError, match=r"realiad_jsons has the resolutions \[\], expected one"):
        category_names("realiad", tmp_path / "realiad_jsons")


def test_real_iad_in_a_zip_says_what_to_do(tmp_path):
    RealIADClass("toy").write_zip(tmp_path)
    RealIADClass("toy").write_json(tmp_path)
    with pytest.raises(InputError, match=r"toy\.zip is not unpacked: unpack it beside itself to evaluate on it"):
        read_category("realiad", tmp_path, "toy")


@pytest.mark.parametrize("data_set", [name for name in DATA_SETS if name not in ("realiad", "visa")])
def test_empty_folder_is_refused(data_set, tmp_path):
    with pytest.raises(InputError, match=f"has no category in the layout of {data_set}"):
        category_names(data_set, tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingPathError, match="no folder .*nowhere to read mvtecad from"):
        category_names("mvtecad", tmp_path / "nowhere")


def test_missing_masks_are_listed(tmp_path):
    root = make_mvtecad(tmp_path)
    (root / "bottle/ground_truth/broken/001_mask.png").unlink()
    for data_set in ("mvtecad", "mpdd", "folder"):
        with pytest.raises(InputError, match=r"1 images have no mask: .*\n  .*/broken/001"):
            read_category(data_set, root, "bottle")
    (make_btad(tmp_path / "btad") / "03/ground_truth/ko/0007.bmp").unlink()
    with pytest.raises(InputError, match=r"1 images have no mask: .*\n  .*/ko/0007"):
        read_category("btad", tmp_path / "btad", "03")


@pytest.mark.parametrize("data_set", ["mvtecad", "mpdd", "folder"])
@pytest.mark.parametrize("suffix", [".jpg", ".WEBP"])
def test_masks_of_a_lossy_kind_are_listed_before_anything_is_fitted(tmp_path, data_set, suffix):
    mask = make_mvtecad(tmp_path) / "bottle/ground_truth/broken/001_mask.png"
    Image.open(mask).save(mask.with_suffix(suffix))
    mask.unlink()
    with pytest.raises(
        InputError, match=rf"1 masks of the .* are no PNG, BMP, TIFF or PGM: .*\n  .*001_mask\{suffix}$"
    ):
        read_category(data_set, tmp_path, "bottle")


def test_masks_without_an_image_are_listed(tmp_path):
    root = make_mvtecad(tmp_path)
    (root / "bottle/test/broken/001.png").unlink()
    with pytest.raises(InputError, match=r"1 masks have no image: .*\n  .*/broken/001"):
        read_category("mvtecad", root, "bottle")


@pytest.mark.parametrize(
    ("data_set", "name", "path"),
    [("visa", "candle", "candle/Data/Masks/Anomaly/0003.png"), ("mvtec3d", "bagel", "bagel/test/hole/gt/000.png")],
)
def test_masks_that_are_named_but_absent_are_listed(data_set, name, path, tmp_path):
    root = {"visa": make_visa, "mvtec3d": make_mvtec3d}[data_set](tmp_path)
    (root / path).unlink()
    with pytest.raises(InputError, match=rf"1 masks of the category '{name}' of {data_set} are missing: .*\n  .*"):
        read_category(data_set, root, name)


def test_categories_that_cannot_be_measured_are_refused(tmp_path):
    write_images(tmp_path / "nut/train/good", ["0.png"])
    write_images(tmp_path / "nut/test/good", ["0.png"])
    with pytest.raises(InputError, match="the category 'nut' of mvtecad has no anomalous test image"):
        read_category("mvtecad", tmp_path, "nut")


def test_visa_without_its_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"1cls\.csv cannot be read .* it comes with VisA and says what to train on"):
        category_names("visa", tmp_path)
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"has the columns \['a', 'b'\], expected"):
        category_names("visa", tmp_path)
