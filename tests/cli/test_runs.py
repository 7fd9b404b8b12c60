"""Long runs over folders: names, bad images among good ones, stopping and going on, other settings, progress.

First what one run keeps account of, then the commands ``extract`` and ``score`` as a whole.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.cli import main
from adpretrain_hf.cli.folder_run import FolderRun
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.files import write_text
from adpretrain_hf.images import AUGMENTATIONS, list_images, open_images
from tests.conftest import ROOT, make_extractor, random_image

SETTINGS = {"variant": "angle", "fingerprint": "0123"}


def start(images: list[Path] | Path, output: Path, **overrides: object) -> FolderRun:
    options = {"settings": SETTINGS, "files": {"maps": ".npz", "overlays": ".png"}} | overrides
    return FolderRun(open_images(images, output), output, **options)


def finish(one: FolderRun, image: Path | str) -> None:
    write_text(one.result_path(str(image)), "result")
    one.note_done(str(image))


def names(one: FolderRun) -> list[str]:
    return list(one.images.names.values())


# Names


def test_names_are_relative_to_the_folder(image_folder: Path, tmp_path: Path) -> None:
    one = start(image_folder, tmp_path / "out")
    assert names(one) == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
    assert list(one.images.names) == [str(path) for path in list_images(image_folder)]
    assert one.pending() == [str(path) for path in list_images(image_folder)]


def test_results_mirror_the_folder(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    image = str(image_folder / "sub" / "3.jpg")
    assert start(image_folder, output).result_path(image) == output / "maps" / "sub" / "3.jpg.npz"
    one = FolderRun(open_images(image_folder, output), output, SETTINGS, {".": ".npz"})
    assert one.result_path(image) == output / "sub" / "3.jpg.npz"


def test_images_that_differ_only_in_their_ending_have_results_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "a.png.png"):
        random_image(0).save(folder / name)
    one = start(folder, tmp_path / "out")
    assert len({one.result_path(image) for image in one.images.names}) == 3


def test_files_are_called_by_their_name(image_folder: Path, tmp_path: Path) -> None:
    paths = [image_folder / "2.png", image_folder / "sub" / "3.jpg"]
    one = start(paths, tmp_path / "out")
    assert one.images.names == {str(paths[0]): "2.png", str(paths[1]): "3.jpg"}
    assert one.pending() == [str(path) for path in paths]


def test_two_files_of_one_name_are_refused(image_folder: Path, tmp_path: Path) -> None:
    random_image(0).save(image_folder / "sub" / "0.png")
    with pytest.raises(InputError, match="several images have the same file name.*: give their common folder"):
        start([image_folder / "0.png", image_folder / "sub" / "0.png"], tmp_path / "out")
    assert names(start(image_folder, tmp_path / "out")).count("sub/0.png") == 1


def test_several_folders_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sub is one of several paths, and a folder: give one common folder"):
        start([image_folder / "0.png", image_folder / "sub"], tmp_path / "out")


def test_one_file_given_twice_is_one_image(image_folder: Path, tmp_path: Path) -> None:
    one = start([image_folder / "0.png"] * 2, tmp_path / "out")
    assert names(one) == ["0.png"]


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty"):
        start(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="no images"):
        start([], tmp_path / "out")


# Going on


def test_done_images_are_not_pending(image_folder: Path, tmp_path: Path) -> None:
    images = [str(path) for path in list_images(image_folder)]
    one = start(image_folder, tmp_path / "out")
    for image in images[1:4]:
        finish(one, image)
    assert one.pending() == [images[0], images[4]]
    again = start(image_folder, tmp_path / "out")
    assert again.pending() == [images[0], images[4]]
    assert names(again) == names(one)


def test_a_newer_image_is_pending_again(image_folder: Path, tmp_path: Path) -> None:
    images = [str(path) for path in list_images(image_folder)]
    one = start(image_folder, tmp_path / "out")
    for image in images:
        finish(one, image)
    assert start(image_folder, tmp_path / "out").pending() == []
    done_at = Path(images[2]).stat().st_mtime
    os.utime(images[2], (done_at + 5, done_at + 5))
    assert start(image_folder, tmp_path / "out").pending() == [images[2]]
    os.utime(images[2], (done_at - 5, done_at - 5))  # an older one that took its place
    assert start(image_folder, tmp_path / "out").pending() == [images[2]]
    os.utime(images[2], (done_at, done_at))
    assert start(image_folder, tmp_path / "out").pending() == []


def test_a_new_image_is_pending(image_folder: Path, tmp_path: Path) -> None:
    one = start(image_folder, tmp_path / "out")
    for image in list_images(image_folder):
        finish(one, image)
    random_image(9).save(image_folder / "9.png")
    assert start(image_folder, tmp_path / "out").pending() == [str(image_folder / "9.png")]


def test_a_half_written_result_does_not_count(image_folder: Path, tmp_path: Path) -> None:
    one = start(image_folder, tmp_path / "out")
    result = one.result_path(str(image_folder / "0.png"))
    result.parent.mkdir(parents=True)
    result.with_name(f".1234.{result.name}").write_text("half")
    result.mkdir()
    assert str(image_folder / "0.png") in one.pending()


def test_temporary_files_of_a_killed_run_are_removed_when_they_are_old(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    old = [output / name for name in (".0123abcd.csv", "maps/.89f47e21.npz", "overlays/sub/.89f47e21.png")]
    kept = [output / name for name in ("maps/.89f47e22.npz", ".gitignore", "maps/.hidden.npz", "sub/.89f47e21.png")]
    for path in (*old, *kept):
        write_text(path, "half")
        os.utime(path, (0, time.time() - (3000 if path == kept[0] else 4000)))
    start(image_folder, output)
    assert [path.exists() for path in (*old, *kept)] == [False] * 3 + [True] * 4


def test_failures_are_noted_by_name(image_folder: Path, tmp_path: Path) -> None:
    one = start(image_folder, tmp_path / "out")
    error = ImageError("broken")
    one.note_failure(str(image_folder / "sub" / "4.jpg"), error)
    assert one.errors == {"sub/4.jpg": "broken"}
    assert start(image_folder, tmp_path / "out").errors == {}


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
    one = start(image_folder, image_folder.parent)
    assert names(one) == ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]


# The commands

SUFFIX = {"extract": ".safetensors", "score": ".npz"}
both_commands = pytest.mark.parametrize("command", SUFFIX)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def results(output: Path, command: str) -> dict[str, Path]:
    """The results that a run has left, by the names of their images."""
    folder = output / "maps" if command == "score" else output
    suffix = SUFFIX[command]
    found = (path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
    return {path.relative_to(folder).as_posix().removesuffix(suffix): path for path in sorted(found)}


def times(output: Path, command: str) -> dict[str, int]:
    return {name: path.stat().st_mtime_ns for name, path in results(output, command).items()}


def scored(output: Path) -> dict[str, float]:
    with (output / "scores.csv").open(encoding="utf-8", newline="") as file:
        return {row["image"]: float(row["score"]) for row in csv.DictReader(file)}


def failures(output: Path) -> dict[str, str]:
    report = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    return {failure["image"]: failure["error"] for failure in report["failures"]}


def make_newer(image: Path, than: Path) -> None:
    """As if the image had been changed some time after the result was written."""
    moment = than.stat().st_mtime_ns + 10**9
    os.utime(image, ns=(moment, moment))


def spoil(folder: Path) -> list[str]:
    """Puts four images that cannot be used among the good ones, and returns their names."""
    jpeg = (folder / "sub" / "3.jpg").read_bytes()
    (folder / "1_truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "2_empty.png").touch()
    (folder / "sub" / "text.png").write_text("not an image", encoding="utf-8")
    random_image(7, 5, 5).save(folder / "too_small.png")
    return ["1_truncated.jpg", "2_empty.png", "sub/text.png", "too_small.png"]


GOOD = ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Images that cannot be used


@both_commands
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_run_goes_on_past_images_that_cannot_be_used(
    command: str, batch_size: int, bundle: Path, bank: Path, image_folder: Path, output: Path,
    extractor: ADPretrainFeatureExtractor, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = spoil(image_folder)
    options = ("--reference", bank, "--output", output, "--batch-size", batch_size)
    capsys.readouterr()
    assert run(command, bundle, image_folder, *options) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}: 5 of 9 images\n"
    head, *listed = err.splitlines()[-5:]
    assert "4 images" in head and "Traceback" not in err
    assert all(str(image_folder / name) in line for name, line in zip(bad, listed, strict=True))
    assert list(results(output, command)) == GOOD
    extractor.set_reference(bank)
    if command == "score":
        expected = extractor.score([image_folder / name for name in GOOD]).scores.tolist()
        assert scored(output) == pytest.approx(dict(zip(GOOD, expected, strict=True)), abs=1e-6)
        assert list(failures(output)) == bad
        assert all(str(image_folder / name) in error for name, error in failures(output).items())
    else:
        features = extractor(image_folder / "sub" / "4.jpg")
        saved = load_file(results(output, command)["sub/4.jpg"])
        torch.testing.assert_close(saved, {name: level[0] for name, level in features.items()}, rtol=0, atol=1e-6)


@both_commands
def test_max_pixels_says_how_large_images_may_be(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    random_image(7, 80, 80).save(image_folder / "large.png")
    arguments = (command, bundle, image_folder, "--reference", bank, "--output", output)
    assert run(*arguments, "--max-pixels", 3199) == 1  # 6400 are more than twice as many
    assert list(results(output, command)) == GOOD
    assert "large.png is refused, for it would need too much memory" in capsys.readouterr().err
    assert run(*arguments, "--max-pixels", 3200) == 0
    assert list(results(output, command)) == sorted([*GOOD, "large.png"])


def test_max_pixels_holds_for_references(
    bundle: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    arguments = ("reference", bundle, image_folder, "--output", tmp_path / "bank.safetensors")
    assert run(*arguments, "--max-pixels", 10) == 1
    assert "is refused, for it would need too much memory" in capsys.readouterr().err
    assert run(*arguments, "--max-pixels", 10**6) == 0


@both_commands
def test_second_call_does_just_the_repaired_images(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = spoil(image_folder)
    arguments = (command, bundle, image_folder, "--reference", bank, "--output", output)
    assert run(*arguments) == 1
    before = times(output, command)
    for number, name in enumerate(bad[:3]):
        random_image(20 + number).save(image_folder / name)
    assert run(*arguments) == 1
    assert {name: time for name, time in times(output, command).items() if name in GOOD} == before
    assert sorted(results(output, command)) == sorted(GOOD + bad[:3])
    (image_folder / "too_small.png").unlink()
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"{output}: 8 of 8 images\n"
    if command == "score":
        assert sorted(scored(output)) == sorted(GOOD + bad[:3]) and failures(output) == {}


@both_commands
def test_no_image_can_be_used(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in GOOD:
        (image_folder / name).write_bytes(b"")
    assert run(command, bundle, image_folder, "--reference", bank, "--output", output) == 1
    err = capsys.readouterr().err
    assert all(str(image_folder / name) in err for name in GOOD)
    assert results(output, command) == {}
    if command == "score":
        assert scored(output) == {} and list(failures(output)) == GOOD


def test_image_spoilt_after_it_was_scored_has_no_score_any_more(
    bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", output)
    assert run(*arguments) == 0
    (image_folder / "1.png").write_bytes(b"")
    make_newer(image_folder / "1.png", results(output, "score")["1.png"])
    capsys.readouterr()
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}: 4 of 5 images\n" and str(image_folder / "1.png") in err.splitlines()[-1]
    assert list(failures(output)) == ["1.png"] and "1.png" not in scored(output)


# Going on


@both_commands
def test_finished_files_are_not_written_again(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--reference", bank, "--output", output)
    assert run(command, bundle, image_folder / "2.png", image_folder / "0.png", *options) == 0
    before = times(output, command)
    assert sorted(before) == ["0.png", "2.png"]
    capsys.readouterr()
    assert run(command, bundle, image_folder, *options, "--batch-size", 2) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: 5 of 5 images\n" and "2 of 5 images are done already" in err
    after = times(output, command)
    assert list(after) == GOOD and {name: after[name] for name in before} == before
    assert run(command, bundle, image_folder, *options) == 0
    assert times(output, command) == after
    if command == "score":
        assert list(scored(output)) == GOOD
        assert len(list((output / "overlays").rglob("*.png"))) == 5


@both_commands
def test_changed_image_is_done_again(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, tmp_path: Path
) -> None:
    assert run(command, bundle, image_folder, "--reference", bank, "--output", output) == 0
    before = {name: path.read_bytes() for name, path in results(output, command).items()}
    random_image(30).save(image_folder / "1.png")
    make_newer(image_folder / "1.png", results(output, command)["1.png"])
    assert run(command, bundle, image_folder, "--reference", bank, "--output", output) == 0
    after = {name: path.read_bytes() for name, path in results(output, command).items()}
    assert [name for name in GOOD if after[name] != before[name]] == ["1.png"]


def test_scores_are_those_of_the_images_that_are_there_now(
    bundle: Path, bank: Path, image_folder: Path, output: Path
) -> None:
    assert run("score", bundle, image_folder, "--reference", bank, "--output", output) == 0
    before = scored(output)
    (image_folder / "0.png").unlink()
    random_image(40).save(image_folder / "new.png")
    assert run("score", bundle, image_folder, "--reference", bank, "--output", output) == 0
    after = scored(output)
    assert list(after) == [*GOOD[1:3], "new.png", *GOOD[3:]]
    assert {name: after[name] for name in GOOD[1:]} == {name: before[name] for name in GOOD[1:]}


def test_results_below_the_images_are_not_taken_for_images(bundle: Path, bank: Path, image_folder: Path) -> None:
    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", image_folder / "out")
    assert run(*arguments) == 0
    assert run(*arguments) == 0
    assert list(scored(image_folder / "out")) == GOOD


def test_damaged_result_is_made_again_or_named(
    bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", output)
    assert run(*arguments) == 0
    before = scored(output)
    damaged = results(output, "score")["1.png"]
    damaged.write_bytes(damaged.read_bytes()[:100])  # as after a power failure
    if run(*arguments) != 0:
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("adpretrain: error: ") and str(damaged) in message
    else:
        assert scored(output) == pytest.approx(before, abs=1e-6)  # alone in its batch, sums come in another order


def test_a_finished_run_may_be_started_again(bundle: Path, image_folder: Path, tmp_path: Path) -> None:
    arguments = ("score", bundle, image_folder, "--reference", image_folder, "--output", tmp_path / "out")
    assert run(*arguments) == 0
    scores = (tmp_path / "out" / "scores.csv").read_text()
    (tmp_path / "out" / "scores.csv").unlink()  # as if stopped after the last map
    assert run(*arguments) == 0
    assert (tmp_path / "out" / "scores.csv").read_text() == scores


def test_a_broken_image_does_not_keep_its_old_score(bundle: Path, image_folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.png"
    random_image(7).save(reference)
    arguments = ("score", bundle, image_folder, "--reference", reference, "--output", tmp_path / "out")
    assert run(*arguments) == 0
    done_at = (tmp_path / "out" / "maps" / "0.png.npz").stat().st_mtime
    (image_folder / "0.png").write_bytes(b"broken")
    os.utime(image_folder / "0.png", (done_at + 5, done_at + 5))
    assert run(*arguments) == 1
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [failure["image"] for failure in report["failures"]] == ["0.png"]
    assert [score["image"] for score in report["scores"]] == ["1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]


OTHER_SETTINGS = {
    "variant": ("extract", ["--variant", "norm"]),
    "precision": ("extract", ["--dtype", "bfloat16"]),
    "format": ("extract", ["--format", "npz"]),
    "command": ("score", []),
    "reference": ("extract", ["--reference", "images/0.png"]),
    "size": ("extract", ["--image-size", "64", "--reference", "images/0.png"]),
}


@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_other_settings_are_refused_in_the_same_output(
    setting: str, bundle: Path, bank: Path, image_folder: Path, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = make_extractor(tiny_folder, seed=2)
    other.variant = "norm"
    other.save_pretrained(bundle)
    monkeypatch.chdir(tmp_path)
    options = ["bundle", "images", "--reference", "bank.safetensors", "--output", "out"]
    assert run("extract", *options) == 0
    before = {path: path.read_bytes() for path in sorted(Path("out").rglob("*")) if path.is_file()}
    capsys.readouterr()
    command, changed = OTHER_SETTINGS[setting]
    assert run(command, *options, *changed) == 1
    err = capsys.readouterr().err
    assert err.startswith("adpretrain: error: out holds results of other settings") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in sorted(Path("out").rglob("*")) if path.is_file()} == before


def test_other_projectors_are_refused_in_the_same_output(
    bundle: Path, bank: Path, image_folder: Path, tiny_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", bundle, image_folder, "--reference", bank, "--output", output) == 0
    make_extractor(tiny_folder, seed=2).save_pretrained(bundle)  # the same configuration, trained on
    capsys.readouterr()
    assert run("score", bundle, image_folder, "--reference", bank, "--output", output) == 1
    assert "other settings" in capsys.readouterr().err


# Runs that are stopped in the middle


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is full: whatever is written beyond some bytes of a file fails."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("options", [["extract"], ["extract", "--format", "npz"], ["score"]], ids=" ".join)
def test_full_disk_leaves_no_half_file_and_the_run_goes_on(
    options: list[str], bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *more = options
    arguments = (command, bundle, image_folder, "--reference", bank, "--output", output, *more)
    capsys.readouterr()
    with files_no_larger_than(600):  # more than run.json, less than any result
        code = run(*arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and message.startswith("adpretrain: error: ") and str(output) in message
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["run.json"]
    assert run(*arguments) == 0


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """60 names of one large image, which takes a while to decode."""
    folder = tmp_path / "many"
    folder.mkdir()
    random_image(0, 900, 900).save(folder / "00.jpg")
    for number in range(1, 60):
        os.link(folder / "00.jpg", folder / f"{number:02}.jpg")
    return folder


# Where a program is started in the background, an interrupt may be switched off.
AS_A_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from adpretrain_hf.cli import main
sys.exit(main())
"""


