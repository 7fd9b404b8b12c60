"""Ray Data: scores and features from an actor pool of two workers on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from adpretrain_hf.images import list_images
from adpretrain_hf.integrations.ray import ADPretrainFeatures, ADPretrainScores
from tests.conftest import ROOT, random_image

ray = pytest.importorskip("ray")


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


def test_missing_column(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"the batch has no column 'bytes', only \['image'\]: give its name"):
        ADPretrainScores(**arguments)({"image": np.zeros((1, 32, 32, 3), dtype=np.uint8)})


# Two workers


@pytest.fixture
def two_workers() -> Iterator[None]:
    """A Ray of two CPUs, whose workers import this checkout."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    here = {"address": "local", "num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    ray.init(**here, runtime_env={"env_vars": variables})
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120
    yield
    ray.shutdown()


def readme_recipe(changes: dict[str, str]) -> str:
    (recipe,) = re.findall(
        r"```text\n(import ray\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for there, here in changes.items():
        assert recipe.count(there) == 1
        recipe = recipe.replace(there, here)
    return recipe


def test_readme_recipe_gives_the_scores_of_the_extractor(
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
    exec(compile(readme_recipe(changes), "README.md", "exec"), {"Where": Where})
    rows = {row["path"]: row for row in ray.data.read_parquet(str(tmp_path / "scores")).take_all()}
    assert {path: row["score"] for path, row in rows.items()} == pytest.approx(expected, abs=1e-5)
    assert rows[next(iter(rows))].keys() == {"path", "score", "error", "pid", "code", *extractor.layers}
    assert {row["error"] for row in rows.values()} == {""}
    assert {row["code"] for row in rows.values()} == {str(ROOT / "adpretrain_hf" / "__init__.py")}
    assert os.getpid() not in {row["pid"] for row in rows.values()}
    path = str(image_folder / "1.png")
    for layer, maps in extractor(path).items():
        torch.testing.assert_close(torch.tensor(rows[path][layer]), maps[0], rtol=0, atol=1e-5)
