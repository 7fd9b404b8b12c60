"""RealIAD from folders, zips and the Hub: every layout and naming trap, and every tree that is refused."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from tests.loopback_hub.hub_server import HubServer
from tests.training.real_iad_tree import RealIADClass, load_real_iad, pack_jsons
from training.data.real_iad import open_real_iad
from training.data.table import FEATURES, read_encoded

API = HfApi(token="hf_owner")
COLUMNS = ["image", "mask", "category", "view", "anomaly_class", "is_anomalous", "is_good", "sample"]


@pytest.fixture
def ballast() -> RealIADClass:
    return RealIADClass("ballast")


@pytest.fixture
def root(tmp_path: Path, ballast: RealIADClass) -> Path:
    """One class, unpacked."""
    ballast.write_folder(tmp_path)
    ballast.write_json(tmp_path)
    return tmp_path


def labels(dataset: datasets.Dataset) -> list[dict]:
    return [{name: row[name] for name in COLUMNS[2:]} for row in dataset]


def contents(dataset: datasets.Dataset, column: str = "image") -> list[bytes | None]:
    return [None if entry is None else read_encoded(entry) for entry in dataset[column]]


def refused(root: Path | str, message: str, **arguments: object) -> str:
    with pytest.raises(InputError, match=message) as caught:
        load_real_iad(root, **arguments)
    return str(caught.value)


class TestFolder:
    def test_rows(self, root):
        dataset = load_real_iad(root)
        assert dataset.features == FEATURES and dataset.column_names == COLUMNS
        folder = f"{root}/realiad_512/ballast"
        expected = []
        for code, below, sample in (("AK", "NG/AK", 1), ("OK", "OK", 1), ("OK", "OK", 2)):
            for view in (1, 2, 3):
                stem = f"{folder}/{below}/S000{sample}/ballast_000{sample}_{code}_C{view}_20231023103255"
                anomalous = code == "AK" and view < 3
                row = {"image": {"bytes": None, "path": f"{stem}.jpg"}, "category": "ballast", "view": f"C{view}"}
                row["mask"] = {"bytes": None, "path": f"{stem}.png"} if anomalous else None
                row |= {
                    "anomaly_class": "AK" if anomalous else "OK",
                    "is_anomalous": anomalous,
                    "is_good": code == "OK",
                }
                expected.append(row | {"sample": f"S000{sample}"})
        assert list(dataset) == expected

    def test_the_encoded_bytes_are_the_files(self, root, ballast):
        dataset = load_real_iad(root)
        for row in dataset:
            assert read_encoded(row["image"]) == Path(row["image"]["path"]).read_bytes()
        assert {data for data in contents(dataset, "mask") if data} == {
            data for name, data in ballast.files.items() if name.endswith(".png")
        }

    def test_a_relative_path_gives_addresses_that_hold_elsewhere(self, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        dataset = load_real_iad(root.name)
        monkeypatch.chdir("/")
        assert all(contents(dataset))

    def test_no_image_is_opened_or_even_looked_for(self, tmp_path, ballast):
        ballast.write_json(tmp_path)
        for name in ballast.files:
            path = tmp_path / "realiad_512" / "ballast" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(tmp_path / "nowhere")
        assert len(load_real_iad(tmp_path)) == 9

    @pytest.mark.parametrize("resolution", ["256", "512", "1024", "raw"])
    def test_resolutions(self, tmp_path, ballast, resolution):
        for written in ("256", "512", "1024", "raw"):
            ballast.write_folder(tmp_path, written)
        ballast.write_json(tmp_path)
        paths = [entry["path"] for entry in load_real_iad(tmp_path, resolution=resolution)["image"]]
        assert len(paths) == 9 and all(path.startswith(f"{tmp_path}/realiad_{resolution}/ballast/") for path in paths)

    def test_512_is_the_default(self, tmp_path, ballast):
        for written in ("256", "512"):
            ballast.write_folder(tmp_path, written)
        ballast.write_json(tmp_path)
        assert load_real_iad(tmp_path)["image"][:] == load_real_iad(tmp_path, resolution="512")["image"][:]

    def test_a_zip_unpacked_into_a_folder_of_its_name(self, root, ballast, tmp_path_factory):
        doubled = tmp_path_factory.mktemp("doubled")
        ballast.write_folder(doubled, below="ballast")
        ballast.write_json(doubled)
        assert "/realiad_512/ballast/ballast/OK/" in load_real_iad(doubled)["image"][8]["path"]
        assert contents(load_real_iad(doubled)) == contents(load_real_iad(root))

    @pytest.mark.parametrize("prefix", ["ballast", "ballast/", ""])
    def test_prefixes(self, root, ballast, prefix):
        expected = list(load_real_iad(root))
        ballast.json["meta"]["prefix"] = prefix
        ballast.write_json(root)
        assert list(load_real_iad(root)) == expected

    def test_what_a_mac_leaves_behind_is_passed_over(self, root):
        expected = list(load_real_iad(root))
        (root / "realiad_512" / "__MACOSX").mkdir()
        (root / "realiad_512" / ".DS_Store").touch()
        (root / "realiad_512" / "ballast" / "NG" / "AK" / "S0001" / "._ballast_C1_.png").touch()
        assert list(load_real_iad(root)) == expected


class TestZips:
    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_is_the_folder_without_being_unpacked(self, root, ballast, tmp_path_factory, method):
        packed = tmp_path_factory.mktemp("packed")
        path = ballast.write_zip(packed, method=method)
        ballast.write_json(packed)
        before = sorted(packed.rglob("*"))
        dataset = load_real_iad(packed)
        assert labels(dataset) == labels(load_real_iad(root))
        for column in ("image", "mask"):
            assert contents(dataset, column) == contents(load_real_iad(root), column)
        member = "ballast/OK/S0002/ballast_0002_OK_C3_20231023103255.jpg"
        assert dataset[8]["image"] == {"bytes": None, "path": f"zip://{member}::{path}"}
        assert sorted(packed.rglob("*")) == before

    def test_only_the_directory_is_read(self, tmp_path, ballast):
        path = ballast.write_zip(tmp_path)
        ballast.write_json(tmp_path)
        with zipfile.ZipFile(path) as archive:
            start = archive.start_dir
        data = path.read_bytes()
        path.write_bytes(bytes(start) + data[start:])
        assert len(load_real_iad(tmp_path)) == 9

    def test_some_classes_packed_and_some_not(self, root):
        other = RealIADClass("audiojack")
        other.write_zip(root)
        other.write_json(root)
        dataset = load_real_iad(root)
        assert dataset["category"][:] == ["audiojack"] * 9 + ["ballast"] * 9
        assert [entry["path"].startswith("zip://") for entry in dataset["image"]] == [True] * 9 + [False] * 9
        assert all(contents(dataset))

    def test_a_class_that_is_unpacked_beside_its_zip_is_read_from_the_folder(self, root, ballast):
        expected = list(load_real_iad(root))
        ballast.write_zip(root)
        assert list(load_real_iad(root)) == expected


class TestDatasetsLibrary:
    def test_decodes_files_and_members_of_zips(self, root):
        other = RealIADClass("audiojack")
        other.write_zip(root)
        other.write_json(root)
        decoded = load_real_iad(root).cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
        assert {image.size for image in decoded["image"]} == {(6, 5)}
        assert [mask is not None for mask in decoded["mask"]] == decoded["is_anomalous"][:]

    def test_saves_the_images_themselves_and_loads_them_again(self, root, tmp_path_factory):
        other = RealIADClass("audiojack")
        other.write_zip(root)
        other.write_json(root)
        dataset, folder = load_real_iad(root), tmp_path_factory.mktemp("saved")
        expected = [contents(dataset, column) for column in ("image", "mask")]
        dataset.save_to_disk(folder)
        shutil.rmtree(root / "realiad_512")
        again = datasets.load_from_disk(folder)
        assert again.features == FEATURES and labels(again) == labels(dataset)
        assert [contents(again, column) for column in ("image", "mask")] == expected


class TestJsons:
    @pytest.mark.parametrize("folder", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_places(self, tmp_path, ballast, folder, packed):
        ballast.write_folder(tmp_path)
        ballast.write_json(tmp_path, folder)
        if packed:
            pack_jsons(tmp_path, folder)
        assert len(load_real_iad(tmp_path)) == 9

    def test_the_single_view_jsons_beside_them_are_not_taken(self, root, ballast):
        single = ballast.copy()
        single.json["test"] = []
        single.write_json(root, "realiad_jsons/realiad_jsons_sv")
        single.write_json(root, "realiad_jsons_sv")
        assert len(load_real_iad(root)) == 9

    def test_meta_may_hold_more_and_in_another_order(self, root, ballast):
        ballast.json["meta"] = {"prefix": "ballast/", "normal_class": "OK", "pre_transform": []}
        ballast.write_json(root)
        assert len(load_real_iad(root)) == 9

    def test_the_split_and_the_order_do_not_matter(self, root, ballast):
        expected = list(load_real_iad(root))
        ballast.json["train"], ballast.json["test"] = ballast.json["test"][::-1], ballast.json["train"][::-1]
        ballast.write_json(root)
        assert list(load_real_iad(root)) == expected

    def test_an_image_among_the_damaged_ones_without_a_mask_is_normal(self, root, ballast):
        for item in ballast.json["test"]:
            if item["image_path"].startswith("NG/"):
                item["anomaly_class"] = "AK"  # whatever the json calls it
        ballast.write_json(root)
        rows = [row for row in load_real_iad(root) if "/NG/" in row["image"]["path"]]
        assert [(row["view"], row["is_anomalous"]) for row in rows] == [("C1", True), ("C2", True), ("C3", False)]

    def test_an_empty_mask_path_is_none(self, root, ballast):
        expected = list(load_real_iad(root))
        for item in ballast.json["train"] + ballast.json["test"]:
            item["mask_path"] = item["mask_path"] or ""
        ballast.write_json(root)
        assert list(load_real_iad(root)) == expected

    @pytest.mark.parametrize("name", ["plastic__nut", "part_C4_x", "usb.c"])
    @pytest.mark.parametrize("between", ["_", "__"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_names_are_read_and_not_rebuilt(self, tmp_path, name, between, packed):
        made = RealIADClass(name, between=between, views=5)
        (made.write_zip if packed else made.write_folder)(tmp_path)
        made.write_json(tmp_path)
        dataset = load_real_iad(tmp_path)
        assert dataset["category"][:] == [name] * 15 and all(contents(dataset))
        assert dataset["view"][:] == ["C1", "C2", "C3", "C4", "C5"] * 3
        assert dataset["sample"][:] == ["S0001"] * 10 + ["S0002"] * 5

    def test_images_that_the_json_leaves_out_may_lie_there(self, root, ballast):
        damaged = [item for item in ballast.json["test"] if item["mask_path"]]
        ballast.json["test"] = [item for item in ballast.json["test"] if item not in damaged]
        ballast.write_json(root)
        assert len(load_real_iad(root)) == 7


class TestCategories:
    @pytest.fixture
    def three(self, tmp_path: Path) -> Path:
        for name in ("switch", "audiojack", "mint"):
            made = RealIADClass(name)
            made.write_folder(tmp_path)
            made.write_json(tmp_path)
        return tmp_path

    def test_all_in_alphabetical_order(self, three):
        assert load_real_iad(three).unique("category") == ["audiojack", "mint", "switch"]

    @pytest.mark.parametrize("asked", [["switch", "mint"], ("mint", "switch"), ["mint", "switch", "mint"]])
    def test_some(self, three, asked):
        dataset = load_real_iad(three, categories=asked)
        assert dataset.unique("category") == ["mint", "switch"] and len(dataset) == 18

    def test_what_is_not_asked_for_may_be_bad(self, three):
        (three / "realiad_jsons" / "realiad_jsons" / "mint.json").unlink()
        assert len(load_real_iad(three, categories=["switch"])) == 9


def no_prefix(content: dict) -> None:
    del content["meta"]["prefix"]


def no_meta(content: dict) -> None:
    del content["meta"]


def no_test(content: dict) -> None:
    del content["test"]


def no_mask_path(content: dict) -> None:
    del content["test"][1]["mask_path"]


def no_image_path(content: dict) -> None:
    content["test"][1]["image_path"] = None


def item_is_a_text(content: dict) -> None:
    content["train"][2] = "OK/S0001/x_C1_1.jpg"


def no_anomaly_class(content: dict) -> None:
    content["train"][0].pop("anomaly_class")


def no_view(content: dict) -> None:
    content["train"][0]["image_path"] = "OK/S0001/ballast_C9_1.jpg"


def no_sample(content: dict) -> None:
    content["train"][0]["image_path"] = "OK/ballast_C1_1.jpg"


class TestBadTrees:
    def test_nothing_there(self, tmp_path):
        missing = "no RealIAD at .*/none: neither a folder nor the id of a repository"
        with pytest.raises(MissingPathError, match=missing):
            load_real_iad(tmp_path / "none")
        refused(tmp_path, "no RealIAD in .*: expected folders such as realiad_512 .* and realiad_jsons beside them")

    def test_the_folder_of_a_resolution_instead_of_the_one_above(self, root):
        refused(root / "realiad_512", "no RealIAD in .*: expected folders such as realiad_512")

    def test_unknown_resolution(self, root, ballast):
        ballast.write_folder(root, "1024")
        refused(root, r"has no resolution '640': expected one of \['1024', '512'\]", resolution="640")

    def test_an_empty_resolution(self, root):
        (root / "realiad_raw").mkdir()
        refused(root, r"has no resolution 'raw': expected one of \['512'\]", resolution="raw")

    @pytest.mark.parametrize("packed", [False, True])
    def test_missing_json(self, root, packed):
        other = RealIADClass("audiojack")
        other.write_folder(root)
        if packed:
            pack_jsons(root, "realiad_jsons")
        places = "realiad_jsons/audiojack.json and realiad_jsons/realiad_jsons/audiojack.json"
        refused(root, f"no json for the class 'audiojack': looked for {places} in {root} and {root}/realiad_jsons.zip")

    @pytest.mark.parametrize("data", [b"", b"{", b"<html>Sign in</html>", b"\xff\xfe\x00", b"[" * 100_000])
    def test_not_json(self, root, ballast, data):
        ballast.write_json(root).write_bytes(data)
        refused(root, r"realiad_jsons/ballast.json is not a json as RealIAD comes with \(.*\): get it again")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (no_prefix, "KeyError.'prefix'"),
            (no_meta, "KeyError.'meta'"),
            (no_test, "KeyError.'test'"),
            (no_mask_path, "KeyError.'mask_path'"),
            (no_image_path, "TypeError"),
            (item_is_a_text, "TypeError"),
            (no_anomaly_class, "KeyError.'anomaly_class'"),
            (no_view, "the image is called 'OK/S0001/ballast_C9_1.jpg', expected ...*_C1_"),
            (no_sample, "the image is called 'OK/ballast_C1_1.jpg', expected .../S0001/"),
        ],
    )
    def test_a_json_that_lacks_something(self, root, ballast, spoil, message):
        spoil(ballast.json)
        ballast.write_json(root)
        refused(root, f"ballast.json is not a json as RealIAD comes with .*{message}.*: get it again")

    def test_a_json_that_is_no_object(self, root, ballast):
        ballast.write_json(root).write_text("[1, 2]")
        refused(root, "ballast.json is not a json as RealIAD comes with .*: get it again")

    @pytest.mark.parametrize("packed", [False, True])
    def test_absent_images_are_counted_and_the_first_ten_listed(self, tmp_path, packed):
        made = RealIADClass("ballast", normals=6)
        absent = sorted(name for name in made.files if name.startswith("OK/") and "_C3_" not in name)
        for name in absent:
            del made.files[name]
        (made.write_zip if packed else made.write_folder)(tmp_path)
        made.write_json(tmp_path)
        message = refused(
            tmp_path,
            r"^12 images that \S*/ballast.json names are absent from \S*/ballast\S*: unpack or download it again",
        )
        assert message.splitlines()[1:] == [f"  {name}" for name in absent[:10]] + ["  and 2 more"]

    def test_absent_masks(self, root, ballast):
        mask = next(name for name in ballast.files if name.endswith(".png"))
        (root / "realiad_512" / "ballast" / mask).unlink()
        message = refused(root, r"^1 masks that .*ballast.json names are absent from .*/ballast: unpack or download")
        assert message.splitlines()[1:] == [f"  {mask}"]

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_mask_without_an_image(self, tmp_path, ballast, packed):
        ballast.files["NG/AK/S0007/ballast_0007_AK_C1_1.png"] = b"mask"
        (ballast.write_zip if packed else ballast.write_folder)(tmp_path)
        ballast.write_json(tmp_path)
        refused(tmp_path, "^1 masks in .* have no image: .*\n  NG/AK/S0007/ballast_0007_AK_C1_1.png")

    def test_a_mask_whose_image_is_called_normal(self, root, ballast):
        ballast.json["test"][0] |= {"mask_path": None, "anomaly_class": "OK"}
        damaged = next(item for item in ballast.json["test"] if item["mask_path"])
        mask, damaged["mask_path"] = damaged["mask_path"], None
        ballast.write_json(root)
        refused(root, f"^1 masks in .* belong to images that .* gives no mask: .*\n  {mask}")

    def test_a_normal_image_with_a_mask(self, root, ballast):
        mask = next(item["mask_path"] for item in ballast.json["test"] if item["mask_path"])
        ballast.json["train"][0]["mask_path"] = mask
        ballast.write_json(root)
        refused(
            root, f"^1 images are normal .below OK. but have a mask in .*\n  {ballast.item('train', 0)['image_path']}"
        )

    @pytest.mark.parametrize("keep_damaged", [True, False])
    def test_a_class_without_normal_images(self, root, ballast, keep_damaged):
        items = [item for item in ballast.json["test"] if item["mask_path"] and keep_damaged]
        ballast.json |= {"train": [], "test": items}
        ballast.write_json(root)
        refused(root, "ballast.json names no normal image: expected some without a mask")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_an_image_named_twice(self, root, ballast, split):
        item = ballast.item("train", 0)
        ballast.json[split].append(item | {"mask_path": "NG/x.png"})
        ballast.write_json(root)
        refused(root, f"^1 images are named more than once in .*ballast.json: .*\n  {item['image_path']}")

    @pytest.mark.parametrize("key", ["image_path", "mask_path"])
    @pytest.mark.parametrize(
        "name",
        ["../mint/OK/S0001/x_C1_1.jpg", "OK/../../S0001/x_C1_1.jpg", "/etc/S0001/x_C1_1.jpg", "..\\S1/x_C1_1.jpg"],
    )
    def test_names_that_lead_out_of_the_class(self, root, ballast, key, name):
        ballast.json["train"][0][key] = name
        if "\\" in name:
            ballast.json["train"][0][key] = name = "..\\x/S0001/x_C1_1.jpg"
        ballast.write_json(root)
        refused(root, f"^1 names in .*ballast.json lead out of the folder of the class: .*\n  {re.escape(name)}$")

    @pytest.mark.parametrize("prefix", ["../", "/", "ballast/../../x/"])
    def test_a_prefix_that_leads_elsewhere(self, root, ballast, prefix):
        ballast.json["meta"]["prefix"] = prefix
        ballast.write_json(root)
        refused(root, "lead out of the folder of the class")

    @pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
    def test_a_zip_that_is_not_whole(self, tmp_path, ballast, keep):
        path = ballast.write_zip(tmp_path)
        ballast.write_json(tmp_path)
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
        refused(tmp_path, "realiad_512/ballast.zip cannot be read as a zip .*: is it whole. Download it again")

    def test_jsons_that_are_not_whole(self, root):
        pack_jsons(root, "realiad_jsons")
        (root / "realiad_jsons.zip").write_bytes((root / "realiad_jsons.zip").read_bytes()[:-30])
        refused(root, "realiad_jsons.zip cannot be read as a zip")

    def test_members_that_lead_out_of_the_zip_harm_nobody(self, tmp_path, ballast):
        folder = tmp_path / "below" / "data"
        path = ballast.write_zip(folder)
        ballast.write_json(folder)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("../../outside.txt", b"x")
            archive.writestr("/etc/outside.txt", b"x")
        before = sorted(tmp_path.rglob("*"))
        assert all(contents(load_real_iad(folder)))
        assert sorted(tmp_path.rglob("*")) == before and not Path("/etc/outside.txt").exists()


def write_variety(root: Path, name: str, *, packed: bool = True, wrapped: bool = True) -> None:
    """A class of Real-IAD Variety: PNG images, masks of other names, zips that may lack the class's folder."""
    made = RealIADClass(name)
    files = {}
    for item in made.json["train"] + made.json["test"]:
        for key, suffix in (("image_path", ".png"), ("mask_path", "_mask.png")):
            if (old := item[key]) is not None:
                item[key] = old.rpartition(".")[0] + suffix
                files[item[key]] = made.files[old]
    folder = root / "realiadvariety_512"
    folder.mkdir(parents=True, exist_ok=True)
    if packed:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path, data in files.items():
                archive.writestr(f"{name}/{path}" if wrapped else path, data)
    else:
        for path, data in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_bytes(data)
    made.write_json(root, "Real-IAD_Variety_jsons")


