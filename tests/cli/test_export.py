"""``adpretrain export``, and the ``predict.py`` that it leaves, which runs where there is no PyTorch."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from adpretrain_hf.integrations import onnx as onnx_integration
from tests.conftest import make_extractor, random_image

pytest.importorskip("onnxruntime")

# An interpreter in which the package and what it needs cannot be imported runs the program.
ALONE = """
import runpy, sys
sys.modules |= dict.fromkeys(("adpretrain_hf", "torch", "transformers", "safetensors", "huggingface_hub"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One level: an exporter's time is in proportion to the operations of the graph."""
    folder = tmp_path_factory.mktemp("one_level") / "bundle"
    make_extractor(tiny_folder, layers=(2,)).save_pretrained(folder)
    return folder


def save_bank(extractor: ADPretrainFeatureExtractor, path: Path, calibrated: bool = True) -> None:
    """Of two images, and twenty that it is calibrated by."""
    calibrate = [random_image(seed) for seed in range(200, 220)] if calibrated else None
    images = [random_image(100), random_image(101)]
    extractor.make_reference(images, category="screw", calibrate=calibrate).save(path)


def save_images(folder: Path) -> Path:
    """Images as cameras and people leave them: wide and high, grey, with a palette, clear, turned, in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    picture = random_image(5, 60, 40)
    picture.save(folder / "wide.png")
    random_image(6, 40, 60).save(folder / "high.jpg", quality=95)
    random_image(7, 300, 200).save(folder / "sub" / "large.bmp")
    picture.convert("L").save(folder / "grey.png")
    picture.quantize(16).save(folder / "palette.gif")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tri(40, 60, dtype=np.uint8) * 255))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(8, 40, 60).save(folder / "turned.jpg", exif=exif, quality=95)
    return folder


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def predict(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, folder / "predict.py", folder / "screw.onnx", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, encoding="utf-8", timeout=120)


def rows_of(text: str) -> dict[str, list[float]]:
    header, *rows = csv.reader(text.splitlines())
    assert header[:2] == ["image", "score"]
    return {path: [float(value) for value in values] for path, *values in rows}


@pytest.fixture(scope="module")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bank and what was exported of it."""
    folder = tmp_path_factory.mktemp("exported")
    save_bank(ADPretrainFeatureExtractor.from_pretrained(bundle), folder / "screw.safetensors")
    reference = ("--reference", folder / "screw.safetensors", "--false-alarms", 0.3)
    assert export(bundle, *reference, "--output", folder / "screw.onnx") == 0
    return folder


def test_the_program_gives_the_extractors_scores_and_decisions(bundle: Path, exported: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images")
    for seed in range(30, 60):
        random_image(seed).save(images / f"{seed}.png")
    done = predict(exported, images, "--output", tmp_path / "results" / "scores.csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rows = rows_of((tmp_path / "results" / "scores.csv").read_text(encoding="utf-8"))
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle).set_reference(exported / "screw.safetensors")
    calibration = extractor.reference.judgement.calibration
    assert len(rows) == 37
    for path, (score, anomalous, confidence) in rows.items():
        expected = extractor.score(path)
        assert score == pytest.approx(float(expected.scores), abs=1e-5), path
        assert anomalous == float(expected.is_anomalous(0.3)), path
        above = (score - calibration.threshold(0.3)) / calibration.scale
        assert confidence == pytest.approx(1 / (1 + np.exp(-above)), abs=1e-4)
    assert 0 < sum(anomalous for _, anomalous, _ in rows.values()) < 37


def test_another_threshold_and_an_image_that_cannot_be_used(exported: Path, tmp_path: Path) -> None:
    random_image(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 40), dtype=np.uint16)).save(tmp_path / "c.png")
    random_image(2).save(tmp_path / "d.tif")
    for threshold, anomalous in ((0.0, 1), (9.0, 0)):
        done = predict(exported, tmp_path, "--threshold", threshold)
        assert done.returncode == 1
        assert [values[1] for values in rows_of(done.stdout).values()] == [anomalous]
        assert f"{tmp_path / 'b.png'} cannot be used: cannot identify image file" in done.stderr
        assert f"{tmp_path / 'c.png'} cannot be used: it holds more than 8 bits" in done.stderr
        assert f"{tmp_path / 'd.tif'} cannot be used: " in done.stderr


@pytest.mark.parametrize(
    ("content", "why"), [(None, "NO_SUCHFILE"), (b"junk", "INVALID_PROTOBUF"), (b"another's", "KeyError('adpretrain')")]
)
def test_a_model_that_the_program_cannot_use_is_told(
    exported: Path, tmp_path: Path, content: bytes | None, why: str
) -> None:
    shutil.copy(exported / "predict.py", tmp_path)
    if content:
        model = (exported / "screw.onnx").read_bytes().replace(b"adpretrain", b"adpretrein")
        (tmp_path / "screw.onnx").write_bytes(content if content == b"junk" else model)
    done = predict(tmp_path, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "screw.onnx is no ONNX file of `adpretrain export` that can be read" in done.stderr and why in done.stderr


def test_arguments_that_the_program_cannot_use_are_told(exported: Path, tmp_path: Path) -> None:
    random_image(1).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "no images in "),
        ([tmp_path, "--threshold", "nan"], "--threshold: invalid finite value: 'nan'"),
        ([tmp_path, "--output", tmp_path], "Is a directory"),
        ([tmp_path, "--output", tmp_path / "a.png" / "scores.csv"], "a.png"),
    ):
        done = predict(exported, *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_name_of_an_image_may_be_any_bytes(exported: Path, tmp_path: Path) -> None:
    random_image(1).save(tmp_path / os.fsdecode(b"\xff.png"))
    assert predict(exported, tmp_path, "--output", tmp_path / "scores.csv").returncode == 0
    (to_file,) = rows_of((tmp_path / "scores.csv").read_text(encoding="utf-8"))
    (to_terminal,) = rows_of(predict(exported, tmp_path).stdout)
    assert to_file == to_terminal == f"{tmp_path}/\\udcff.png"


def test_whole_images_without_a_calibration(bundle: Path, tmp_path: Path) -> None:
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, resize_mode="resize")
    save_bank(extractor, tmp_path / "screw.safetensors", calibrated=False)
    size = ("--resize-mode", "resize", "--image-height", 32, "--image-width", 48)
    reference = ("--reference", tmp_path / "screw.safetensors")
    assert export(bundle, *reference, "--output", tmp_path / "screw.onnx", *size) == 0
    images = save_images(tmp_path / "images")
    done = predict(tmp_path, images)
    extractor.set_reference(tmp_path / "screw.safetensors")
    rows = rows_of(done.stdout)
    for path, values in rows.items():
        assert values == [pytest.approx(float(extractor.score(path).scores), abs=1e-5)], path
    assert len(rows) == 6  # the other is upright
    assert f"{images / 'high.jpg'} cannot be used: the model takes 32 x 48 pixels" in done.stderr
    assert "export one by --image-height 48 --image-width 32" in done.stderr
    refused = predict(tmp_path, images, "--threshold", 1)
    assert refused.returncode == 2 and "--threshold needs a model that was exported with a calibrated" in refused.stderr


def test_what_cannot_be_written_is_refused(
    bundle: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ("--reference", exported / "screw.safetensors")
    assert export(bundle, *reference, "--output", tmp_path / "screw.pt") == 1
    assert "expected a name that ends in .onnx" in capsys.readouterr().err
    (tmp_path / "predict.py").write_text("print('mine')\n")
    assert export(bundle, *reference, "--output", tmp_path / "screw.onnx") == 1
    assert "predict.py is another program, which would be lost" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(bundle, *reference, "--output", tmp_path / "sub" / "screw.onnx") == 1
    assert "pip install adpretrain-hf[onnx]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["predict.py"]


def test_the_program_is_written_again(exported: Path) -> None:
    assert (exported / "predict.py").read_text(encoding="utf-8") == onnx_integration.PROGRAM
