"""Runs over a folder: names, going on after a stop, other settings, and results beside the images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adpretrain_hf.cli import main
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.files import write_text
from adpretrain_hf.folder_run import FolderRun
from adpretrain_hf.images import list_images
from tests.conftest import random_image

SETTINGS = {"variant": "angle", "fingerprint": "0123"}


def start(images: list[Path] | Path, output: Path, **overrides: object) -> FolderRun:
    options = {"settings": SETTINGS, "suffix": ".npz", "subfolder": "maps"} | overrides
    return FolderRun(images if isinstance(images, list) else [images], output, **options)


def finish(run: FolderRun, image: Path) -> None:
    write_text(run.result_path(str(image)), "result")
    run.note_done(str(image))


def names(run: FolderRun) -> list[str]:
    return list(run.names.values())


# Names


def test_names_are_relative_to_the_folder(image_folder: Path, tmp_path: Path) -> None:
    run = start(image_folder, tmp_path / "out")
    assert names(run) == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
    assert list(run.names) == [str(path) for path in list_images(image_folder)]
    assert run.pending() == list_images(image_folder)


def test_results_mirror_the_folder(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    image = str(image_folder / "sub" / "3.jpg")
    assert start(image_folder, output).result_path(image) == output / "maps" / "sub" / "3.jpg.npz"
    run = FolderRun([image_folder], output, SETTINGS, ".npz")
    assert run.result_path(image) == output / "sub" / "3.jpg.npz"


def test_images_that_differ_only_in_their_ending_have_results_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "a.png.png"):
        random_image(0).save(folder / name)
    run = start(folder, tmp_path / "out")
    assert len({run.result_path(image) for image in run.names}) == 3


def test_files_are_called_by_their_name(image_folder: Path, tmp_path: Path) -> None:
    paths = [image_folder / "2.png", image_folder / "sub" / "3.jpg"]
    run = start(paths, tmp_path / "out")
    assert run.names == {str(paths[0]): "2.png", str(paths[1]): "3.jpg"}
    assert run.pending() == paths


def test_two_files_of_one_name_are_refused(image_folder: Path, tmp_path: Path) -> None:
    random_image(0).save(image_folder / "sub" / "0.png")
    with pytest.raises(InputError, match="several images have the same file name.*: give their common folder"):
        start([image_folder / "0.png", image_folder / "sub" / "0.png"], tmp_path / "out")
    assert names(start(image_folder, tmp_path / "out")).count("sub/0.png") == 1


def test_one_file_given_twice_is_one_image(image_folder: Path, tmp_path: Path) -> None:
    run = start([image_folder / "0.png"] * 2, tmp_path / "out")
    assert names(run) == ["0.png"]


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty"):
        start(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="no images"):
        start([], tmp_path / "out")


# Going on


def test_done_images_are_not_pending(image_folder: Path, tmp_path: Path) -> None:
    images = list_images(image_folder)
    run = start(image_folder, tmp_path / "out")
    for image in images[1:4]:
        finish(run, image)
    assert run.pending() == [images[0], images[4]]
    again = start(image_folder, tmp_path / "out")
    assert again.pending() == [images[0], images[4]]
    assert names(again) == names(run)


def test_a_newer_image_is_pending_again(image_folder: Path, tmp_path: Path) -> None:
    images = list_images(image_folder)
    run = start(image_folder, tmp_path / "out")
    for image in images:
        finish(run, image)
    assert run.pending() == []
    done_at = images[2].stat().st_mtime
    os.utime(images[2], (done_at + 5, done_at + 5))
    assert run.pending() == [images[2]]
    os.utime(images[2], (done_at - 5, done_at - 5))  # an older one that took its place
    assert run.pending() == [images[2]]
    os.utime(images[2], (done_at, done_at))
    assert run.pending() == []


def test_a_new_image_is_pending(image_folder: Path, tmp_path: Path) -> None:
    run = start(image_folder, tmp_path / "out")
    for image in list_images(image_folder):
        finish(run, image)
    random_image(9).save(image_folder / "9.png")
    assert start(image_folder, tmp_path / "out").pending() == [image_folder / "9.png"]


def test_a_half_written_result_does_not_count(image_folder: Path, tmp_path: Path) -> None:
    run = start(image_folder, tmp_path / "out")
    result = run.result_path(str(image_folder / "0.png"))
    result.parent.mkdir(parents=True)
    result.with_name(f".1234.{result.name}").write_text("half")
    result.mkdir()
    assert image_folder / "0.png" in run.pending()


def test_failures_are_noted_by_name(image_folder: Path, tmp_path: Path) -> None:
    run = start(image_folder, tmp_path / "out")
    error = ImageError("broken")
    run.note_failure(str(image_folder / "sub" / "4.jpg"), error)
    assert run.failures == [("sub/4.jpg", error)]
    assert start(image_folder, tmp_path / "out").failures == []


# Settings


def test_settings_are_kept_as_json(image_folder: Path, tmp_path: Path) -> None:
    start(image_folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == SETTINGS


def test_the_order_of_the_settings_does_not_matter(image_folder: Path, tmp_path: Path) -> None:
    start(image_folder, tmp_path / "out")
    start(image_folder, tmp_path / "out", settings=dict(reversed(SETTINGS.items())))


@pytest.mark.parametrize("other", [{"variant": "norm"}, {"more": 1}, {"fingerprint": None}])
def test_other_settings_are_refused(image_folder: Path, tmp_path: Path, other: dict[str, object]) -> None:
    start(image_folder, tmp_path / "out")
    before = (tmp_path / "out" / "run.json").read_bytes()
    with pytest.raises(InputError, match=rf"{tmp_path / 'out'} holds results of other settings \(see .*run\.json\)"):
        start(image_folder, tmp_path / "out", settings=SETTINGS | other)
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    start(image_folder, tmp_path / "elsewhere", settings=SETTINGS | other)


# Where the output lies


@pytest.mark.parametrize("relative", [False, True])
def test_results_inside_the_image_folder_are_no_images(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(image_folder)
    output = Path("out") if relative else image_folder / "out"
    (output / "overlays").mkdir(parents=True)
    random_image(0).save(output / "overlays" / "0.png.png")
    assert names(start(image_folder, output)) == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]


def test_a_folder_with_nothing_but_results(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "photos" / "out"
    output.mkdir(parents=True)
    random_image(0).save(output / "0.png")
    with pytest.raises(InputError, match=r"no images in .*photos besides the results in .*out"):
        start(tmp_path / "photos", output)


def test_the_output_may_hold_the_image_folder(image_folder: Path) -> None:
    """As in ``adpretrain score images --output .``."""
    run = start(image_folder, image_folder.parent)
    assert names(run) == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]


# The whole program


def test_a_finished_run_may_be_started_again(bundle: Path, image_folder: Path, tmp_path: Path) -> None:
    arguments = ["score", bundle, image_folder, "--reference", image_folder, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    scores = (tmp_path / "out" / "scores.csv").read_text()
    (tmp_path / "out" / "scores.csv").unlink()  # as if stopped after the last map
    assert main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "out" / "scores.csv").read_text() == scores


def test_a_broken_image_does_not_keep_its_old_score(bundle: Path, image_folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.png"
    random_image(7).save(reference)
    arguments = ["score", bundle, image_folder, "--reference", reference, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    done_at = (tmp_path / "out" / "maps" / "0.png.npz").stat().st_mtime
    (image_folder / "0.png").write_bytes(b"broken")
    os.utime(image_folder / "0.png", (done_at + 5, done_at + 5))
    assert main([str(argument) for argument in arguments]) == 1
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [failure["image"] for failure in report["failures"]] == ["0.png"]
    assert [score["image"] for score in report["scores"]] == ["1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
