"""A tiny bundle with two variants, and plans on a miniature data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.conftest import make_extractor
from tests.tiny import SIZES
from tests.training.evaluation.small_tree import make_tree
from training.evaluation.plan import Plan

MakePlan = Callable[..., Plan]


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2 whose four levels have the 256 channels together that PaDiM draws."""
    folder = tmp_path_factory.mktemp("tiny") / "wide"
    torch.manual_seed(0)
    hf.Dinov2Model(hf.Dinov2Config(**SIZES | {"hidden_size": 64})).save_pretrained(folder)
    return folder


@pytest.fixture
def two_variants(wide_folder: Path, tmp_path: Path) -> Path:
    """A tiny extractor as a bundle with variants "angle" and "norm"."""
    for seed, variant in enumerate(("angle", "norm")):
        extractor = make_extractor(wide_folder, seed=seed)
        extractor.variant = variant
        extractor.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def plan_values(two_variants: Path, tmp_path: Path) -> dict[str, Any]:
    """A small plan on a miniature data set: one detector, two categories, three kinds of features."""
    return {
        "bundle": str(two_variants),
        "data": {"mvtecad": str(make_tree(tmp_path / "tree"))},
        "output": str(tmp_path / "run"),
        "detectors": ["featurenorm"],
        "shots": [3],
        "device": "cpu",
    }


@pytest.fixture
def make_plan(plan_values: dict[str, Any]) -> MakePlan:
    """Makes the small plan, with other values in some places."""
    return lambda **others: Plan.from_values(plan_values | others)
