"""The demo on a small tree in MVTecAD's layout: scores, labels, overlays and the contact sheet."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from tests.conftest import random_image

TEST_IMAGES = {
    "nut": ["bent/0.png", "good/0.png"],
    "Schraube № 1": ["good/0.png", "good/1.jpg", "kaputt ü/a b.png", "scratch/0.png", "scratch/1.bmp"],
}


def run_demo(*arguments: object) -> int:
    return main(["demo", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a demo that must fail, and returns its last line, the only one that says why."""
    assert run_demo(*arguments) == 1
    *before, message = capsys.readouterr().err.splitlines()
    assert message.startswith("adpretrain: error: ") and "Traceback" not in " ".join(before)
    return message


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two categories, with seven test images of different sizes and the masks of the defects."""
    folder = tmp_path / "photos"
    number = 0
    for category, names in TEST_IMAGES.items():
        for normal in range(2):
            save(random_image(100 + normal), folder / category / "train" / "good" / f"{normal}.png")
        for name in names:
            number += 1
            save(random_image(number, 140 + number, 150), folder / category / "test" / name)
            save(Image.new("L", (140 + number, 150)), folder / category / "ground_truth" / f"{name}_mask.png")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "demo"


def test_scores_are_the_extractors_own_with_labels(
    bundle: Path, extractor: ADPretrainFeatureExtractor, photos: Path, output: Path
) -> None:
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    rows = rows_of(output)
    assert list(rows[0]) == ["category", "image", "label", "score"]
    assert sorted((row["category"], row["image"]) for row in rows) == sorted(
        (category, name) for category, names in TEST_IMAGES.items() for name in names
    )
    assert all(row["label"] == row["image"].split("/")[0] for row in rows)
    for category in TEST_IMAGES:
        own = [row for row in rows if row["category"] == category]
        extractor.set_reference(photos / category / "train" / "good")
        expected = extractor.score([photos / category / "test" / row["image"] for row in own]).scores.tolist()
        assert [float(row["score"]) for row in own] == pytest.approx(expected, abs=1e-6)


def test_label_is_the_folder_below_test(bundle: Path, photos: Path, output: Path) -> None:
    save(random_image(60), photos / "nut" / "test" / "good" / "rgb" / "0.png")  # as in MVTec3D-AD
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    assert {row["label"] for row in rows_of(output) if row["image"] == "good/rgb/0.png"} == {"good"}


def test_every_test_image_has_an_overlay_of_its_own_size(bundle: Path, photos: Path, output: Path) -> None:
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    overlays = sorted((output / "overlays").rglob("*.png"))
    assert len(overlays) == 7
    sizes = []
    for path in overlays:
        with Image.open(path) as overlay:
            sizes.append(overlay.size)
    assert sorted(sizes) == [(140 + number, 150) for number in range(1, 8)]


def test_images_that_differ_in_their_ending_have_an_overlay_each(bundle: Path, photos: Path, output: Path) -> None:
    save(random_image(60), photos / "nut" / "test" / "bent" / "0.jpg")
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    assert len(rows_of(output)) == len(list((output / "overlays").rglob("*.png"))) == 8


def test_contact_sheet_shows_every_image(bundle: Path, photos: Path, output: Path) -> None:
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    with Image.open(output / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    ink = (pixels < 250).astype(int)
    # Seven entries, three in a row: all three columns have ink in the upper rows, only the first one in the last.
    thirds = list(np.array_split(ink, 3, axis=1))
    upper, last = [part[: len(ink) // 3] for part in thirds], [part[-len(ink) // 3 :] for part in thirds]
    assert all(part.mean() > 0.3 for part in upper)
    assert last[0].mean() > 0.3 and last[2].max() == 0


def test_summary_agrees_with_the_scores(
    bundle: Path, photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run_demo("--bundle", bundle, "--photos", photos, "--output", output) == 0
    *summaries, last = capsys.readouterr().out.splitlines()
    assert len(summaries) == 2 and last.startswith("7 images: ") and str(output / "contact_sheet.png") in last
    for category, summary in zip(sorted(TEST_IMAGES), sorted(summaries), strict=True):
        own = [row for row in rows_of(output) if row["category"] == category]
        normal = max(float(row["score"]) for row in own if row["label"] == "good")
        defective = [float(row["score"]) for row in own if row["label"] != "good"]
        assert summary.startswith(f"{category}: ") and f"{normal:.3f}" in summary and f"{max(defective):.3f}" in summary
        assert f"{sum(score > normal for score in defective)} of {len(defective)} defective" in summary


@pytest.mark.parametrize("kept", ["good", "bent"])
def test_category_with_one_kind_of_images(kept: str, bundle: Path, tmp_path: Path, output: Path) -> None:
    save(random_image(1), tmp_path / "one" / "nut" / "train" / "good" / "0.png")
    save(random_image(2), tmp_path / "one" / "nut" / "test" / kept / "0.png")
    assert run_demo("--bundle", bundle, "--photos", tmp_path / "one", "--output", output) == 0
    assert [(row["category"], row["label"]) for row in rows_of(output)] == [("nut", kept)]
    assert (output / "contact_sheet.png").is_file()


def test_second_run_replaces_the_first(bundle: Path, photos: Path, output: Path) -> None:
    arguments = ("--bundle", bundle, "--photos", photos, "--output", output)
    assert run_demo(*arguments) == 0
    before = rows_of(output)
    (photos / "nut" / "test" / "bent" / "0.png").unlink()
    assert run_demo(*arguments) == 0
    kept = [row for row in before if row["label"] != "bent"]
    after = rows_of(output)
    assert [row["image"] for row in kept] == [row["image"] for row in after]
    # Another batch, and so another order of summing.
    assert [float(row["score"]) for row in kept] == pytest.approx([float(row["score"]) for row in after], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--photos no_photos", "no_photos"),
        ("--photos empty", "<category>/train/good below empty"),
        ("", "tests/photos"),
        ("--photos photos --bundle a/b/c", "a/b/c"),
        ("--photos photos --bundle empty", "empty is not an ADPretrain bundle"),
        ("--photos photos --output file.txt/demo", "file.txt"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: str, named: str, bundle: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").touch()
    assert named in refused(capsys, "--bundle", "bundle", *arguments.split())


@pytest.mark.parametrize("emptied", ["nut/train/good", "nut/test"])
def test_category_without_images_is_named(
    emptied: str, bundle: Path, photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list((photos / emptied).rglob("*.png")):
        path.unlink()
    message = refused(capsys, "--bundle", bundle, "--photos", photos, "--output", output)
    assert str(photos / emptied) in message


def test_damaged_normal_photograph_is_named(
    bundle: Path, photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "nut" / "train" / "good" / "1.png").write_bytes(b"")
    message = refused(capsys, "--bundle", bundle, "--photos", photos, "--output", output)
    assert str(photos / "nut" / "train" / "good" / "1.png") in message


def test_damaged_test_photographs_cost_no_others(
    bundle: Path, photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--bundle", bundle, "--photos", photos, "--output", output)
    bent, *rest = sorted((photos / "nut" / "test").rglob("*.png"))
    bent.write_bytes(b"")
    assert run_demo(*arguments) == 1
    assert f"1 images could not be used:\n  {bent} cannot be read" in capsys.readouterr().err
    assert len(rows_of(output)) == 6
    for path in rest:
        path.write_bytes(b"")
    assert run_demo(*arguments) == 1
    assert {row["category"] for row in rows_of(output)} == {*TEST_IMAGES} - {"nut"}
