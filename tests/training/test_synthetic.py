"""The synthetic set: its tree, its determinism, its defects and their masks, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from adpretrain_hf.errors import InputError
from tests.conftest import ROOT
from tests.training.conftest import SYNTHETIC
from tests.training.real_iad_tree import load_real_iad
from training.synthetic import SIZE, generate
from training.synthetic.__main__ import main
from training.synthetic.camera import VIEWS, generator, noise, photograph
from training.synthetic.defects import FAMILIES, GRACE, MIN_SIDE, paint_defect
from training.synthetic.generate import PARTS, RECIPES, class_names, class_scenes, draw


def indices(folder: Path) -> dict[str, Any]:
    files = (folder / "realiad_jsons" / "realiad_jsons").glob("*.json")
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def photo(seed: int, height: int, width: int, busy: float = 30.0) -> np.ndarray:
    """A coloured surface with detail of all sizes; ``busy`` 0 is an even one."""
    rng = np.random.default_rng(seed)
    texture = noise(rng, (height, width), 40, 5)[..., None] * busy
    return np.clip(rng.uniform(0, 255, 3) + texture, 0, 255).astype(np.uint8)


def check_defect(image: np.ndarray, painted: np.ndarray, mask: np.ndarray) -> None:
    """The mask marks what changed, and nothing else did."""
    assert painted.shape == image.shape and painted.dtype == np.uint8
    assert mask.shape == image.shape[:2] and mask.dtype == bool and mask.any()
    change = np.abs(painted.astype(int) - image).max(-1)
    near = ndimage.binary_dilation(mask, np.ones((2 * GRACE + 1, 2 * GRACE + 1)))
    assert not change[~near].any()
    assert change[mask].mean() >= 4  # grey levels
    # No part of the mask is idle: it changes by 2 grey levels over 5 x 5 px. At a corner of the window that is painted,
    # beyond which it is mirrored, a pixel counts up to four times.
    assert (ndimage.uniform_filter(change.astype(float), 5)[mask] >= 2 / 4).all()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32), height=st.integers(MIN_SIDE, 400), width=st.integers(MIN_SIDE, 400),
    busy=st.sampled_from([0.0, 5.0, 50.0]),
)  # fmt: skip
def test_a_defect_is_where_its_mask_is(family: str, seed: int, height: int, width: int, busy: float) -> None:
    image = photo(seed, height, width, busy)
    before = image.copy()
    painted, mask = paint_defect(image, family, np.random.default_rng(seed))
    assert (image == before).all()
    check_defect(image, painted, mask)


@pytest.mark.parametrize(("seed", "height", "width", "busy"), [(3234957440, 80, 80, 5.0), (2251325446, 73, 98, 50.0)])
def test_a_scratch_whose_shades_cancel_or_that_ends_in_a_corner(
    seed: int, height: int, width: int, busy: float
) -> None:
    image = photo(seed, height, width, busy)
    check_defect(image, *paint_defect(image, "scratch", np.random.default_rng(seed)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0, 255])
def test_defects_show_on_black_and_on_white(family: str, level: int) -> None:
    image = np.full((96, 128, 3), level, np.uint8)
    for seed in range(10):
        check_defect(image, *paint_defect(image, family, np.random.default_rng(seed)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_defect_follows_from_its_generator(family: str) -> None:
    image = photo(1, 120, 160)
    first, again, other = (paint_defect(image, family, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_defects_come_in_many_sizes_and_contrasts(family: str) -> None:
    image = photo(2, 256, 256, 20)
    drawn = [paint_defect(image, family, np.random.default_rng(seed)) for seed in range(60)]
    areas = np.array([mask.mean() for _, mask in drawn])
    changes = np.array([np.abs(painted.astype(int) - image).max(-1)[mask].mean() for painted, mask in drawn])
    assert areas.max() < 0.25
    assert np.quantile(areas, 0.9) > 4 * np.quantile(areas, 0.1)
    assert np.quantile(changes, 0.9) > 1.5 * np.quantile(changes, 0.1)


def test_defects_lie_where_they_may() -> None:
    image, where = photo(3, 256, 256), np.zeros((256, 256), bool)
    where[20:30, 200:210] = True
    for seed in range(20):
        _, mask = paint_defect(image, "fade", np.random.default_rng(seed), where=where)
        rows, columns = np.nonzero(mask)
        assert np.hypot(rows - 25, columns - 205).min() < 20


def test_an_empty_choice_of_places_is_everywhere() -> None:
    """A part that a camera does not see leaves no place to choose."""
    image, rng = photo(3, 96, 96), np.random.default_rng(0)
    check_defect(image, *paint_defect(image, "stain", rng, where=np.zeros((96, 96), bool)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((63, 80, 3), np.uint8)}, r"image: expected \(H, W, 3\) uint8 .* at least 64 px, got \(63"),
        ({"image": np.zeros((80, 80, 3), np.float32)}, r"image: expected .* got \(80, 80, 3\) float32"),
        ({"image": np.zeros((80, 80), np.uint8)}, r"image: expected .* got \(80, 80\) uint8"),
    ],
)
def test_what_cannot_be_painted_on_is_an_error(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {"image": np.zeros((80, 80, 3), np.uint8), "family": "crack", "rng": np.random.default_rng(0)}
    with pytest.raises(InputError, match=message):
        paint_defect(**(given_arguments | arguments))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_draws_a_surface(name: str) -> None:
    surface = draw(name, generator(0, name), 160, 0.5)
    assert surface.colour.shape == (160, 160, 3) and surface.height.shape == (160, 160)
    assert np.isfinite(surface.colour).all() and np.isfinite(surface.height).all()
    assert surface.colour.min() >= -0.1 and surface.colour.max() <= 1.5
    assert surface.colour.std() > 0.005
    if name in PARTS:
        assert surface.inside is not None and 0.05 < surface.inside.mean() < 0.8
        assert surface.inside[0].max() == surface.inside[:, 0].max() == 0  # it is whole
    other = draw(name, generator(1, name), 160, 0.5)
    assert (surface.colour != other.colour).any()


def test_there_are_enough_classes_and_each_has_a_name_of_its_own() -> None:
    names = class_names(100)
    assert len(set(names)) == 100
    assert len(RECIPES) >= 24 and names[: len(RECIPES)] == list(RECIPES)
    assert names[len(RECIPES)] == f"{names[0]}_2"
    first = set(class_names(24))
    assert len(first & set(PARTS)) >= 8 and len(first - set(PARTS)) >= 8


def test_photographs_of_a_scene_differ_in_more_than_noise_but_show_the_same() -> None:
    scenes = class_scenes("gear", 0, 128)
    for scene in scenes.values():
        (first, where), (again, _), (other, other_where) = (photograph(scene, generator(k)) for k in (0, 0, 1))
        assert where is not None and other_where is not None
        assert (first == again).all()
        assert (where != other_where).any()
        assert abs(where.mean() - other_where.mean()) < 0.1
        assert np.abs(first.mean((0, 1)) - other.mean((0, 1))).max() < 40
    views = [photograph(scene, generator(0))[0].astype(int) for scene in scenes.values()]
    assert all(np.abs(views[a] - views[b]).mean() > 10 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_second_make_of_a_class_looks_different() -> None:
    first, second = (photograph(class_scenes(name, 0, 64)["C1"], generator(0))[0] for name in ("linen", "linen_2"))
    assert np.abs(first.astype(int) - second).mean() > 5


def test_the_tree_is_that_of_realiad(synthetic_set: Path) -> None:
    named = set()
    for name, index in indices(synthetic_set).items():
        assert index["meta"] == {"prefix": f"{name}/", "normal_class": "OK", "pre_transform": []}
        assert [item["anomaly_class"] for item in index["train"]] == ["OK"] * 3 * len(VIEWS)  # half of 5, rounded up
        assert len(index["test"]) == (2 + len(FAMILIES)) * len(VIEWS)
        for item in index["train"] + index["test"]:
            assert item["category"] == name
            code, path = item["anomaly_class"], Path(item["image_path"])
            assert path.parts[:-2] == (("OK",) if code == "OK" else ("NG", code))
            assert path.name.startswith(f"{name}_{path.parts[-2][1:]}_{code}_C")
            assert item["mask_path"] == (None if code == "OK" else path.with_suffix(".png").as_posix())
            named |= {f"{name}/{p}" for p in (item["image_path"], item["mask_path"]) if p}
    images = synthetic_set / "realiad_256"
    assert named == {path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()}
    assert set(indices(synthetic_set)) == set(class_names(2))


def test_pictures_and_masks_have_their_size_and_every_mask_shows_something(synthetic_set: Path) -> None:
    for path in (synthetic_set / "realiad_256").rglob("*.*"):
        with Image.open(path) as picture:
            assert picture.size == (SIZE, SIZE)
            assert picture.mode == ("L" if path.suffix == ".png" else "RGB")
            if path.suffix == ".png":
                assert set(np.unique(np.asarray(picture))) == {0, 255}
            else:
                assert np.asarray(picture).std() > 3


def test_the_loader_of_realiad_reads_it(synthetic_set: Path) -> None:
    dataset = load_real_iad(synthetic_set, resolution="256")
    assert len(dataset) == 2 * (5 + len(FAMILIES)) * len(VIEWS)
    assert sum(dataset["is_anomalous"]) == 2 * len(FAMILIES) * len(VIEWS)
    assert set(dataset["view"]) == set(VIEWS)
    assert set(dataset["anomaly_class"]) == {"OK", *FAMILIES.values()}


def test_the_same_pixels_in_another_process_and_among_other_samples(synthetic_set: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.synthetic", str(tmp_path / "set")]
    command += ["--categories", "1", "--normals", "1", "--seed", "5"]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "set" / "overview.png")
    assert "image/s" in done.stderr
    with Image.open(tmp_path / "set" / "overview.png") as sheet:
        assert min(sheet.size) > 100
    pictures = tmp_path / "set" / "realiad_256"
    shared = [path.relative_to(pictures) for path in pictures.rglob("S0001/*.*")]
    assert len(shared) == (1 + 2 * len(FAMILIES)) * len(VIEWS)
    for path in shared:
        assert (pictures / path).read_bytes() == (synthetic_set / "realiad_256" / path).read_bytes(), path


def test_another_seed_gives_other_pixels(synthetic_set: Path, tmp_path: Path) -> None:
    other = generate(tmp_path / "set", **SYNTHETIC | {"categories": 1, "normals": 1, "seed": 6})
    for path in other.rglob("OK/S0001/*.jpg"):
        assert path.read_bytes() != (synthetic_set / path.relative_to(other)).read_bytes()


def test_a_set_that_is_there_is_used_again(synthetic_set: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in synthetic_set.rglob("*")}
    assert generate(str(synthetic_set), **SYNTHETIC) == synthetic_set
    assert {path: path.stat().st_mtime_ns for path in synthetic_set.rglob("*")} == before


def test_a_set_of_other_settings_is_an_error(synthetic_set: Path) -> None:
    with pytest.raises(
        InputError, match=r'set holds a synthetic data set of .*"seed": 5.* expected .*"seed": 6.* choose'
    ):
        generate(synthetic_set, **SYNTHETIC | {"seed": 6})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for there in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"is there already and is no synthetic data set: choose another folder"):
            generate(there, **SYNTHETIC)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("categories", 0, "categories is 0, expected an integer >= 1"),
        ("normals", 0, "normals is 0, expected an integer >= 1"),
        ("defects_per_family", -1, "defects_per_family is -1, expected an integer >= 1"),
        ("seed", -1, "seed must be a whole number from 0, got -1"),
    ],
)
def test_settings_that_make_no_set_are_errors(name: str, value: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        generate(tmp_path / "set", **SYNTHETIC | {name: value})
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "set"), "--categories", "0"]) == 1
    assert capsys.readouterr().err == "synthetic: error: categories is 0, expected an integer >= 1\n"


def test_stopped_half_way_it_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.synthetic", str(tmp_path / "set"), "--categories", "40"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not any(tmp_path.rglob("*.jpg")) and time.monotonic() < until:
        time.sleep(0.05)
    assert any(tmp_path.rglob("*.jpg")) and not (tmp_path / "set").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert not list(tmp_path.iterdir())
