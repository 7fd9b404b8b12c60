"""Whatever is called images: pairs with names; data sets, as bytes or paths, with rows that are broken or empty."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import list_images, named_sources, open_images, read_image
from adpretrain_hf.images.sources import dataset_images
from tests.conftest import random_image
from tests.processes import start

PHOTO = Features({"photo": datasets.Image(), "label": Value("int64")})


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Files of kinds that are easily read wrongly: turned by EXIF, 16 bits, grey; one is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0).save(folder / "00.jpg", exif=exif)
    grey = np.random.default_rng(1).integers(0, 65536, (40, 48), dtype=np.uint16)
    Image.fromarray(grey).save(folder / "01.png")
    random_image(2).convert("L").save(folder / "02.png")
    (folder / "03.png").write_bytes(b"broken")
    for number in range(4, 11):
        random_image(number).save(folder / f"{number:02}.png")
    return folder


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(1).save(path)


def test_linked_folders_and_files_are_listed_once(tmp_path: Path) -> None:
    save(tmp_path / "line/cam0/a.png", tmp_path / "store/b.png", tmp_path / "c.png")
    (tmp_path / "line/cam1").symlink_to(tmp_path / "store")
    (tmp_path / "line/again").symlink_to(tmp_path / "line/cam0")
    (tmp_path / "line/cam0/round").symlink_to(tmp_path / "line")
    (tmp_path / "line/d.png").symlink_to(tmp_path / "c.png")
    found = [path.relative_to(tmp_path / "line").as_posix() for path in list_images(tmp_path / "line")]
    assert found == ["cam0/a.png", "cam1/b.png", "d.png"]


def test_what_is_passed_over_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = ["._a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".git/x.png", "Thumbs.db", "notes.txt", "b.heic"]
    save(tmp_path / "a.png")
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]
    assert "passed over hidden images: ._a.png" in caplog.text
    assert "passed over files of other suffixes: b.heic, notes.txt" in caplog.text
    assert "passed over links that lead nowhere: gone.png" in caplog.text
    assert "Thumbs.db" not in caplog.text


def list_without_rights(folder: Path, said: Path) -> None:
    os.setgid(65534)
    os.setuid(65534)
    try:
        list_images(folder)
    except InputError as error:
        said.write_text(str(error))


def test_a_folder_that_cannot_be_read_is_an_error() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give its rights up in another process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "open/a.png", folder / "locked/b.png")
        (folder / "said").touch()
        for path, mode in ((folder, 0o755), (folder / "said", 0o666), (folder / "locked", 0)):
            path.chmod(mode)
        start(list_without_rights, folder, folder / "said").join()
        message = f"{folder / 'locked'} cannot be read (Permission denied): give the right to read it"
        assert (folder / "said").read_text().startswith(message)


def as_bytes(folder: Path) -> Dataset:
    rows = [{"bytes": path.read_bytes(), "path": None} for path in list_images(folder)]
    return Dataset.from_dict({"photo": rows, "label": range(len(rows))}, features=PHOTO)


def as_paths(folder: Path) -> Dataset:
    rows = [{"bytes": None, "path": str(path)} for path in list_images(folder)]
    return Dataset.from_dict({"photo": rows, "label": range(len(rows))}, features=PHOTO)


def two_columns(folder: Path) -> Dataset:
    """The images, and the same ones in the opposite order."""
    rows = as_bytes(folder).cast_column("photo", datasets.Image(decode=False))
    more = {"photo": rows["photo"][:], "more": rows["photo"][::-1]}
    return Dataset.from_dict(more, features=Features({"photo": datasets.Image(), "more": datasets.Image()}))


@pytest.fixture
def ready(extractor: ADPretrainFeatureExtractor) -> ADPretrainFeatureExtractor:
    return extractor.set_reference([random_image(100), random_image(101)])


@pytest.fixture
def bank(ready: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    ready.reference.save(tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


# Pairs


def test_pairs_of_a_name_and_an_image_are_called_by_the_name(ready: ADPretrainFeatureExtractor, images: Path) -> None:
    path = images / "02.png"
    pairs = [("a", path), ("b", path.read_bytes()), ("c", read_image(path, "")), ("d", lambda: path.read_bytes())]
    scored = list(ready.score_stream(pairs, progress=False))
    assert [one.image.name for one in scored] == ["a", "b", "c", "d"]
    assert len({one.score for one in scored}) == 1
    sources, total = named_sources(pairs)
    assert total == 4 and [name for _, name in sources] == ["a", "b", "c", "d"]


def test_bytes_are_one_image(ready: ADPretrainFeatureExtractor, images: Path) -> None:
    path = images / "02.png"
    assert torch.equal(ready.score(path.read_bytes()).scores, ready.score(path).scores)


def test_function_that_cannot_give_its_image_fails_alone(ready: ADPretrainFeatureExtractor, images: Path) -> None:
    def gone() -> bytes:
        raise ImageError("b is gone")

    failed: list[tuple[str, str]] = []
    pairs = [("a", images / "02.png"), ("b", gone), ("c", images / "04.png")]
    stream = ready.score_stream(pairs, progress=False, on_error=lambda name, error: failed.append((name, str(error))))
    assert [one.image.name for one in stream] == ["a", "c"]
    assert failed == [("b", "b is gone")]


# The same results as files


@pytest.mark.parametrize("make", [as_bytes, as_paths])  # saving takes the files' bytes along
@pytest.mark.parametrize("command", ["score", "extract"])
def test_saved_data_set_gives_the_results_of_its_files(
    command: str, make, bundle: Path, bank: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make(images).save_to_disk(tmp_path / "data")
    options = ("--reference", bank, "--batch-size", 2)
    assert run(command, bundle, images, *options, "--output", tmp_path / "files") == 1
    capsys.readouterr()
    assert run(command, bundle, tmp_path / "data", *options, "--output", tmp_path / "rows") == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'rows'}: 10 of 11 images\n"
    assert "1 image could not be used:\n  row 3 cannot be read as an image: " in err
    written = {name: files_below(tmp_path / name) for name in ("files", "rows")}
    del written["files"]["done.jsonl"]  # a data set cannot change, its files can
    renamed = {re.sub(r"\.(png|jpg)(?=\.)", "", name): content for name, content in written["files"].items()}
    assert renamed.keys() == written["rows"].keys()
    for name in renamed.keys() - {"run.json", "scores.csv", "scores.json"}:
        assert renamed[name] == written["rows"][name], name
    if command == "score":
        table = written["files"]["scores.csv"].replace(b".png", b"").replace(b".jpg", b"")
        assert written["rows"]["scores.csv"] == table
        (failure,) = json.loads(written["rows"]["scores.json"])["failures"]
        assert failure["image"] == "03"


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_names_are_zero_padded_row_numbers(images: Path) -> None:
    rows = as_bytes(images)
    assert list(dataset_images(rows).names.items())[:2] == [("row 0", "00"), ("row 1", "01")]
    assert list(dataset_images(rows.select(range(10))).names.values()) == [str(number) for number in range(10)]


def test_formats_and_transforms_are_left_aside(images: Path) -> None:
    rows = as_bytes(images)
    expected = (images / "00.jpg").read_bytes()
    for changed in (rows.with_format("torch"), rows.with_transform(lambda batch: {"label": batch["label"]})):
        assert dataset_images(changed).source("row 0") == expected
    chosen = rows.select([4, 0])
    assert dataset_images(chosen).source("row 1") == expected


def test_rows_are_read_in_the_threads_that_read_ahead(
    ready: ADPretrainFeatureExtractor, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    rows = dataset_images(as_bytes(images))

    def noting(image: str) -> object:
        seen.add(threading.current_thread().name.rpartition("_")[0])
        return rows.source(image)

    monkeypatch.setattr(datasets.Image, "decode_example", None)
    pairs = [(image, partial(noting, image)) for image in rows.names if image != "row 3"]
    assert len(list(ready.score_stream(pairs, progress=False))) == 10
    assert seen == {"adpretrain-decode"}


# Going on


def test_rows_that_are_done_are_not_done_again(bundle: Path, bank: Path, images: Path, tmp_path: Path) -> None:
    as_bytes(images).save_to_disk(tmp_path / "data")
    words = ("extract", bundle, tmp_path / "data", "--reference", bank, "--output", tmp_path / "out")
    assert run(*words) == 1
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in written]
    written[1].unlink()
    assert run(*words) == 1
    after = [path.stat().st_mtime_ns for path in written]
    assert [one == other for one, other in zip(before, after, strict=True)] == [number != 1 for number in range(10)]


def test_other_data_set_or_column_is_refused(
    bundle: Path, bank: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = two_columns(images)
    both.save_to_disk(tmp_path / "data")
    both.select(reversed(range(11))).save_to_disk(tmp_path / "turned")
    words = ("score", bundle, "--reference", bank, "--no-overlays", "--output", tmp_path / "out", "--image-column")
    assert run(*words, "photo", tmp_path / "data") == 1
    capsys.readouterr()
    for other in (("more", tmp_path / "data"), ("photo", tmp_path / "turned")):
        assert run(*words, *other) == 1
        assert f"{tmp_path / 'out'} holds results of other settings" in capsys.readouterr().err


# What is refused


def test_a_data_set_is_no_folder_of_images(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_columns(images).save_to_disk(tmp_path / "data")
    assert run("reference", bundle, tmp_path / "data", "--output", tmp_path / "bank.safetensors") == 1
    assert "data is a saved data set: expected a folder of images, or image files" in capsys.readouterr().err


def test_column_has_to_be_named_where_there_are_several(images: Path) -> None:
    rows = two_columns(images)
    with pytest.raises(InputError, match=r"several columns of images, \['photo', 'more'\]: name one"):
        dataset_images(rows)
    assert dataset_images(rows, "photo").source("row 2") == (images / "02.png").read_bytes()


@pytest.mark.parametrize("column", ["label", "pictures"])
def test_column_that_holds_no_images(column: str, images: Path) -> None:
    with pytest.raises(InputError, match=rf"no column of images called '{column}', only \['photo'\]"):
        dataset_images(as_bytes(images), column)


def test_no_column_of_images(images: Path) -> None:
    with pytest.raises(InputError, match=r"no column of images: its columns are \['label'\]; cast one to datasets"):
        dataset_images(as_bytes(images).select_columns(["label"]))


def test_no_rows(images: Path) -> None:
    with pytest.raises(InputError, match="the data set has no rows"):
        dataset_images(as_bytes(images).select([]))


def test_rows_without_a_usable_image(images: Path, tmp_path: Path) -> None:
    rows = [None, {"bytes": b"", "path": None}, {"bytes": None, "path": "no/such.png"}]
    opened = dataset_images(Dataset.from_dict({"photo": rows}, features=Features({"photo": datasets.Image()})))
    with pytest.raises(ImageError, match="row 0 of the data set holds no image"):
        opened.source("row 0")
    with pytest.raises(ImageError, match="row 1 cannot be read as an image"):
        read_image(opened.source("row 1"), "row 1")
    with pytest.raises(ImageError, match=r"no such image: no/such\.png"):
        read_image(opened.source("row 2"), "row 2")


def test_several_data_sets_in_one_folder(
    bundle: Path, bank: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = as_bytes(images)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    words = ("score", bundle, "--reference", bank, "--no-overlays", "--output", tmp_path / "out")
    assert run(*words, tmp_path / "data") == 1
    assert "data holds several data sets: give one of them, data/{test,train}" in capsys.readouterr().err
    assert run(*words, tmp_path / "data" / "test") == 1
    assert len(list((tmp_path / "out" / "maps").iterdir())) == 10


def test_folder_of_images_with_a_file_of_that_name_is_no_data_set(images: Path, tmp_path: Path) -> None:
    (images / "state.json").write_text("{}")
    assert len(open_images(images, tmp_path / "out").names) == 11


def test_damaged_data_set_is_named(
    bundle: Path, bank: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_bytes(images).save_to_disk(tmp_path / "data")
    words = ("score", bundle, tmp_path / "data", "--reference", bank, "--output", tmp_path / "out")
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:100])
    assert run(*words) == 1
    assert f"{tmp_path / 'data'} is not a readable data set: " in capsys.readouterr().err
    arrow.write_bytes(whole)
    (tmp_path / "data" / "state.json").write_text("{")
    assert run(*words) == 1
    assert f"{tmp_path / 'data'} is not a readable data set: " in capsys.readouterr().err


def test_missing_datasets_says_what_to_install(
    bundle: Path, bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    as_bytes(images).save_to_disk(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ("score", bundle, tmp_path / "data", "--reference", bank, "--output", tmp_path / "out")
    assert run(*words) == 1
    assert "data is a data set, and datasets is not installed: pip install 'datasets" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("extract", bundle, images, "--reference", bank, "--output", tmp_path / "out") == 1
