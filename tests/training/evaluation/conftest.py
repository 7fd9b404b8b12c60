"""A tiny bundle with two variants, a miniature data set, and plans on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from PIL import Image

from tests.conftest import make_extractor
from tests.tiny import SIZES
from training.evaluation.plan import Plan, parse_plan

MakePlan = Callable[..., Plan]
SIDE = 40  # pixels


def plan_of(values: dict[str, Any]) -> Plan:
    """The plan that a file of some values comes to."""
    file = Path(f"{values['output']}.yaml")
    file.write_text(yaml.safe_dump(values))
    return parse_plan(["--config", str(file)])[0]


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2 whose four levels have the 256 channels together that PaDiM draws."""
    folder = tmp_path_factory.mktemp("tiny") / "wide"
    torch.manual_seed(0)
    hf.Dinov2Model(hf.Dinov2Config(**SIZES | {"hidden_size": 64})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_variants(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny extractor as a bundle with variants "angle" and "norm"; to be read alone."""
    bundle = tmp_path_factory.mktemp("variants") / "bundle"
    for seed, variant in enumerate(("angle", "norm")):
        extractor = make_extractor(wide_folder, seed=seed)
        extractor.variant = variant
        extractor.save_pretrained(bundle)
    return bundle


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in MVTecAD's layout, of coloured noise, with a bright square where it is anomalous; to be read alone.

    Its categories "bolt" and "nut" have 6 images to train on each, and 3 normal and 4 anomalous ones to test on.
    """
    root, random = tmp_path_factory.mktemp("mvtecad") / "tree", np.random.default_rng(0)
    for number, category in enumerate(("bolt", "nut")):
        colour = np.array([60 + 60 * number, 120, 90])
        for place in range(6):
            _save(root / category / "train/good" / f"{place:03}.png", _normal(random, colour))
        for place in range(3):
            _save(root / category / "test/good" / f"{place:03}.png", _normal(random, colour))
        for place in range(4):
            pixels, mask = _normal(random, colour), np.zeros((SIDE, SIDE), dtype=np.uint8)
            top, left = random.integers(4, SIDE - 20, 2)
            mask[top : top + 14, left : left + 14] = 255
            pixels[mask > 0] = random.integers(150, 256, 3)
            _save(root / category / "test/dent" / f"{place:03}.png", pixels)
            _save(root / category / "ground_truth/dent" / f"{place:03}_mask.png", mask)
    return root


def _normal(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return (colour + random.integers(0, 40, (SIDE, SIDE, 3))).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def plan_values(two_variants: Path, small_tree: Path, tmp_path: Path) -> dict[str, Any]:
    """A small plan on a miniature data set: one detector, two categories, three kinds of features."""
    return {
        "bundle": str(two_variants),
        "data": {"mvtecad": str(small_tree)},
        "output": str(tmp_path / "run"),
        "detectors": ["featurenorm"],
        "shots": [3],
        "device": "cpu",
    }


@pytest.fixture
def make_plan(plan_values: dict[str, Any]) -> MakePlan:
    """Makes the small plan, with other values in some places."""
    return lambda **others: plan_of(plan_values | others)
