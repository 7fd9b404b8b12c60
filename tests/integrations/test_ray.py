"""Ray Data: the actors as Ray calls them, and on two workers of this machine the documented recipe and ``--ray``."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import list_images, open_images
from adpretrain_hf.integrations.ray import ADPretrainFeatures, ADPretrainScores, connect, write_parquet
from adpretrain_hf.quantization import quantize
from tests.conftest import ROOT, random_image

ray = pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")


@pytest.fixture
def bank(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    extractor.set_reference([random_image(100), random_image(101)]).reference.save(tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


@pytest.fixture
def arguments(bundle: Path, bank: Path) -> dict[str, object]:
    return {"bundle": str(bundle), "references": str(bank), "device": "cpu"}


@pytest.fixture
def expected(extractor: ADPretrainFeatureExtractor, bank: Path, image_folder: Path) -> dict[str, float]:
    """The scores of ``extractor.score``, by path."""
    paths = list_images(image_folder)
    return dict(zip(map(str, paths), extractor.score(paths).scores.tolist(), strict=True))


# As Ray calls it


def test_bytes_paths_and_arrays(arguments: dict[str, object], image_folder: Path, expected: dict[str, float]) -> None:
    paths = sorted(image_folder.glob("*.png"))
    columns = {
        "bytes": np.array([path.read_bytes() for path in paths], dtype=object),
        "path": np.array([str(path) for path in paths]),
        "image": np.stack([np.asarray(random_image(number)) for number in range(3)]),
    }
    scores = [expected[str(path)] for path in paths]
    for column in columns:
        done = ADPretrainScores(**arguments, column=column, batch_size=2)(columns)
        assert done["score"].tolist() == pytest.approx(scores, abs=1e-5)
        assert done["error"].tolist() == [""] * 3 and done["path"] is columns["path"]


@pytest.mark.parametrize("kind", [ADPretrainScores, ADPretrainFeatures])
def test_a_calibrated_reference_gives_p_values(
    kind: type[ADPretrainScores],
    arguments: dict[str, object],
    extractor: ADPretrainFeatureExtractor,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    bank = extractor.make_reference([random_image(100), random_image(101)])
    extractor.calibrate(bank, [random_image(200 + number) for number in range(5)]).save(tmp_path / "own.safetensors")
    images = [str(image_folder / f"{number}.png") for number in range(3)]
    expected = extractor.set_reference(tmp_path / "own.safetensors").score(images).p_values.tolist()
    made = kind(**arguments | {"references": tmp_path / "own.safetensors"}, column="path")
    done = made({"path": np.array([*images, "no/such.png"])})
    assert done["p_value"][:3].tolist() == expected and np.isnan(done["p_value"][3])


@pytest.mark.parametrize("kind", [ADPretrainScores, ADPretrainFeatures])
def test_images_that_cannot_be_used_are_told(
    kind: type[ADPretrainScores], arguments: dict[str, object], image_folder: Path, expected: dict[str, float]
) -> None:
    good = str(image_folder / "0.png")
    done = kind(**arguments, column="path")({"path": np.array([good, "no/such.png", good])})
    assert done["score"][[0, 2]].tolist() == pytest.approx([expected[good]] * 2, abs=1e-5)
    assert np.isnan(done["score"][1])
    assert done["error"].tolist() == ["", "no such image: no/such.png", ""]
    done = kind(**arguments)({"bytes": np.array([b"broken"], dtype=object)})
    assert done["error"][0].startswith("image 0 of the batch cannot be read as an image: ")
    if kind is ADPretrainFeatures:
        assert done["layer1"].shape == (1, 32, 4, 4) and np.isnan(done["layer1"]).all()


def test_features_of_images_of_several_shapes(
    extractor: ADPretrainFeatureExtractor, bank: Path, tmp_path: Path
) -> None:
    extractor.config = extractor.config.replace(resize_mode="resize")
    extractor.save_pretrained(tmp_path / "whole")
    images = [random_image(0, 96, 48), random_image(1, 48, 48)]
    column = np.empty(2, dtype=object)
    column[:] = [np.asarray(image) for image in images]
    random_image(100).save(tmp_path / "normal.png")
    features = ADPretrainFeatures(tmp_path / "whole", tmp_path / "normal.png", column="image", device="cpu")
    done = features({"image": column})
    assert [level.shape for level in done["layer1"]] == [(32, 4, 8), (32, 4, 4)]


def test_eight_bits(extractor: ADPretrainFeatureExtractor, arguments: dict[str, object], image_folder: Path) -> None:
    paths = np.array(list(map(str, list_images(image_folder))))
    references = [image_folder / "0.png", image_folder / "1.png"]
    arguments |= {"references": list(map(str, references)), "column": "path", "dtype": "int8"}
    expected = quantize(extractor).set_reference(references).score(list(paths)).scores.tolist()
    assert ADPretrainScores(**arguments)({"path": paths})["score"].tolist() == expected


def test_missing_column(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"the batch has no column 'bytes', only \['image'\]: give its name"):
        ADPretrainScores(**arguments)({"image": np.zeros((1, 32, 32, 3), dtype=np.uint8)})


@pytest.fixture
def banks(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    """The references of two products, as a folder."""
    for seed, category in enumerate(("nut", "screw")):
        extractor.make_reference([random_image(100 + seed)]).save(tmp_path / "banks" / f"{category}.safetensors")
    return tmp_path / "banks"


def test_several_products(
    arguments: dict[str, object], banks: Path, image_folder: Path, extractor: ADPretrainFeatureExtractor
) -> None:
    good = str(image_folder / "0.png")
    batch = {"path": np.array(["no/such.png", good, good]), "product": np.array(["nut", "screw", "nut"])}
    wanted = [
        extractor.set_reference(banks / f"{one}.safetensors").score(good).scores.item() for one in ("screw", "nut")
    ]
    for references in (banks, {one: str(banks / f"{one}.safetensors") for one in ("nut", "screw")}):
        scores = ADPretrainScores(**arguments | {"references": references}, column="path", category_column="product")
        done = scores(batch)
        assert done["score"][1:].tolist() == pytest.approx(wanted, abs=1e-5) and done["error"][1:].tolist() == ["", ""]
        assert np.isnan(done["score"][0]) and done["error"][0] == "no such image: no/such.png"
    with pytest.raises(
        InputError, match="the batch has no column 'product', only .*: give its name as `category_column`"
    ):
        scores({"path": batch["path"]})


# Two workers


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    """A Ray of two CPUs, whose workers import this checkout."""
    on_termination = signal.getsignal(signal.SIGTERM)
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    here = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}
    try:
        connect(**here, runtime_env={"env_vars": variables})
    except InputError as error:
        pytest.skip(str(error))
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own would stay, and be that of every fork


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one core, as in the workers: more of them may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documented_recipe(changes: dict[str, str]) -> str:
    (recipe,) = re.findall(
        r"```text\n(import ray\n.*?)```", (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for there, here in changes.items():
        assert recipe.count(there) == 1
        recipe = recipe.replace(there, here)
    return recipe


def test_documented_recipe_gives_the_scores_of_the_extractor(
    two_workers: None, bundle: Path, bank: Path, image_folder: Path, expected: dict[str, float], tmp_path: Path,
    extractor: ADPretrainFeatureExtractor,
) -> None:  # fmt: skip
    class Where(ADPretrainFeatures):
        """Tells the process and the code as well; sent to the workers by value, for it is local."""

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            done = super().__call__(batch)
            code = sys.modules["adpretrain_hf"].__file__
            return done | {"pid": np.full(len(done["score"]), os.getpid()), "code": np.full(len(done["score"]), code)}

    changes = {
        '"images"': repr(str(image_folder)),
        "ADPretrainScores,  #": "Where,  #",
        "your-name/my-bundle": str(bundle),
        "/shared/screw.safetensors": str(bank),
        "size=8": "size=2",
        "num_gpus=1": "num_cpus=0.5",  # or no CPU is left to read with
        'write_parquet("scores")': f'write_parquet("{tmp_path / "scores"}")',
    }
    exec(compile(documented_recipe(changes), "integrations.md", "exec"), {"Where": Where})
    rows = {row["path"]: row for row in ray.data.read_parquet(str(tmp_path / "scores")).take_all()}
    assert {path: row["score"] for path, row in rows.items()} == pytest.approx(expected, abs=1e-5)
    assert rows[next(iter(rows))].keys() == {"path", "score", "error", "pid", "code", *extractor.layers}
    assert {row["error"] for row in rows.values()} == {""}
    assert {row["code"] for row in rows.values()} == {str(ROOT / "adpretrain_hf" / "__init__.py")}
    assert os.getpid() not in {row["pid"] for row in rows.values()}
    path = str(image_folder / "1.png")
    for layer, maps in extractor(path).items():
        torch.testing.assert_close(torch.tensor(rows[path][layer]), maps[0], rtol=0, atol=1e-5)


# The command line


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """The rows of the Parquet files by their paths, each of which is there once."""
    files = sorted(output.glob("[!.]*.parquet"))
    found = [row for file in files for row in parquet.read_table(file, partitioning=None).to_pylist()]
    rows = {row["path"]: row for row in found}
    assert len(rows) == len(found)
    return rows


@pytest.mark.usefixtures("two_workers", "one_thread")
def test_scores_on_ray_are_those_of_one_process_to_the_bit(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10, 20):  # four batches, and as many blocks
        random_image(number).save(image_folder / f"{number}.png")
    (image_folder / "whole.png").write_bytes(b"broken")  # the last one, and so all batches are the same
    plain, on_ray = tmp_path / "plain", tmp_path / "on=ray № 1"
    options = (bundle, image_folder, "--reference", bank, "--batch-size", 4)
    assert run("score", *options, "--output", plain) == 1
    assert run("score", *options, "--output", on_ray, "--ray") == 1
    out, err = capsys.readouterr()
    assert out == f"{plain}: 15 of 16 images\n{on_ray}: 15 of 16 images\n"
    told = ["1 image could not be used:", f"  {image_folder / 'whole.png'} cannot be read as an image: "]
    assert all(line.startswith(start) for line, start in zip(err.splitlines()[-2:], told, strict=True))

    rows = rows_of(on_ray)
    assert list(rows[str(image_folder / "0.png")]) == ["path", "size", "modified", "score", "error"]
    failed = rows.pop(str(image_folder / "whole.png"))
    with (plain / "scores.csv").open(encoding="utf-8", newline="") as file:
        expected = {str(image_folder / row["image"]): float(row["score"]) for row in csv.DictReader(file)}
    assert {path: row["score"] for path, row in rows.items()} == expected
    assert {row["error"] for row in rows.values()} == {""}
    assert all(row["modified"] == Path(path).stat().st_mtime_ns for path, row in rows.items())
    report = json.loads((plain / "scores.json").read_text(encoding="utf-8"))
    assert np.isnan(failed["score"]) and report["failures"] == [{"image": "whole.png", "error": failed["error"]}]
    assert json.loads((on_ray / "run.json").read_text()) == report["settings"] | {"format": "parquet"}
    assert {path.suffix for path in on_ray.iterdir()} == {".parquet", ".json", ".safetensors"}


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers", "one_thread")
def test_several_products_on_ray_are_those_of_one_process_to_the_bit(
    bundle: Path, banks: Path, image_folder: Path, tmp_path: Path
) -> None:
    for number, category in enumerate(("nut", "screw", "nut")):
        (image_folder / category).mkdir(exist_ok=True)
        (image_folder / f"{number}.png").rename(image_folder / category / f"{number}.png")
    (image_folder / "sub").rename(image_folder / "nut" / "sub")
    plain, on_ray = tmp_path / "plain", tmp_path / "ray"
    options = (bundle, image_folder, "--references", banks)
    assert run("score", *options, "--output", plain, "--no-overlays") == 0
    assert run("score", *options, "--output", on_ray, "--ray") == 0
    with (plain / "scores.csv").open(encoding="utf-8", newline="") as file:
        told = {str(image_folder / row["image"]): row for row in csv.DictReader(file)}
    rows = rows_of(on_ray)
    assert {path: row["score"] for path, row in rows.items()} == {
        path: float(row["score"]) for path, row in told.items()
    }
    assert ray.data.read_parquet(str(on_ray)).count() == 5
    assert {path: row["category"] for path, row in rows.items()} == {
        path: row["category"] for path, row in told.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers")
def test_max_pixels_reaches_the_workers(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert (
        run("score", bundle, image_folder, "--reference", bank, "--output", tmp_path, "--ray", "--max-pixels", 10) == 1
    )
    errors = [row["error"] for row in rows_of(tmp_path).values()]
    assert errors and all("is refused, for it would need too much memory" in error for error in errors)


@pytest.mark.usefixtures("two_workers")
def test_second_run_on_ray_does_what_is_missing_has_changed_or_could_not_be_used(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, expected: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done, changed, failed, halved, missing = expected
    other, gone = tmp_path / "other.png", tmp_path / "gone.png"
    random_image(50).save(other)

    def row(image: str | Path, error: str = "", later: int = 0, larger: int | None = None) -> dict[str, object]:
        modified = Path(image).stat().st_mtime_ns + later if Path(image).exists() else 1
        size = (
            {"size": Path(image).stat().st_size + larger} if larger is not None else {}
        )  # an earlier version had none
        return {"path": str(image), **size, "modified": modified, "score": -1.0, "error": error}

    def write(name: str, *rows: dict[str, object]) -> Path:
        parquet.write_table(pa.Table.from_pylist(list(rows)), output / name)
        return output / name

    output = tmp_path / "out"
    output.mkdir()
    whole = write("whole.parquet", row(done))
    write("partly.parquet", row(changed, later=1), row(other), row(gone))
    write("grown.parquet", row(missing, larger=1))
    write("none.parquet", row(failed, error="broken"))
    half = write("half.parquet", row(halved))
    half.write_bytes(half.read_bytes()[:-8])
    write(".temporary.parquet", row(missing))
    before = whole.stat().st_mtime_ns

    arguments = ("score", bundle, image_folder, "--reference", bank, "--output", output, "--ray", "--ray-cpus", 1)
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"{output}: 5 of 5 images\n"
    scores = {path: row["score"] for path, row in rows_of(output).items()}
    assert scores.pop(done) == -1 and scores.pop(str(other)) == -1
    assert scores == pytest.approx({path: expected[path] for path in (changed, failed, halved, missing)}, abs=1e-5)
    assert whole.stat().st_mtime_ns == before and not half.exists() and not (output / "none.parquet").exists()

    files = {file: file.read_bytes() for file in output.iterdir()}
    assert run(*arguments) == 0
    assert {file: file.read_bytes() for file in output.iterdir()} == files
    for other in (arguments[:-3], (*arguments, "--calibrate", image_folder)):
        assert run(*other) == 1
        assert f"{output} holds results of other settings" in capsys.readouterr().err


@pytest.mark.usefixtures("two_workers", "one_thread")
def test_features_of_a_data_set_on_ray_are_those_of_one_process_to_the_bit(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path
) -> None:
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in list_images(image_folder)]
    images = [*encoded, {"bytes": b"broken", "path": None}]
    schema = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=schema).save_to_disk(str(tmp_path / "rows"))
    options = (bundle, tmp_path / "rows", "--reference", bank)
    assert run("extract", *options, "--output", tmp_path / "plain") == 1
    assert run("extract", *options, "--output", tmp_path / "out", "--ray", "--ray-cpus", 1) == 1
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [f"row {number}" for number in range(6)]
    assert rows["row 5"]["error"].startswith("row 5 cannot be read as an image: ")
    assert np.isnan(rows["row 5"]["layer2"]).all()
    for number in range(5):
        for layer, level in load_file(tmp_path / "plain" / f"{number}.safetensors").items():
            np.testing.assert_array_equal(np.asarray(rows[f"row {number}"][layer]), level.numpy(), strict=True)


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers")
def test_results_are_written_while_others_are_computed(
    arguments: dict[str, object], image_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    images = open_images(image_folder, output)
    *_, last = images.names

    def source(image: str) -> str:
        deadline = time.monotonic() + 60
        while image == last and not list(output.glob("*.parquet")):
            if time.monotonic() > deadline:
                raise ImageError("nothing was written")
            time.sleep(0.1)
        return image

    assert write_parquet(dataclasses.replace(images, source=source), output, batch_size=1, **arguments) == {}
    assert len(rows_of(output)) == 5


@pytest.mark.usefixtures("two_workers")
def test_what_cannot_be_done_on_ray_is_told_in_one_line(
    arguments: dict[str, object], image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no node of the Ray cluster has 3 CPUs for an actor: the largest has 2"):
        write_parquet(open_images(image_folder, tmp_path), tmp_path, cpus=3, **arguments)
    with pytest.raises(InputError, match=r"^/.* has no variant 'nrom' .*: expected one of \['angle', 'norm'\]$"):
        write_parquet(open_images(image_folder, tmp_path), tmp_path, variant="nrom", **arguments)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_file_name_that_is_not_unicode_is_refused(arguments: dict[str, object], tmp_path: Path) -> None:
    random_image(0).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")))
    with pytest.raises(InputError, match="caf.*is not Unicode, as paths in Parquet files are: rename it"):
        write_parquet(open_images(tmp_path, tmp_path / "out"), tmp_path / "out", **arguments)
