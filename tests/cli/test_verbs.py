"""The commands one by one: what they write, what they say, and how they refuse bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank, __version__
from adpretrain_hf.cli import build_parser, main
from adpretrain_hf.errors import BundleError
from adpretrain_hf.scoring import place_map
from tests.conftest import ROOT, make_extractor, random_image

COMMANDS = ("score", "watch", "extract", "reference", "export", "info", "demo", "new", "convert", "push")
HEAVY = ("PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail, and returns the one line that says why; only a progress bar may come before."""
    capsys.readouterr()
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    *bar, message = err.splitlines()
    assert out == "" and message.startswith("adpretrain: error: ")
    assert [line for line in bar if line and "image/s" not in line and "s/image" not in line] == []
    return message


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, level in expected.items():
        torch.testing.assert_close(got[name], level, rtol=0, atol=1e-6)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    """A folder of three normal images."""
    folder = tmp_path / "normal"
    folder.mkdir()
    for number in range(3):
        random_image(100 + number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def bank(bundle: Path, normal: Path, tmp_path: Path) -> Path:
    """The normal images as a reference bank."""
    path = tmp_path / "bank.safetensors"
    assert run("reference", bundle, normal, "--output", path, "--category", "screw") == 0
    return path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )


# Help and usage


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import sys
from adpretrain_hf.cli import build_parser, main
for arguments in (["--help"], ["score", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        print("exit code", stop.code)
print("imported:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = python("-c", program)
    assert done.stdout.count("exit code 0") == 2
    assert "imported: []" in done.stdout, done.stdout[-200:]


def test_version_as_a_program() -> None:
    done = python("-m", "adpretrain_hf.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"adpretrain-hf {__version__}\n", "")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "] == [*COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_ends_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    text, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert text.startswith(f"usage: adpretrain {command} ")
    assert "(default: None)" not in text and "(default: False)" not in text
    for line in examples.splitlines():
        program, *arguments = line.split()
        assert program == "adpretrain" and build_parser().parse_args(arguments).command == command
    assert examples


SCORE = ["score", "bundle", "images", "--reference", "normal", "--output", "out"]
EXTRACT = ["extract", *SCORE[1:]]
WATCH = ["watch", *SCORE[1:]]
NEW = ["new", "--backbone", "folder", "--output", "out"]


def test_a_misspelt_option_is_named_before_the_one_it_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", "bundle", "images", "--reference", "normal", "--ouput", "results"])
    assert "error: unrecognized argument --ouput: did you mean --output?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("score", "bundle", "images", "--referense", "normal", "--output", "out")
    assert "error: unrecognized argument --referense: did you mean --reference?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", "bundle", "images", "--reference", "normal", "--outp=results", "--shade"])
    assert "unrecognized arguments: --shade" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["sccore"], "sccore"),
        (["--bundle"], "COMMAND"),
        (["score"], "bundle"),
        (["score", "bundle", "--output", "out"], "images"),
        (SCORE[:-2], "--output"),
        (SCORE[:3] + SCORE[-2:], "--reference"),
        ([*SCORE[:3], "--reference", "--output", "out"], "--reference"),
        ([*SCORE, "--batch-size", "0"], "--batch-size: got '0', expected an integer >= 1"),
        ([*SCORE, "--batch-size", "-1"], "--batch-size"),
        ([*SCORE, "--batch-size", "1.5"], "--batch-size"),
        ([*SCORE, "--batch-size", "²"], "--batch-size"),
        ([*SCORE, "--image-size", "0"], "--image-size"),
        ([*SCORE, "--dtype", "float8"], "float8"),
        ([*SCORE, "--batchsize", "4"], "--batchsize"),
        ([*SCORE, "--ray", "--ray-cpus", "0"], "--ray-cpus: got '0', expected an integer >= 1"),
        (WATCH[:-2], "--output"),
        ([*WATCH, "--settle", "0"], "--settle: got '0', expected a number of seconds above 0"),
        ([*WATCH, "--interval", "soon"], "--interval: got 'soon', expected a number of seconds above 0"),
        ([*EXTRACT, "--format", "pt"], "pt"),
        (NEW[:3], "--output"),
        (NEW[:1] + NEW[3:], "--backbone"),
        ([*NEW, "--levels", "3,x"], "--levels: got 'x', expected an integer >= 1"),
        ([*NEW, "--levels", ""], "--levels"),
        ([*NEW, "--levels", "0,1"], "--levels"),
        ([*NEW, "--resize-mode", "stretch"], "stretch"),
        ([*NEW, "--reference-tokens", "0"], "--reference-tokens"),
        ([*NEW, "--seed", "one"], "--seed"),
        ([*NEW, "--seed", "100000000000000000000"], "--seed"),
        (["reference", "bundle", "images"], "--output"),
        (["convert", "--output", "out"], "--backbone"),
        (["push", "bundle"], "repository"),
        (["info"], "path"),
        (["demo", "images"], "images"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: adpretrain") and named in err.splitlines()[-1]


# new


def test_new_makes_a_bundle_whose_features_are_the_residuals(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    options = ("--levels", "2,4", "--image-size", 40, "--reference-tokens", 8, "--resize-mode", "crop")
    assert run("new", "--backbone", tiny_folder, "--output", output, *options, "--upstream", "org/tiny") == 0
    assert capsys.readouterr() == (
        f"{output}: org/tiny, levels 2, 4, 32 channels, 40 px, the centre square, 8 reference tokens; its "
        "projectors are the identity: nothing is trained\n",
        "",
    )
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"] == "org/tiny" and config["layers"] == [2, 4] and config["format_version"] == 1
    assert config["image_size"] == 40 and config["num_reference_tokens"] == 8 and config["resize_mode"] == "crop"
    extractor = ADPretrainFeatureExtractor.from_pretrained(output).set_reference(random_image(1))
    features = extractor(random_image(2))
    encoded = extractor.encode(extractor.preprocess(random_image(2)))
    expected = extractor.residuals(encoded)
    assert_equal(features, dict(zip(("layer2", "layer4"), expected, strict=True)))


def test_new_takes_the_quarters_and_the_backbones_own_size_by_default(tiny_folder: Path, tmp_path: Path) -> None:
    assert run("new", "--backbone", tiny_folder, "--output", tmp_path / "new", "--reference-tokens", 8) == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert (config["layers"], config["image_size"]) == ([1, 2, 3, 4], 224)
    assert config["backbone"] == tiny_folder.name and config["resize_mode"] == "resize"


def test_new_writes_the_precision_it_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    options = ("--dtype", "float16", "--reference-tokens", 8, "--image-size", 32)
    assert run("new", "--backbone", tiny_folder, "--output", tmp_path / "new", *options) == 0
    for name in ("model.safetensors", "backbone/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / "new" / name).values()} == {torch.float16}
    assert ADPretrainFeatureExtractor.from_pretrained(tmp_path / "new").dtype == torch.float32


def test_new_is_reproducible_byte_for_byte(tiny_folder: Path, tmp_path: Path) -> None:
    def bundle_of(seed: int, name: str) -> dict[str, bytes]:
        options = ("--seed", seed, "--reference-tokens", 8, "--image-size", 32)
        assert run("new", "--backbone", tiny_folder, "--output", tmp_path / name, *options) == 0
        return {file: (tmp_path / name / file).read_bytes() for file in files_below(tmp_path / name)}

    first = bundle_of(3, "first")
    # Several times: what depends on the order of a hash table is equal every other time.
    different = {name for number in range(6) for name, it in bundle_of(3, f"{number}").items() if it != first[name]}
    assert different == set()
    other = bundle_of(4, "other")
    assert {name for name in first if other[name] != first[name]} == {"model.safetensors"}


# reference


def test_reference_writes_the_bank_that_the_library_makes(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, tmp_path: Path
) -> None:
    output = tmp_path / "banks" / "screw.safetensors"
    assert run("reference", bundle, normal, "--output", output, "--category", "screw", "--batch-size", 2) == 0
    bank, expected = ReferenceBank.load(output), extractor.make_reference(normal)
    assert (bank.category, bank.num_images, bank.fingerprint) == ("screw", 3, extractor.config.fingerprint)
    for got, level in zip(bank.patches, expected.patches, strict=True):
        torch.testing.assert_close(got, level, rtol=0, atol=1e-6)


def test_reference_takes_files_and_a_precision(bundle: Path, normal: Path, tmp_path: Path) -> None:
    files = [normal / "0.png", normal / "2.png"]
    output = tmp_path / "bank.safetensors"
    assert run("reference", bundle, *files, "--output", output, "--bank-dtype", "float16") == 0
    bank = ReferenceBank.load(output)
    assert bank.num_images == 2 and {level.dtype for level in bank.patches} == {torch.float16}


def test_reference_keeps_a_core_set(bundle: Path, normal: Path, tmp_path: Path) -> None:
    assert run("reference", bundle, normal, "--output", tmp_path / "all.safetensors") == 0
    assert run("reference", bundle, normal, "--output", tmp_path / "few.safetensors", "--keep", 0.25) == 0
    few, whole = (ReferenceBank.load(tmp_path / f"{name}.safetensors") for name in ("few", "all"))
    assert (few.compacted, len(few)) == (True, len(whole) // 4)
    assert torch.equal(few.patches[2], whole.compact(0.25).patches[2])


def test_reference_augments_and_selects(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bank.safetensors"
    assert run("reference", bundle, normal, "--output", output, "--augment-references", "flips", "--select", 2) == 0
    bank, expected = ReferenceBank.load(output), extractor.make_reference(normal, augment_references="flips", select=2)
    assert (bank.augmentation, bank.num_images, bank.images) == ("flips", 2, expected.images)
    assert len(bank) == len(expected)


def test_score_augments_references_and_goes_on_only_with_the_same(
    bundle: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("score", bundle, image_folder, "--reference", normal, "--no-overlays", "--output")
    options = ("--augment-references", "flips", "--select", 2)
    assert run(*command, tmp_path / "plain") == run(*command, tmp_path / "flips", *options) == 0
    plain, flips = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "flips"))
    assert {name: flips.pop(name) for name in ("augment_references", "select")} == {
        "augment_references": "flips",
        "select": 2,
    }
    assert flips == plain
    assert "holds results of other settings" in refused(capsys, *command, tmp_path / "flips")


def test_a_saved_bank_is_not_augmented(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("extract", bundle, image_folder, "--reference", bank, "--output", tmp_path / "out")
    message = refused(capsys, *command, "--augment-references", "jitter")
    assert "augment_references: a bank is as it was made" in message


@pytest.mark.parametrize("fraction", ["0", "1.5", "-1", "nan", "half"])
def test_reference_refuses_other_fractions(fraction: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("reference", "bundle", "images", "--output", "bank.safetensors", f"--keep={fraction}")
    assert f"--keep: got '{fraction}', expected a number above 0 and at most 1" in capsys.readouterr().err


def test_score_in_eight_bits(bundle: Path, normal: Path, image_folder: Path, tmp_path: Path) -> None:
    for dtype in ("int8", "float32"):
        output = tmp_path / dtype
        assert run("score", bundle, image_folder, "--reference", normal, "--output", output, "--dtype", dtype) == 0
        assert json.loads((output / "run.json").read_text())["dtype"] == dtype
    exact, rounded = (json.loads((tmp_path / d / "scores.json").read_text())["scores"] for d in ("float32", "int8"))
    assert exact != rounded
    assert [row["score"] for row in rounded] == pytest.approx([row["score"] for row in exact], rel=0.3)
    again = run(
        "score", bundle, image_folder, "--reference", normal, "--output", tmp_path / "float32", "--dtype", "int8"
    )
    assert again == 1  # not over the results of another precision


def test_what_reference_writes_is_taken_as_a_reference(
    bundle: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"  # without .safetensors, by which a bank is told from an image
    if run("reference", bundle, normal, "--output", bank) != 0:
        assert ".safetensors" in capsys.readouterr().err
    else:
        assert run("extract", bundle, image_folder, "--reference", bank, "--output", tmp_path / "out") == 0


# extract


def test_extract_writes_the_features_of_every_image(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert run("extract", bundle, image_folder, "--reference", normal, "--output", tmp_path / "out") == 0
    names = ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
    assert files_below(tmp_path / "out") == sorted(
        [*(f"{name}.safetensors" for name in names), "done.jsonl", "run.json"]
    )
    expected = extractor.set_reference(normal).extract(image_folder, progress=False)
    for name, features in zip(names, expected, strict=True):
        assert features["layer1"].shape == (32, 4, 4)
        assert_equal(load_file(tmp_path / "out" / f"{name}.safetensors"), features)


def test_extract_writes_npz(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, image_folder: Path, tmp_path: Path
) -> None:
    where = ("--reference", normal, "--output", tmp_path / "out", "--format", "npz", "--batch-size", 2)
    assert run("extract", bundle, image_folder / "1.png", image_folder / "sub" / "3.jpg", *where) == 0
    assert files_below(tmp_path / "out") == ["1.png.npz", "3.jpg.npz", "done.jsonl", "run.json"]
    features = extractor.set_reference(normal)(image_folder / "sub" / "3.jpg")
    with np.load(tmp_path / "out" / "3.jpg.npz") as file:
        got = {name: torch.from_numpy(file[name]) for name in file.files}
    assert_equal(got, {name: level[0] for name, level in features.items()})


def test_extract_in_half_precision_stays_close(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, image_folder: Path, tmp_path: Path
) -> None:
    where = ("--reference", normal, "--output", tmp_path / "out", "--format", "npz", "--dtype", "bfloat16")
    assert run("extract", bundle, image_folder / "1.png", *where) == 0
    expected = extractor.set_reference(normal)(image_folder / "1.png")["layer1"][0]
    with np.load(tmp_path / "out" / "1.png.npz") as file:
        got = torch.from_numpy(file["layer1"])
    assert got.dtype == torch.float32
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


# score


def test_score_writes_scores_maps_and_overlays(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, bank: Path, image_folder: Path, tmp_path: Path
) -> None:
    random_image(9, 90, 33).save(image_folder / "wide.bmp")
    out = tmp_path / "out"
    names = ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg", "wide.bmp"]
    expected = extractor.set_reference(normal).score([image_folder / name for name in names])
    low = float(torch.cat([anomaly[anomaly > 0] for anomaly in expected.maps]).median())
    options = ("--output", out, "--batch-size", 4, "--colours", low, 2 * low)
    assert run("score", bundle, image_folder, "--reference", bank, *options) == 0
    assert len(set(expected.scores.tolist())) == len(names)

    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "score", "p_value", "decision", "confidence"] and [row[0] for row in rows] == names
    assert [float(row[1]) for row in rows] == pytest.approx(expected.scores.tolist(), abs=1e-6)
    report = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert [entry["image"] for entry in report["scores"]] == names and report["failures"] == []
    assert [entry["score"] for entry in report["scores"]] == pytest.approx(expected.scores.tolist(), abs=1e-6)

    for name, anomaly in zip(names, expected.maps, strict=True):
        with np.load(out / "maps" / f"{name}.npz") as file:
            assert file["map"].shape == (32, 32) and file["score"] == pytest.approx(file["map"].max())
            size, box = tuple(map(int, file["size"])), tuple(map(int, file["box"]))
            at_full_size = place_map(torch.from_numpy(file["map"]), size, box)
        torch.testing.assert_close(at_full_size, anomaly, rtol=0, atol=1e-6)
        with Image.open(image_folder / name) as image, Image.open(out / "overlays" / f"{name}.png") as overlay:
            assert overlay.size == image.size and overlay.mode == "RGB"
            coloured = np.any(np.asarray(image) != np.asarray(overlay), axis=2)
        top, left, height, width = box
        seen = slice(top + 2, top + height - 2), slice(left + 2, left + width - 2)  # inside the frame
        coloured, anomaly = coloured[seen], anomaly[seen]
        assert 0 < coloured.mean() < 1 and anomaly[coloured].mean() > anomaly[~coloured].mean()


GREEN, RED = (0, 158, 115), (213, 40, 0)


def test_scores_are_decided_by_the_calibration(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, image_folder: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for number in range(4):
        random_image(300 + number).save(more / f"{number}.png")
    bank, out = tmp_path / "own.safetensors", tmp_path / "out"
    assert run("reference", bundle, normal, "--output", bank, "--calibrate", more) == 0
    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", out, "--false-alarms", 0.4)
    calibration = extractor.calibrate(extractor.make_reference(normal), more).judgement.calibration
    assert calibration is not None
    result = extractor.set_reference(normal, calibrate=more).score(image_folder)
    expected = result.is_anomalous(0.4).tolist()
    assert run(*arguments) == 0
    assert run(*arguments, "--fail-on-anomaly") == (3 if any(expected) else 0)

    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["decision"] == "anomalous" for row in rows] == expected
    assert [float(row["p_value"]) for row in rows] == pytest.approx(result.p_values.tolist())
    assert [float(row["confidence"]) for row in rows] == pytest.approx(
        [calibration.confidence(score, 0.4) for score in result.scores.tolist()], abs=1e-5
    )
    report = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert report["decision"] == {
        "false_alarms": 0.4,
        "threshold": pytest.approx(calibration.threshold(0.4)),
        "calibration_images": 4,
        "approximate": False,
    }
    for row in rows:
        with Image.open(out / "overlays" / f"{row['image']}.png") as overlay:
            assert overlay.getpixel((1, 1)) == (RED if row["decision"] == "anomalous" else GREEN)


def test_some_image_is_anomalous_and_some_is_not(
    bundle: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the rate that calls every second normal image anomalous, and at none that the references do not allow."""
    arguments = ("score", bundle, image_folder, "--reference", normal, "--output", tmp_path / "out", "--no-overlays")
    assert run(*arguments, "--false-alarms", 0.75, "--fail-on-anomaly") == 3
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as file:
        assert {row["decision"] for row in csv.DictReader(file)} == {"normal", "anomalous"}
    assert run(*arguments, "--false-alarms", 0.01) == 1
    assert "0.01 cannot be promised by 3 calibration images: it needs at least 99" in capsys.readouterr().err


def test_an_image_has_the_same_colours_in_every_folder(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path
) -> None:
    random_image(9, 90, 33).save(image_folder / "wide.bmp")
    where = ("--reference", bank, "--output")
    assert run("score", bundle, image_folder, *where, tmp_path / "all") == 0
    assert run("score", bundle, image_folder / "0.png", *where, tmp_path / "one") == 0
    name = "overlays/0.png.png"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_no_decision_without_a_calibration(
    bundle: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "small.safetensors"
    assert run("reference", bundle, normal, "--output", bank, "--keep", 0.5) == 0
    assert "not calibrated, so there are no decisions" in capsys.readouterr().err
    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", tmp_path / "out")
    assert run(*arguments, "--false-alarms", 0.1) == 1
    assert "a decision needs a calibrated reference" in capsys.readouterr().err
    assert run(*arguments, "--fail-on-anomaly") == 1
    assert run(*arguments) == 0
    assert (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").startswith("image,score\n")
    fixed = (*arguments[:-1], tmp_path / "fixed", "--colours", 0.1, 0.5)
    assert run(*fixed) == 0


def test_the_top_score_is_chosen_where_the_bank_is_made(
    bundle: Path, bank: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = ("--image-score", "top", "--top", 0.1)
    where = ("score", bundle, image_folder / "0.png", "--no-overlays", "--reference")
    assert run(*where, bank, "--output", tmp_path / "a", *top) == 1
    assert "image_score, top: a bank is as it was made" in capsys.readouterr().err
    assert run("reference", bundle, normal, "--output", tmp_path / "top.safetensors", *top) == 0
    assert run(*where, tmp_path / "top.safetensors", "--output", tmp_path / "b", *top) == 0
    assert run(*where, tmp_path / "top.safetensors", "--output", tmp_path / "b", "--image-score", "max") == 1
    assert "image_score: a bank is as it was made" in capsys.readouterr().err
    assert run(*where, normal, "--output", tmp_path / "c", "--top", 0.1) == 1
    assert "top is 0.1, and the score is the maximum" in capsys.readouterr().err
    assert run(*where, normal, "--output", tmp_path / "c", *top) == 0
    tables = [(tmp_path / out / "scores.csv").read_text(encoding="utf-8") for out in "bc"]
    assert tables[0] == tables[1]


def test_regions_are_written_and_outlined(
    bundle: Path, extractor: ADPretrainFeatureExtractor, normal: Path, image_folder: Path, tmp_path: Path
) -> None:
    out, images = tmp_path / "out", [image_folder / f"{number}.png" for number in range(3)]
    where = ("score", bundle, *images, "--reference", normal, "--output", out, "--image-score", "top")
    options = ("--false-alarms", 0.67, "--regions", "--min-area", 5, "--max-regions", 2)
    options += ("--calibrate", more := image_folder / "sub")
    assert run(*where, *options) == 0
    bank = extractor.make_reference(normal, image_score="top", calibrate=more)
    found = extractor.set_reference(bank).score(images).regions(0.67, min_area=5, at_most=2)
    assert 1 <= max(map(len, found)) <= 2
    with (out / "regions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "top", "left", "height", "width", "area", "peak", "mean"]
    expected = [[*region.box, region.area, region.peak, region.mean] for regions in found for region in regions]
    assert [list(map(float, row[1:])) for row in rows] == [pytest.approx(row, rel=1e-5) for row in expected]
    entries = json.loads((out / "scores.json").read_text(encoding="utf-8"))["scores"]
    for entry, image, regions in zip(entries, images, found, strict=True):
        assert [region["area"] for region in entry["regions"]] == [region.area for region in regions]
        with Image.open(out / "overlays" / f"{image.name}.png") as overlay:
            assert (np.asarray(overlay) == 255).all(axis=2).any() == bool(regions)
    assert run(*where, *options, "--min-area", 10**6) == 0
    for image in images:
        with Image.open(out / "overlays" / f"{image.name}.png") as overlay:
            assert not (np.asarray(overlay) == 255).all(axis=2).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ray", "--regions"], "--regions: Ray writes Parquet files, and neither maps nor overlays"),
        (["--ray", "--no-overlays", "--colours", 0, 1, "--min-area", 1], "--min-area, --colours, --no-overlays: Ray"),
        (["--ray", "--false-alarms", 0.1], "--false-alarms: Ray's Parquet files have no decisions"),
        (["--min-area", 5, "--max-regions", 1], "--min-area, --max-regions: expected --regions with it"),
        (["--ray-cpus", 1], "--ray-cpus: expected --ray or --ray-address with it"),
        (["--colours", "nan", 1], "the colours' range is nan to 1.0, expected finite numbers, LOW < HIGH"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    given: list[object], message: str,
) -> None:  # fmt: skip
    where = (bundle, image_folder, "--reference", bank, "--output", tmp_path / "out")
    assert message in refused(capsys, "score", *where, *given)


def test_a_rate_without_anything_to_calibrate_with_is_refused(
    bundle: Path, normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([normal / "0.png"], [normal, "--keep", 0.5]):
        words = ("reference", bundle, *options, "--output", tmp_path / "new.safetensors", "--false-alarms", 0.5)
        assert "--false-alarms: there is nothing to calibrate with" in refused(capsys, *words)


def test_a_polygon_of_the_command_line_is_the_same_region(
    bundle: Path, normal: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(out: str, *options: object) -> str:
        where = ("--reference", normal, "--output", tmp_path / out, "--no-overlays")
        assert run("score", bundle, image_folder / "0.png", *where, *options) == 0
        return (tmp_path / out / "scores.csv").read_text(encoding="utf-8")

    mask = np.zeros((40, 48), np.uint8)
    mask[:, 10:30] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    masked = scores("a", "--region", tmp_path / "m.png")
    assert scores("b", "--region", "10,0", "29,0", "29,39", "10,39") == masked != scores("c")
    capsys.readouterr()
    assert run("score", bundle, image_folder, "--reference", normal, "--output", tmp_path / "a", "--no-overlays") == 1
    assert "holds results of other settings" in capsys.readouterr().err


def test_score_without_overlays(bundle: Path, bank: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("score", bundle, image_folder, "--reference", bank, "--output", out, "--no-overlays") == 0
    assert (out / "scores.csv").is_file() and not (out / "overlays").exists()


def test_score_takes_normal_files_as_reference(bundle: Path, normal: Path, image_folder: Path, tmp_path: Path) -> None:
    def scores(out: Path, *reference: Path) -> str:
        assert run("score", bundle, image_folder, "--reference", *reference, "--output", out, "--no-overlays") == 0
        return (out / "scores.csv").read_text(encoding="utf-8")

    folder = scores(tmp_path / "a", normal)
    assert scores(tmp_path / "b", *sorted(normal.iterdir())) == folder
    assert scores(tmp_path / "c", normal / "1.png") != folder


def test_variant_and_image_size_are_used(
    bundle: Path, extractor: ADPretrainFeatureExtractor, tiny_folder: Path, normal: Path, image_folder: Path
) -> None:
    other = make_extractor(tiny_folder, seed=2)
    other.variant = "norm"
    other.save_pretrained(bundle)
    out = bundle.parent / "out"
    where = ("--reference", normal, "--output", out)
    assert run("extract", bundle, image_folder / "0.png", *where, "--variant", "norm", "--image-size", 64) == 0
    features = load_file(out / "0.png.safetensors")
    assert features["layer1"].shape == (32, 8, 8)
    wanted = ADPretrainFeatureExtractor.from_pretrained(bundle, variant="norm", image_size=64).set_reference(normal)
    assert_equal(features, {name: level[0] for name, level in wanted(image_folder / "0.png").items()})


def test_images_are_added_to_a_bank(
    bundle: Path, normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *old, new = sorted(normal.iterdir())
    every, some, both = (tmp_path / f"{name}.safetensors" for name in ("every", "some", "both"))
    options = ("--batch-size", 1, "--category", "screw", "--output")
    assert run("reference", bundle, normal, *options, every) == run("reference", bundle, *old, *options, some) == 0
    assert run("reference", bundle, new, "--add-to", some, "--output", some) == 0
    one, other = ReferenceBank.load(some), ReferenceBank.load(every)
    assert one.judgement.calibration is None  # of the images before
    assert other.judgement.calibration is not None
    one.save(tmp_path / "one.safetensors")
    other.judged(one.judgement).save(tmp_path / "other.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert run("reference", bundle, *old, *options, some, "--bank-dtype", "float16") == 0
    assert run("reference", bundle, new, "--add-to", some, "--output", both) == 0
    assert ReferenceBank.load(both).patches[0].dtype == torch.float16
    assert run("reference", bundle, new, "--add-to", some, "--output", both, "--bank-dtype", "float32") == 0
    assert ReferenceBank.load(both).patches[0].dtype == torch.float32
    again = refused(capsys, "reference", bundle, new, "--add-to", every, "--output", both)
    assert f"both reference banks have the images {new.name}: remove them from one" in again


def test_decode_fast_is_the_librarys(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, bank, out = tmp_path / "jpegs", tmp_path / "bank.safetensors", tmp_path / "out"
    images.mkdir()
    for number in range(3):
        random_image(number, 96, 80).save(images / f"{number}.jpg")
    fast = ADPretrainFeatureExtractor.from_pretrained(bundle, decode="fast").set_reference(images / "0.jpg")
    assert run("reference", bundle, images / "0.jpg", "--output", bank, "--decode", "fast") == 0
    words = ("extract", bundle, images, "--reference", bank, "--output", out)
    assert "was made by another extractor" in refused(capsys, *words)
    assert run(*words, "--decode", "fast") == 0
    for name, features in zip(("0.jpg", "1.jpg", "2.jpg"), fast.extract(images, progress=False), strict=True):
        assert_equal(load_file(out / f"{name}.safetensors"), features)


# info


def test_info_describes_a_bundle(
    bundle: Path, extractor: ADPretrainFeatureExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor.variant = "norm"
    extractor.save_pretrained(bundle)
    extractor.make_reference(random_image(0)).save(bundle / "references" / "screw.safetensors")
    capsys.readouterr()
    assert run("info", bundle, "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == "" and facts["layers"] == [1, 2, 3, 4] and facts["hidden_size"] == 32
    assert facts["fingerprint"] == extractor.config.fingerprint and facts["backbone_included"] is True
    assert facts["variants"] == ["angle", "norm"] and facts["references"] == ["screw"]
    assert run("info", bundle) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in facts) and "['angle', 'norm']" in text


def test_info_describes_a_bank(
    bank: Path, extractor: ADPretrainFeatureExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("info", bank) == 0
    out = capsys.readouterr().out
    assert all(fact in out for fact in ("screw", "3 images", "48 patches", "4 levels", "32 channels"))
    assert extractor.config.fingerprint in out


def test_info_describes_a_bank_as_json(
    bank: Path, extractor: ADPretrainFeatureExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("info", bank, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["category"] == "screw" and facts["fingerprint"] == extractor.config.fingerprint
    assert len(facts["images"]) == 3
    assert (facts["core_set"], facts["augment_references"]) == (False, "none")
    assert (facts["image_score"], facts["top"], facts["region"]) == ("max", None, None)


def test_info_tells_how_a_product_is_judged(
    extractor: ADPretrainFeatureExtractor, normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"image_score": "top", "top": 0.1, "augment_references": "flips", "calibrate": True}
    bank = extractor.make_reference(normal, region=np.arange(48) < np.full((40, 1), 12), **options)
    bank.save(tmp_path / "own.safetensors")
    assert run("info", tmp_path / "own.safetensors", "--json") == 0
    facts, calibration = json.loads(capsys.readouterr().out), bank.judgement.calibration
    assert facts["region"] == "25.0% of the image count" and facts["augment_references"] == "flips"
    assert (facts["image_score"], facts["top"]) == ("top", 0.1)
    assert calibration is not None and facts["calibration"] == {
        "images": 3, "false_alarms": 0.25, "threshold": calibration.threshold(), "approximate": True,
    }  # fmt: skip
    assert run("info", tmp_path / "own.safetensors") == 0
    text = capsys.readouterr().out
    assert str(calibration.threshold()) in text and "25.0% of the image" in text
    bank.compact(0.5).save(tmp_path / "own.safetensors")
    assert run("info", tmp_path / "own.safetensors", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["core_set"] is True and facts["calibration"] is None


# Damaged bundles


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def rename_one(tensors: dict[str, Tensor]) -> None:
    tensors["surplus.weight"] = tensors.pop("0.out.weight" if "0.out.weight" in tensors else next(iter(tensors)))


def reshape_one(tensors: dict[str, Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 5)


def without_backbone(bundle: Path) -> None:
    shutil.rmtree(bundle / "backbone")
    change_json(bundle / "config.json", backbone="nobody/nothing", backbone_revision="0" * 40)


WEIGHTS, BACKBONE, CONFIG = "model.safetensors", "backbone/model.safetensors", "config.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "folder missing": (shutil.rmtree, ()),
    "folder is a file": (lambda b: (shutil.rmtree(b), b.write_text("")), ()),
    "not a bundle": (lambda b: (b / CONFIG).unlink(), ("not an ADPretrain bundle", CONFIG)),
    "config is broken JSON": (lambda b: (b / CONFIG).write_text('{"backbone": '), (CONFIG, "not valid JSON")),
    "config is not text": (lambda b: (b / CONFIG).write_bytes(b"\xff\xfe\x00"), (CONFIG, "not valid JSON")),
    "config is empty": (lambda b: (b / CONFIG).write_text(""), (CONFIG, "not valid JSON")),
    "config is a list": (lambda b: (b / CONFIG).write_text("[1]"), (CONFIG, "list")),
    "config is a folder": (lambda b: ((b / CONFIG).unlink(), (b / CONFIG).mkdir()), (CONFIG,)),
    "config of another model": (lambda b: (b / CONFIG).write_text('{"model_type": "dinov2"}'), (CONFIG, "format_ver")),
    "unknown format version": (lambda b: change_json(b / CONFIG, format_version=2), (CONFIG, "format_version is 2")),
    "unknown field": (lambda b: change_json(b / CONFIG, colour="red"), (CONFIG, "colour")),
    "field out of range": (lambda b: change_json(b / CONFIG, image_size=33), (CONFIG, "image_size is 33")),
    "field of another type": (lambda b: change_json(b / CONFIG, layers="1234"), (CONFIG, "layers is '1234'")),
    "other width than the weights": (lambda b: change_json(b / CONFIG, hidden_size=64), (WEIGHTS, "expected (64,")),
    "fewer levels than the weights": (lambda b: change_json(b / CONFIG, layers=[1], residual_scale=[1]), (WEIGHTS,)),
    "weights missing": (lambda b: (b / WEIGHTS).unlink(), (WEIGHTS, "missing")),
    "weights truncated": (lambda b: cut_in_half(b / WEIGHTS), (WEIGHTS, "not a whole safetensors file")),
    "weights empty": (lambda b: (b / WEIGHTS).write_bytes(b""), (WEIGHTS, "not a whole safetensors file")),
    "weights are a pickle": (lambda b: torch.save({"a": torch.ones(2)}, b / WEIGHTS), (WEIGHTS,)),
    "tensor missing and extra": (lambda b: change_tensors(b / WEIGHTS, rename_one), (WEIGHTS, "surplus.weight")),
    "tensor mis-shaped": (lambda b: change_tensors(b / WEIGHTS, reshape_one), (WEIGHTS, "got (3, 5), expected")),
    "tensor with NaN": (lambda b: change_tensors(b / WEIGHTS, spoil), (WEIGHTS, "NaN")),
    "neither backbone nor network": (without_backbone, ("without its backbone", "nobody/nothing", "network")),
    "backbone config missing": (lambda b: (b / "backbone" / CONFIG).unlink(), ("backbone",)),
    "backbone config broken": (lambda b: (b / "backbone" / CONFIG).write_text("{"), ("backbone",)),
    "backbone config of an unknown kind": (
        lambda b: change_json(b / "backbone" / CONFIG, model_type="perceptron"),
        ("backbone", "perceptron"),
    ),
    "backbone config of another type": (
        lambda b: change_json(b / "backbone" / CONFIG, num_attention_heads="four"),
        ("backbone", "num_attention_heads"),
    ),
    "backbone config not an object": (lambda b: (b / "backbone" / CONFIG).write_text("[]"), ("backbone",)),
    "backbone weights missing": (lambda b: (b / BACKBONE).unlink(), ("backbone",)),
    "backbone truncated": (lambda b: cut_in_half(b / BACKBONE), ("backbone",)),
    "backbone empty": (lambda b: (b / BACKBONE).write_bytes(b""), ("backbone",)),
    "backbone with a tensor missing and extra": (
        lambda b: change_tensors(b / BACKBONE, rename_one),
        ("backbone", "missing", "surplus.weight"),
    ),
    "backbone mis-shaped": (lambda b: change_tensors(b / BACKBONE, reshape_one), ("backbone", "of another shape")),
    "backbone with NaN": (lambda b: change_tensors(b / BACKBONE, spoil), ("backbone", "NaN")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundle_is_refused_in_one_line(
    damage: str, bundle: Path, normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do_damage, named = DAMAGES[damage]
    do_damage(bundle)
    output = tmp_path / "bank.safetensors"
    message = refused(capsys, "reference", bundle, normal, "--output", output)
    assert all(text in message for text in (str(bundle), *named)), message
    assert not output.exists()


# Other bad input: in a folder with bundle/, normal/, images/, an empty folder and a text that is called text.png

FOR_SCORE = "--reference normal --output out"
BAD_INPUT: dict[str, tuple[str, ...]] = {
    # bundles and how they are used
    f"score a/b/c images {FOR_SCORE}": ("a/b/c",),
    f"score nosuchbundle images {FOR_SCORE}": ("nosuchbundle",),
    f"score text.png images {FOR_SCORE}": ("text.png",),
    f"score bundle images {FOR_SCORE} --variant nrom": ("nrom", "angle"),
    f"score bundle images {FOR_SCORE} --variant ../angle": ("../angle",),
    f"score bundle images {FOR_SCORE} --image-size 33": ("image_size is 33", "multiple of patch_size=8"),
    f"score bundle images {FOR_SCORE} --device gpu": ("gpu",),
    f"score bundle images {FOR_SCORE} --device cuda:99": ("cuda:99",),
    # images
    f"extract bundle no.png {FOR_SCORE}": ("no.png",),
    f"score bundle no.png {FOR_SCORE}": ("no.png",),
    f"score bundle no_folder {FOR_SCORE}": ("no_folder",),
    f"score bundle empty {FOR_SCORE}": ("no images in empty", ".png"),
    f"score bundle images/0.png normal/0.png {FOR_SCORE}": ("same file name", "0.png"),
    "score bundle images --reference normal --output images": ("no images in images",),
    "reference bundle no.png --output bank.safetensors": ("no.png",),
    "reference bundle empty --output bank.safetensors": ("no images in empty", ".png"),
    # references
    "score bundle images --reference empty --output out": ("no images in empty",),
    "score bundle images --reference no_folder --output out": ("no_folder",),
    "score bundle images --reference no.safetensors --output out": ("no.safetensors", "adpretrain reference"),
    "score bundle images --reference empty.safetensors --output out": ("empty.safetensors", "safetensors file"),
    "score bundle images --reference bundle/model.safetensors --output out": (
        "bundle/model.safetensors",
        "not a reference bank",
    ),
    # outputs
    "score bundle images --reference normal --output text.png/out": ("text.png",),
    "extract bundle images --reference normal --output text.png": ("text.png",),
    "reference bundle normal --output text.png/bank.safetensors": ("text.png",),
    "reference bundle normal --output empty": ("empty",),
    "new --backbone bundle/backbone --output text.png/new --reference-tokens 8": ("text.png",),
    "new --backbone bundle/backbone --output text.png --reference-tokens 8": ("text.png",),
    # backbones
    "new --backbone dinov9-base --output new": ("dinov9-base",),
    "new --backbone no/folder/here --output new": ("no/folder/here",),
    "new --backbone normal --output new": ("'normal'",),
    "new --backbone open_clip:ViT-B-16 --output new": ("open_clip:ViT-B-16", "open_clip:<arch>/"),
    "new --backbone imagebind:no.pth --output new": ("no.pth",),
    "new --backbone bundle/backbone --output new --levels 1,5": ("(1, 5)", "from 1 to 4", "bundle/backbone"),
    "new --backbone bundle/backbone --output new --levels 3,2": ("(3, 2)", "rising"),
    "new --backbone bundle/backbone --output new --levels 2,2": ("(2, 2)", "rising"),
    "new --backbone bundle/backbone --output new --image-size 33": ("image_size is 33",),
    "new --backbone bundle/backbone --output new --no-backbone": ("'backbone'", "commit"),
    # checkpoints
    "convert --backbone bundle/backbone --output new": ("--from-hub", "--angle", "--norm"),
    "convert --backbone bundle/backbone --output new --angle no.pth": ("no.pth",),
    "convert --backbone bundle/backbone --output new --angle text.png": ("text.png",),
    # pushing
    "push no_folder me/it": ("no_folder",),
    "push empty me/it": ("empty", "not an ADPretrain bundle"),
    # info
    "info a/b/c": ("a/b/c",),
    "info text.png": ("text.png",),
    "info empty": ("empty", "not an ADPretrain bundle"),
    "info no.safetensors": ("no.safetensors",),
    "info bundle/model.safetensors": ("bundle/model.safetensors", "not a reference bank"),
}


@pytest.mark.parametrize("command", BAD_INPUT)
@pytest.mark.usefixtures("bundle", "normal", "image_folder")
def test_bad_input_is_refused_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.safetensors").touch()
    Path("text.png").write_text("not an image", encoding="utf-8")
    message = refused(capsys, *command.split())
    assert all(text in message for text in BAD_INPUT[command]), message
    assert list(Path().rglob(".*")) == []  # nothing half-written is left


def test_bank_of_another_extractor_is_refused_with_both_fingerprints(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_with = ReferenceBank.load(bank).fingerprint
    asked_for = ADPretrainFeatureExtractor.from_pretrained(bundle, image_size=64).config.fingerprint
    options = ("--reference", bank, "--output", tmp_path / "out", "--image-size", 64)
    message = refused(capsys, "extract", bundle, image_folder, *options)
    assert made_with != asked_for and made_with in message and asked_for in message
    assert not (tmp_path / "out").exists()


def test_damaged_reference_image_is_named(
    bundle: Path, normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (normal / "1.png").write_bytes(b"")
    assert str(normal / "1.png") in refused(
        capsys, "reference", bundle, normal, "--output", tmp_path / "bank.safetensors"
    )
    assert not (tmp_path / "bank.safetensors").exists()


@pytest.mark.parametrize("verb", ["score", "extract"])
def test_ray_that_is_not_installed_is_refused_with_what_to_install(
    verb: str, bundle: Path, bank: Path, image_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ("--reference", bank, "--output", tmp_path / "out", "--ray")
    assert refused(capsys, verb, bundle, image_folder, *options).endswith("pip install adpretrain-hf[ray]")
    assert not (tmp_path / "out").exists()


def test_ray_in_a_path_with_a_space_is_refused_before_it_starts(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(sys, "executable", "/my projects/venv/bin/python")
    options = ("--reference", bank, "--output", tmp_path / "out", "--ray")
    message = refused(capsys, "score", bundle, image_folder, *options)
    assert "a space in the path of their Python, /my projects/venv/bin/python: make the environment in" in message
    assert not ray.is_initialized() and not (tmp_path / "out").exists()


def test_ray_cluster_that_is_not_there_is_named(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    options = ("--reference", bank, "--output", tmp_path / "out", "--ray-address", "no-address")
    assert "there is no Ray cluster at no-address: " in refused(capsys, "score", bundle, image_folder, *options)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not an ADPretrain bundle"):
        run("info", tmp_path, "--debug")


def test_refusal_as_a_program_is_one_line_without_traceback(tmp_path: Path) -> None:
    done = python("-m", "adpretrain_hf.cli", "new", "--backbone", str(tmp_path), "--output", str(tmp_path / "new"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("adpretrain: error: ") and done.stderr.count("\n") == 1