class TestVariety:
    @pytest.mark.parametrize("written", [{"packed": False}, {"wrapped": False}, {}], ids=str)
    @pytest.mark.parametrize("place", ["unpacked", "zip", "zip, unpacked"])
    def test_is_read_as_realiad_is(self, tmp_path, written, place):
        for name in ("audio_jack", "zipper"):
            write_variety(tmp_path, name, **written)
        if place == "zip":
            with zipfile.ZipFile(tmp_path / "realiadvariety_jsons.zip", "w") as archive:
                for path in (tmp_path / "Real-IAD_Variety_jsons").iterdir():
                    archive.write(path, f"Real-IAD_Variety_jsons/{path.name}")
            shutil.rmtree(tmp_path / "Real-IAD_Variety_jsons")
        elif place == "zip, unpacked":
            (tmp_path / "realiadvariety_jsons").mkdir()
            (tmp_path / "Real-IAD_Variety_jsons").rename(tmp_path / "realiadvariety_jsons/Real-IAD_Variety_jsons")
        dataset = load_real_iad(tmp_path)
        expected = load_real_iad(make_real_iad(tmp_path / "plain", "audio_jack", "zipper"))
        assert labels(dataset) == labels(expected)
        assert all(contents(dataset)) and open_real_iad(tmp_path).categories == ["audio_jack", "zipper"]
        assert [bool(mask) for mask in contents(dataset, "mask")] == dataset["is_anomalous"][:]

    @pytest.mark.parametrize("stray", ["of an image without one", "of no image"])
    def test_stray_masks_are_refused_or_left_out_and_counted(self, tmp_path, caplog, stray):
        write_variety(tmp_path, "zipper", packed=False)
        rows, folder = list(load_real_iad(tmp_path)), tmp_path / "realiadvariety_512" / "zipper"
        hidden = next(row["image"]["path"] for row in rows if not row["is_good"] and not row["is_anomalous"])
        mask = Path(hidden.replace(".png", "_mask.png") if stray == "of an image without one" else hidden + "_mask.png")
        shutil.copy(next(row["mask"]["path"] for row in rows if row["mask"]), mask)
        what = "belong to images that .* gives no mask" if stray == "of an image without one" else "have no image"
        refused(tmp_path, f"1 masks in {folder} {what}")
        left = len(rows) - (stray == "of an image without one")
        assert len(load_real_iad(tmp_path, strict=False)) == left
        assert re.search(f"1 masks in {folder} {what}", caplog.text)

    def test_another_data_set_beside_it_is_no_resolution(self, tmp_path):
        write_variety(tmp_path, "zipper")
        (tmp_path / "realiad_d3_raw" / "zipper").mkdir(parents=True)
        assert len(load_real_iad(tmp_path)) == 9
        refused(tmp_path, r"has no resolution 'raw': expected one of \['512'\]", resolution="raw")

    def test_both_in_one_folder_are_refused(self, tmp_path):
        write_variety(make_real_iad(tmp_path, "audiojack"), "zipper")
        refused(tmp_path, "holds both RealIAD and Real-IAD Variety: give each a folder of its own")

    def test_from_the_hub(self, tmp_path, hub, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        write_variety(tmp_path / "data", "zipper")
        write_variety(tmp_path / "data", "nut")
        with zipfile.ZipFile(tmp_path / "data" / "realiadvariety_jsons.zip", "w") as archive:
            for path in (tmp_path / "data" / "Real-IAD_Variety_jsons").iterdir():
                archive.write(path, f"Real-IAD_Variety_jsons/{path.name}")
        shutil.rmtree(tmp_path / "data" / "Real-IAD_Variety_jsons")
        API.create_repo("acme/many-parts", repo_type="dataset")
        API.upload_folder(repo_id="acme/many-parts", repo_type="dataset", folder_path=tmp_path / "data")
        assert open_real_iad("acme/many-parts").categories == ["nut", "zipper"]
        dataset = load_real_iad("acme/many-parts", categories=["nut"])
        assert dataset["category"][:] == ["nut"] * 9 and all(contents(dataset))


class TestNotStrict:
    def test_what_is_absent_or_contradicted_is_left_out_and_counted(self, root, ballast, caplog):
        expected = list(load_real_iad(root))
        folder = root / "realiad_512" / "ballast"
        image, lost = ballast.json["train"][0]["image_path"], ballast.json["test"][-3]
        maskless = next(item["image_path"] for item in ballast.json["test"] if "_AK_C3_" in item["image_path"])
        (folder / image).unlink()
        (folder / lost["mask_path"]).unlink()
        (folder / maskless).with_suffix(".png").touch()
        (folder / "NG/AK/S0001/stray_C1_.png").touch()
        refused(root, "1 images that .* names are absent from .*: unpack or download it again, or go on .* --no-strict")
        rows = list(load_real_iad(root, strict=False))
        gone = {f"{folder}/{name}" for name in (image, lost["image_path"], maskless)}
        assert rows == [row for row in expected if row["image"]["path"] not in gone]
        for what in (
            f"ballast.json names are absent from {folder}: left out, such as {image}",
            f"1 masks that {root}/realiad_jsons/realiad_jsons/ballast.json names are absent",
            f"1 masks in {folder} belong to images that",
            f"1 masks in {folder} have no image: left out, such as NG/AK/S0001/stray_C1_.png",
        ):
            assert what in caplog.text


def make_real_iad(root: Path, *names: str) -> Path:
    """Classes of RealIAD, unpacked."""
    for name in names:
        made = RealIADClass(name)
        made.write_folder(root)
        made.write_json(root)
    return root


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acme/real-iad, gated: three classes at two resolutions."""
    folder = tmp_path_factory.mktemp("real-iad")
    for name in ("audiojack", "mint", "switch"):
        made = RealIADClass(name)
        made.write_json(folder, "realiad_jsons")
        made.write_zip(folder, "256")
        made.write_zip(folder, "512")
    pack_jsons(folder, "realiad_jsons")
    API.create_repo("acme/real-iad", repo_type="dataset")
    API.upload_folder(repo_id="acme/real-iad", repo_type="dataset", folder_path=folder)
    API.update_repo_settings("acme/real-iad", repo_type="dataset", gated="manual")
    return folder


class TestHub:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        return tmp_path / "cache"

    def fetched(self, hub: HubServer) -> set[str]:
        paths = [entry["path"] for entry in hub.log if "/resolve/" in entry["path"]]
        return {re.sub(r".*/resolve/[^/]+/", "", path) for path in paths}

    def test_only_what_is_asked_for_is_downloaded(self, repository, hub):
        dataset = load_real_iad("acme/real-iad", resolution="256", categories=["mint"])
        local = load_real_iad(repository, resolution="256", categories=["mint"])
        assert labels(dataset) == labels(local)
        for column in ("image", "mask"):
            assert contents(dataset, column) == contents(local, column)
        assert self.fetched(hub) == {"realiad_jsons.zip", "realiad_256/mint.zip"}

    def test_all_classes(self, repository, hub):
        dataset = load_real_iad("acme/real-iad")
        assert labels(dataset) == labels(load_real_iad(repository))
        assert self.fetched(hub) == {
            "realiad_jsons.zip", "realiad_512/audiojack.zip", "realiad_512/mint.zip", "realiad_512/switch.zip"
        }  # fmt: skip

    def test_a_second_time_nothing_is_downloaded_nor_are_the_zips_read_through(self, repository, hub, cache):
        expected = list(load_real_iad("acme/real-iad", categories=["mint"]))
        (path,) = cache.rglob("snapshots/*/realiad_512/mint.zip")
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        before = path.stat()
        path.resolve().write_bytes(data)
        os.utime(path.resolve(), ns=(before.st_atime_ns, before.st_mtime_ns))
        hub.log.clear()
        assert list(load_real_iad("acme/real-iad", categories=["mint"])) == expected
        assert not [entry for entry in hub.log if entry["method"] == "GET" and "/_cdn/" in entry["path"]]

    def test_a_zip_that_comes_damaged_is_fetched_again(self, repository, hub):
        load_real_iad("acme/real-iad", categories=["switch"])
        hub.fault("GET /_cdn/", corrupt=True)
        dataset = load_real_iad("acme/real-iad", categories=["mint"])
        assert contents(dataset) == contents(load_real_iad(repository, categories=["mint"]))
        assert not any(rule["times"] for rule in hub.rules)

    @pytest.mark.parametrize("token", ["", "hf_other"])
    def test_without_access_it_is_one_clear_error(self, repository, hub, token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            BundleError, match="^acme/real-iad is gated: ask for access on its page on the Hub, then log"
        ):
            load_real_iad("acme/real-iad")
        assert not [entry for entry in hub.log if "/_cdn/" in entry["path"]]

    def test_an_unknown_resolution_before_any_zip_is_downloaded(self, repository, hub):
        message = r"acme/real-iad has no resolution 'raw': expected one of \['256', '512'\]"
        refused("acme/real-iad", message, resolution="raw")
        assert self.fetched(hub) == {"realiad_jsons.zip"}

    def test_without_a_connection_the_cached_classes_are_taken_with_a_warning(
        self, repository, hub, caplog, monkeypatch
    ):
        expected = list(load_real_iad("acme/real-iad", categories=["mint"]))
        monkeypatch.setenv("ADPRETRAIN_HUB_ATTEMPTS", "1")
        hub.fault("GET /api/datasets/acme/real-iad", times=99, drop_after=0, reset=True)
        hub.log.clear()
        assert list(load_real_iad("acme/real-iad")) == expected
        assert "the Hub cannot be asked what acme/real-iad holds: its cached classes are taken as all" in caplog.text
        assert not self.fetched(hub)

    def test_no_such_repository(self, hub):
        with pytest.raises(MissingPathError, match="no repository acme/none on the Hub .and no such folder here."):
            load_real_iad("acme/none")

    def test_a_repository_of_another_kind(self, hub, tmp_path):
        API.create_repo("acme/other-data", repo_type="dataset")
        refused("acme/other-data", "^acme/other-data at revision 'main' is not RealIAD: it lacks a file")

    def test_a_folder_of_that_name_goes_before(self, root, hub, monkeypatch):
        (root / "acme").mkdir()
        (root / "acme" / "real-iad").symlink_to(root)
        monkeypatch.chdir(root)
        assert len(load_real_iad("acme/real-iad")) == 9
        assert not hub.log


def test_the_index_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("mint", "switch"):
        made = RealIADClass(name)
        made.write_folder(tmp_path)
        made.write_json(tmp_path)
    first, second = load_real_iad(tmp_path), load_real_iad(tmp_path)
    assert list(first) == list(second) and first._fingerprint == second._fingerprint
