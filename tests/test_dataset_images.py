"""Data sets as images: saved to disk or in memory, as bytes or paths, with rows that are broken or empty."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from adpretrain_hf.dataset_images import DatasetImages
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import decode_image, list_images, read_image
from adpretrain_hf.results import FEATURES, SCORES
from adpretrain_hf.shards import ShardedResults
from adpretrain_hf.write_shards import write_shards
from tests.conftest import random_image

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


# The same results as files


@pytest.mark.parametrize("make", [as_bytes, as_paths])
def test_saved_data_set_gives_the_results_of_its_files(
    make, bundle: Path, bank: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(images).save_to_disk(tmp_path / "data")
    options = ("--reference", bank, "--batch-size", 2)
    assert run("score", bundle, images, *options, "--shard-size", 256, "--output", tmp_path / "files") == 1
    capsys.readouterr()
    assert run("score", bundle, tmp_path / "data", *options, "--output", tmp_path / "rows") == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'rows'}: 10 of 11 images\n"
    reason = "row 3 cannot be read as an image: cannot identify image file of 6 bytes"
    assert err.endswith(f"1 image could not be used:\n  {reason}\n")
    by_file, by_row = (ShardedResults(tmp_path / name) for name in ("files", "rows"))
    assert list(by_row) == [Path(name).stem for name in by_file] and "03" not in by_row
    assert by_row.failures == [{"image": "03", "error": reason}]
    for name in by_file:
        torch.testing.assert_close(by_row[Path(name).stem], by_file[name], rtol=0, atol=0)
    texts = [(tmp_path / name / "scores.csv").read_text() for name in ("rows", "files")]
    assert texts[0] == texts[1].replace(".png", "").replace(".jpg", "")
    overlays = [sorted((tmp_path / name / "overlays").iterdir()) for name in ("rows", "files")]
    for by_row_picture, by_file_picture in zip(*overlays, strict=True):
        assert by_row_picture.read_bytes() == by_file_picture.read_bytes()


@pytest.mark.parametrize(("make", "broken"), [(as_bytes, "row 3"), (as_paths, "{}/03.png")])
def test_data_set_in_memory_gives_the_results_of_its_files(
    make, broken: str, ready: ADPretrainFeatureExtractor, images: Path, tmp_path: Path
) -> None:
    write_shards(ready, images, tmp_path / "files", FEATURES, shard_size=3)
    write_shards(ready, make(images), tmp_path / "rows", FEATURES, shard_size=3)
    by_file, by_row = (ShardedResults(tmp_path / name) for name in ("files", "rows"))
    for one, other in zip(by_file.values(), by_row.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    (failure,) = by_row.failures
    assert failure["image"] == "03" and failure["error"].startswith(f"{broken.format(images)} cannot be read")


def test_names_are_zero_padded_row_numbers(images: Path) -> None:
    rows = as_bytes(images)
    assert list(DatasetImages(rows).names.items())[:2] == [("row 0", "00"), ("row 1", "01")]
    assert list(DatasetImages(rows.select(range(10))).names.values()) == [str(number) for number in range(10)]


def test_formats_and_transforms_are_left_aside(images: Path) -> None:
    rows = as_bytes(images)
    expected = read_image(images / "00.jpg", "")
    for changed in (rows.with_format("torch"), rows.with_transform(lambda batch: {"label": batch["label"]})):
        assert DatasetImages(changed).source("row 0") == expected
    chosen = rows.select([4, 0])
    assert DatasetImages(chosen).source("row 1") == expected


def test_images_are_decoded_in_the_threads_that_read_ahead(
    ready: ADPretrainFeatureExtractor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def noting(data: bytes, name: str) -> Image.Image:
        seen.add(threading.current_thread().name.rpartition("_")[0])
        return decode_image(data, name)

    monkeypatch.setattr("adpretrain_hf.dataset_images.decode_image", noting)
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    write_shards(ready, as_bytes(images), tmp_path / "out", SCORES)
    assert seen == {"adpretrain-decode"}


def test_extractor_that_was_given_reads_as_before(
    ready: ADPretrainFeatureExtractor, images: Path, tmp_path: Path
) -> None:
    preprocess = ready.preprocess
    write_shards(ready, as_bytes(images), tmp_path / "out", SCORES)
    assert ready.preprocess is preprocess
    assert ready.score(images / "02.png").scores.shape == (1,)


# Going on


def test_finished_shards_of_a_data_set_are_not_written_again(
    bundle: Path, bank: Path, images: Path, tmp_path: Path
) -> None:
    as_bytes(images).save_to_disk(tmp_path / "data")
    words = ("extract", bundle, tmp_path / "data", "--reference", bank, "--shard-size", 4, "--output", tmp_path / "out")
    assert run(*words) == 1
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    before = [path.stat().st_mtime_ns for path in shards]
    assert run(*words) == 1
    assert [path.stat().st_mtime_ns for path in shards] == before
    shards[1].unlink()
    assert run(*words) == 1
    after = [path.stat().st_mtime_ns for path in shards]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_other_data_set_or_column_is_done_again(
    ready: ADPretrainFeatureExtractor, images: Path, tmp_path: Path
) -> None:
    both = two_columns(images)
    write_shards(ready, both, tmp_path / "out", SCORES, image_column="photo")
    shard = tmp_path / "out" / "shards" / "00000.safetensors"
    before = shard.read_bytes()
    write_shards(ready, both, tmp_path / "out", SCORES, image_column="more")
    assert shard.read_bytes() != before
    before = shard.read_bytes()
    write_shards(ready, both.select(reversed(range(11))), tmp_path / "out", SCORES, image_column="more")
    assert shard.read_bytes() != before


# What is refused


def test_column_has_to_be_named_where_there_are_several(images: Path) -> None:
    rows = two_columns(images)
    with pytest.raises(InputError, match=r"several columns of images, \['photo', 'more'\]: name one"):
        DatasetImages(rows)
    assert DatasetImages(rows, "photo").source("row 2") == read_image(images / "02.png", "")


@pytest.mark.parametrize("column", ["label", "pictures"])
def test_column_that_holds_no_images(column: str, images: Path) -> None:
    with pytest.raises(InputError, match=rf"no column of images called '{column}', only \['photo'\]"):
        DatasetImages(as_bytes(images), column)


def test_no_column_of_images(images: Path) -> None:
    with pytest.raises(InputError, match=r"no column of images: its columns are \['label'\]; cast one to datasets"):
        DatasetImages(as_bytes(images).select_columns(["label"]))


def test_no_rows(images: Path) -> None:
    with pytest.raises(InputError, match="the data set has no rows"):
        DatasetImages(as_bytes(images).select([]))


def test_rows_without_a_usable_image(images: Path, tmp_path: Path) -> None:
    rows = [None, {"bytes": b"", "path": None}, {"bytes": None, "path": "no/such.png"}]
    opened = DatasetImages(Dataset.from_dict({"photo": rows}, features=Features({"photo": datasets.Image()})))
    with pytest.raises(ImageError, match="row 0 of the data set holds no image"):
        opened.source("row 0")
    with pytest.raises(ImageError, match="row 1 cannot be read as an image"):
        opened.source("row 1")
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
    assert len(ShardedResults(tmp_path / "out")) == 10


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
    assert run("extract", bundle, images, "--reference", bank, "--shard-size", 4, "--output", tmp_path / "out") == 1