@contextlib.contextmanager
def started(output: Path, *arguments: object, results_to_wait_for: int) -> Iterator[subprocess.Popen[str]]:
    """Starts an extraction and waits until it has written some results, each of which must be whole at once."""
    command = [sys.executable, "-c", AS_A_PROGRAM, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while len(done := results(output, "extract")) < results_to_wait_for:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                for path in done.values():
                    assert len(load_file(path)) == 4
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


def test_killed_run_leaves_whole_files_and_goes_on(
    bundle: Path, bank: Path, many_images: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("extract", bundle, many_images, "--reference", bank, "--output", output, "--batch-size", 1)
    with started(output, *arguments, results_to_wait_for=10) as process:
        process.kill()
        process.communicate()
    before = times(output, "extract")
    assert 10 <= len(before) < 60
    assert all(len(load_file(path)) == 4 for path in results(output, "extract").values())
    assert run(*arguments) == 0
    after = times(output, "extract")
    assert len(after) == 60 and {name: after[name] for name in before} == before
    assert f"{len(before)} of 60 images are done already" in capsys.readouterr().err
    first, *others = (load_file(path) for path in results(output, "extract").values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are sent otherwise")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_shows_progress_and_says_how_to_go_on(
    bundle: Path, bank: Path, many_images: Path, tmp_path: Path, number: int
) -> None:
    bundle, output = bundle.rename(tmp_path / "mein Bündel"), tmp_path / "Ergebnisse № 1"
    arguments = ("extract", bundle, many_images, "--reference", bank, "--output", output, "--batch-size", 1)
    with started(output, *arguments, results_to_wait_for=3) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    *progress, last = err.splitlines()
    assert last == "adpretrain: stopped; the same command goes on from here" and "Traceback" not in err
    assert all(line.startswith("extract: ") for line in progress if line)
    assert "/60 [" in progress[-1] and "image/s]" in progress[-1]
    assert 3 <= len(results(output, "extract")) < 60
    assert list(output.rglob(".*")) == []  # nothing half-written is left


# Progress and names

ODD_NAMES = [
    "Prüfling № 1.png",
    "a b/日本 語.jpg",
    'comma, "quote".png',
    "[1]*?.png",
    "100%.PNG",
    "two.dots.png.jpeg",
    "-dash.png",
    "'$HOME' & co.png",
]


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Bilder für Ålesund (neu)"
    (folder / "a b").mkdir(parents=True)
    for number, name in enumerate(ODD_NAMES):
        random_image(number).save(folder / name)
    return folder


@both_commands
def test_progress_goes_to_stderr_and_the_result_to_stdout(
    command: str, bundle: Path, bank: Path, image_folder: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert run(command, bundle, image_folder, "--reference", bank, "--output", output, "--batch-size", 2) == 0
    out, err = capfd.readouterr()
    assert out == f"{output}: 5 of 5 images\n"
    bar = err.splitlines()[-1]
    assert bar.startswith(f"{command}: 100%") and "5/5" in bar and bar.endswith("image/s]")


@both_commands
def test_paths_with_spaces_and_any_characters(
    command: str, bundle: Path, bank: Path, odd_folder: Path, tmp_path: Path
) -> None:
    bundle = bundle.rename(tmp_path / "mein Bündel")
    bank = bank.rename(tmp_path / "Bank für Schrauben.safetensors")
    output = tmp_path / "Ergebnisse №1"
    assert run(command, bundle, odd_folder, "--reference", bank, "--output", output) == 0
    assert sorted(results(output, command)) == sorted(ODD_NAMES)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_file_name_that_is_not_utf8(bundle: Path, tmp_path: Path, output: Path) -> None:
    folder, normal = tmp_path / "latin", tmp_path / "normal.png"
    folder.mkdir()
    random_image(0).save(folder / "a.png")
    random_image(1).save(normal)
    (folder / "a.png").rename(Path(os.fsdecode(bytes(folder) + b"/caf\xe9.png")))
    # Nothing is cut off, of which a warning would name the image: pytest cannot send such a name between processes.
    assert run("score", bundle, folder, "--reference", normal, "--output", output, "--resize-mode", "resize") == 0
    assert list((output / "scores.csv").read_bytes().splitlines())[1].startswith(b"caf")


@pytest.mark.parametrize("command", ["extract", "score"])
def test_a_name_that_is_too_long_for_its_results_ending_is_shortened(
    command: str, bundle: Path, bank: Path, image_folder: Path, tmp_path: Path
) -> None:
    long = "\u00e4" * 124 + ".png"  # 252 bytes, of the 255 that a name may have
    random_image(8).save(image_folder / "sub" / long)
    arguments = [command, bundle, image_folder, "--reference", bank, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    results = [path for path in (tmp_path / "out").rglob("*~*") if path.suffix in (".npz", ".safetensors")]
    assert len(results) == 1 and results[0].parent.name == "sub" and len(os.fsencode(results[0].name)) <= 255
    if command == "score":
        assert f"sub/{long}" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")
        assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 6
    before = results[0].stat().st_mtime_ns
    assert main([str(argument) for argument in arguments]) == 0
    assert results[0].stat().st_mtime_ns == before


# The world around a run: references that are damaged, mounts that allow little, images that go


def test_all_references_that_cannot_be_read_are_listed(bundle, image_folder, tmp_path, capsys):
    for name in ("1.png", "sub/3.jpg"):
        (image_folder / name).write_bytes(b"no image")
    assert run("reference", bundle, image_folder, "--output", tmp_path / "bank.safetensors") == 1
    error = capsys.readouterr().err
    assert "2 reference images cannot be used: " in error
    assert "1.png" in error and "3.jpg" in error


def test_a_mount_without_times_and_permissions_takes_the_results(bundle, image_folder, bank, tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert run("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "results") == 0
    before = times(tmp_path / "results", "score")
    assert len(before) == 5
    assert run("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "results") == 0
    assert times(tmp_path / "results", "score") == before


def test_results_on_a_file_system_of_coarse_times_are_not_done_again(bundle, image_folder, bank, tmp_path, capsys):
    words = ("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "results", "--no-overlays")
    assert run(*words) == 0
    for path in [*list_images(image_folder), *results(tmp_path / "results", "score").values()]:
        seconds = path.stat().st_mtime_ns // 2_000_000_000 * 2  # as FAT keeps them
        os.utime(path, (seconds, seconds))
    before = times(tmp_path / "results", "score")
    capsys.readouterr()
    assert run(*words) == 0
    assert "5 of 5 images are done already" in capsys.readouterr().err
    assert times(tmp_path / "results", "score") == before


def test_an_image_of_another_size_is_done_again_whatever_its_time(image_folder: Path, tmp_path: Path) -> None:
    image, state = image_folder / "0.png", (image_folder / "0.png").stat()
    one = start(image_folder, tmp_path / "out")
    for path in list_images(image_folder):
        finish(one, path)
    image.write_bytes(image.read_bytes() + b"0")
    os.utime(image, ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert start(image_folder, tmp_path / "out").pending() == [str(image)]


def test_an_image_of_another_folder_with_its_name_size_and_time_is_another(image_folder: Path, tmp_path: Path) -> None:
    image, copied = image_folder / "0.png", tmp_path / "copied"
    finish(start([image], tmp_path / "out"), image)
    shutil.copytree(image_folder, copied)
    os.utime(copied / "0.png", ns=(image.stat().st_mtime_ns,) * 2)
    assert start([copied / "0.png"], tmp_path / "out").pending() == []  # a copy
    turned = image.read_bytes()[::-1]
    (copied / "0.png").write_bytes(turned)
    os.utime(copied / "0.png", ns=(image.stat().st_mtime_ns,) * 2)
    assert start([copied / "0.png"], tmp_path / "out").pending() == [str(copied / "0.png")]
    image.unlink()  # then it has been moved
    assert start([copied / "0.png"], tmp_path / "out").pending() == []


def test_an_image_that_is_gone_before_it_is_read_costs_itself_alone(image_folder, bundle, bank, tmp_path, monkeypatch):
    listed = list_images(image_folder)
    (image_folder / "1.png").unlink()
    monkeypatch.setattr("adpretrain_hf.images.sources.list_images", lambda folder: listed)
    assert run("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "out") == 1
    assert len(results(tmp_path / "out", "score")) == len(listed) - 1


def test_an_empty_result_and_a_line_that_is_no_entry_are_done_again(image_folder: Path, tmp_path: Path) -> None:
    image = image_folder / "0.png"
    one = start([image], tmp_path / "out")
    finish(one, image)
    (tmp_path / "out" / "done.jsonl").open("a").write('{}\n[]\n3\nnull\n["0.png", "a", null, null]\n')
    assert start([image], tmp_path / "out").pending() == []
    one.result_path(str(image)).write_bytes(b"")  # what is left where a machine went down
    assert start([image], tmp_path / "out").pending() == [str(image)]


def test_half_a_line_of_the_list_costs_one_image(image_folder: Path, tmp_path: Path) -> None:
    images = [str(path) for path in list_images(image_folder)]
    one = start(image_folder, tmp_path / "out")
    for image in images[:3]:
        finish(one, image)
    listed = tmp_path / "out" / "done.jsonl"
    listed.write_text(listed.read_text()[:-20])
    again = start(image_folder, tmp_path / "out")
    assert again.pending() == images[2:]
    for image in images[2:]:
        finish(again, image)
    assert start(image_folder, tmp_path / "out").pending() == []


def test_results_of_images_that_were_removed_go_with_them(bundle, image_folder, bank, tmp_path):
    output, more = tmp_path / "results", tmp_path / "more"
    words = ("score", bundle, "--reference", bank, "--output", output)
    shutil.copytree(image_folder, more)
    (more / "0.png").rename(more / "kept.png")
    assert run(*words, image_folder) == 0
    (image_folder / "sub" / "3.jpg").unlink()
    assert run(*words, more / "kept.png") == 0  # of other images, in the same place
    left = {"0.png", "1.png", "2.png", "sub/4.jpg", "kept.png"}
    assert {*results(output, "score")} == left
    overlays = output / "overlays"
    assert {path.relative_to(overlays).as_posix() for path in overlays.rglob("*.png")} == {f"{n}.png" for n in left}
    away = (image_folder / "sub").rename(tmp_path / "away")
    (image_folder / "sub").mkdir()  # where nothing is mounted just now
    assert run(*words, image_folder) == 0
    assert {*results(output, "score")} == left
    away.rename(image_folder / "sub")
    shutil.rmtree(image_folder)  # a mount that is not there, for all that is known
    assert run(*words, more / "kept.png") == 0
    assert {*results(output, "score")} == left


def test_results_among_the_references_are_no_references(bundle, image_folder, tmp_path):
    output = image_folder / "results"
    given = ("--reference", image_folder, "--calibrate", image_folder)
    words = ("score", bundle, image_folder, *given, "--output", output)
    assert run(*words) == 0
    before = times(output, "score")
    assert run(*words) == 0  # whose overlays are images, too
    assert times(output, "score") == before and len(before) == 5


def test_what_an_earlier_run_left_of_an_image_goes(bundle, image_folder, bank, tmp_path):
    output = tmp_path / "out"
    words = ("score", bundle, image_folder, "--reference", bank, "--output", output)
    assert run(*words) == 0
    write_text(output / "regions.csv", "image\n")
    random_image(7).save(image_folder / "0.png")
    assert run(*words, "--no-overlays") == 0
    assert sorted(path.name for path in (output / "overlays").glob("*.png")) == ["1.png.png", "2.png.png"]
    assert not (output / "regions.csv").exists()


def test_an_image_that_is_gone_costs_the_others_no_overlay(bundle, image_folder, bank, tmp_path, monkeypatch, caplog):
    words = ("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "results")
    assert run(*words, "--no-overlays") == 0
    original = os.utime
    scored = ADPretrainFeatureExtractor.score_stream

    def then_gone(self: object, *args: object, **kwargs: object) -> object:
        yield from scored(self, *args, **kwargs)
        (image_folder / "1.png").unlink()

    original(image_folder / "0.png")  # to be done again
    monkeypatch.setattr(ADPretrainFeatureExtractor, "score_stream", then_gone)
    assert run(*words) == 0
    assert "no overlay is drawn: no such image: " in caplog.text
    assert len(list((tmp_path / "results/overlays").rglob("*.png"))) == 4


def test_the_share_that_is_cut_off_is_told_and_resize_sees_all(bundle, tmp_path, capsys, caplog):
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(2):
        random_image(number, 80, 40).save(folder / f"{number}.png")
    words = ("score", bundle, folder, "--reference", folder / "0.png", "--no-overlays")
    assert run(*words, "--output", tmp_path / "crop") == 0
    assert caplog.text.count("50 % of it are cut off and not looked at") == 1
    caplog.clear()
    assert run(*words, "--output", tmp_path / "all", "--resize-mode", "resize") == 0
    assert "cut off" not in caplog.text


# Several products


@pytest.fixture
def products(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> tuple[Path, Path]:
    """Images of two products in MVTecAD's layout, and a folder of their banks."""
    for seed, name in enumerate(("nut/test/good/0.png", "nut/test/bent/0.png", "screw/test/good/0.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        random_image(seed, 40, 40).save(tmp_path / "images" / name)
    for seed, name in enumerate(("nut", "screw")):
        extractor.make_reference([random_image(50 + seed)]).save(tmp_path / "banks" / f"{name}.safetensors")
    return tmp_path / "images", tmp_path / "banks"


PRODUCTS = {"nut/test/bent/0.png": "nut", "nut/test/good/0.png": "nut", "screw/test/good/0.png": "screw"}


@both_commands
def test_images_of_several_products_are_each_compared_with_their_own(
    command: str, products: tuple[Path, Path], bundle: Path, output: Path, extractor: ADPretrainFeatureExtractor
) -> None:
    images, banks = products
    (images / "nut" / "test" / "broken.png").touch()  # shifts no category
    assert run(command, bundle, images, "--references", banks, "--output", output) == 1
    assert list(results(output, command)) == list(PRODUCTS)
    settings = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert list(settings["references"]) == ["nut", "screw"]
    for name, category in PRODUCTS.items():
        extractor.set_reference(banks / f"{category}.safetensors")
        if command == "score":
            assert scored(output)[name] == pytest.approx(extractor.score([images / name]).scores.item(), abs=1e-6)
        else:
            features = {level: maps[0] for level, maps in extractor(images / name).items()}
            torch.testing.assert_close(load_file(results(output, command)[name]), features, rtol=0, atol=1e-6)
    if command == "score":
        rows = list(csv.DictReader((output / "scores.csv").open(encoding="utf-8", newline="")))
        assert {row["image"]: row["category"] for row in rows} == PRODUCTS
        report = json.loads((output / "scores.json").read_text(encoding="utf-8"))
        assert [one["category"] for one in report["scores"]] == ["nut", "nut", "screw"]
        assert len(list((output / "overlays").rglob("*.png"))) == 3


def test_a_table_tells_the_categories(
    products: tuple[Path, Path], bundle: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, banks = products
    table = output.with_name("products.csv")
    arguments = ("score", bundle, images, "--references", banks, "--output", output, "--no-overlays")
    swapped = {name: "screw" if category == "nut" else "nut" for name, category in PRODUCTS.items()}
    write_text(table, "image,category,line\n" + "".join(f"{name},{one},3\n" for name, one in swapped.items()))
    assert run(*arguments, "--categories", table) == 0
    rows = csv.DictReader((output / "scores.csv").open(encoding="utf-8", newline=""))
    assert {row["image"]: row["category"] for row in rows} == swapped
    before = times(output, "score")
    random_image(9).save(images / "1.png")  # one more, and one of another product
    told = PRODUCTS | {"1.png": "nut"}
    write_text(table, "image,category\n" + "".join(f"{name},{one}\n" for name, one in told.items()))
    same = [name for name in PRODUCTS if PRODUCTS[name] == swapped[name]]
    assert run(*arguments, "--categories", table) == 0
    after = times(output, "score")
    assert {*after} == {*PRODUCTS, "1.png"} and [name for name in before if after[name] == before[name]] == same
    table.write_bytes("image,category\n1.png,Stück\n".encode("latin-1"))
    assert run(*arguments, "--categories", table) == 1
    assert "products.csv is no text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "the category of 1 images is not told, such as {images}/0.png: expected in a folder named nut, screw"),
        ("image,category\n0.png,nut\n", "the category of 3 images is not told, such as {images}/nut/test/bent/0.png: "),
        ("image,category\n0.png\n", "the category of 4 images is not told"),
        ("image,category\n0.png,nut\n0.png,screw\n", "products.csv lists 0.png twice, as 'nut' and as 'screw'"),
        ("image,kind\n", "has the columns ['image', 'kind'], expected image and category"),
        ("screws", "0.png is of the category 'screws', expected one of nut, screw: did you mean 'screw'?"),
        ("none", "no table of categories at "),
    ],
)
def test_categories_that_are_not_told_are_refused_before_anything_is_computed(
    products: tuple[Path, Path], bundle: Path, output: Path, capsys: pytest.CaptureFixture[str], table: str | None,
    message: str,
) -> None:  # fmt: skip
    images, banks = products
    random_image(9).save(images / "0.png")
    given = [] if table is None else ["--categories", output.with_name("products.csv")]
    if table == "screws":
        table = "image,category\n" + "".join(f"{name},{table}\n" for name in (*PRODUCTS, "0.png"))
    if table not in (None, "none"):
        write_text(given[1], table)
    assert run("score", bundle, images, "--references", banks, "--output", output, *given) == 1
    assert message.format(images=images) in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "given",
    [["--tiles", "2x2"], ["--augment-references", "flips"], ["--select", 2], ["--image-score", "top"],
     ["--top", 0.1], ["--region", "1,1", "9,1", "9,9"], ["--calibrate", "normal/"]],
    ids=lambda given: given[0],
)  # fmt: skip
def test_how_banks_are_made_is_not_chosen_again_for_several(
    products: tuple[Path, Path], bundle: Path, output: Path, capsys: pytest.CaptureFixture[str], given: list[object]
) -> None:
    images, banks = products
    assert run("score", bundle, images, "--references", banks, "--output", output, *given) == 1
    names, _, told = capsys.readouterr().err.removeprefix("adpretrain: error: ").partition(": ")
    assert str(given[0]).removeprefix("--").replace("-", "_") in names.split(", ")
    assert told.startswith("the banks of --references are as they were made: leave it out")
    assert not output.exists()


def test_a_product_that_cannot_be_decided_is_named(
    products: tuple[Path, Path], bundle: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, banks = products
    assert run("score", bundle, images, "--references", banks, "--output", output, "--fail-on-anomaly") == 1
    assert "error: nut: a decision needs a calibrated reference" in capsys.readouterr().err


def test_an_automatic_choice_is_told_by_its_result(
    bundle: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    automatic = ["--augment-references", "auto"]
    assert run("score", bundle, image_folder, "--reference", image_folder, "--output", output, *automatic) == 0
    chosen = json.loads((output / "run.json").read_text())["augment_references"]
    assert chosen in AUGMENTATIONS
    capsys.readouterr()
    bank = output / "bank.safetensors"
    assert run("reference", bundle, image_folder, "--output", bank, *automatic) == 0
    assert ReferenceBank.load(bank).augmentation == ("" if chosen == "none" else chosen)
    assert (f"with copies ({chosen})" in capsys.readouterr().out) == (chosen != "none")


def test_a_table_is_for_several_references(
    bundle: Path, bank: Path, image_folder: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", bundle, image_folder, "--reference", bank, "--categories", "a.csv", "--output", output) == 1
    assert "--categories a.csv is for --references, a folder of several products' banks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("score", bundle, image_folder, "--reference", bank, "--references", bank.parent, "--output", output)
    assert "--references: not allowed with argument --reference" in capsys.readouterr().err
