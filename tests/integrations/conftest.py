"""Fixtures of the integrations' tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import make_extractor


@pytest.fixture(scope="session")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of two variants, ``angle`` and ``norm``, with different projectors; to be read only."""
    return save_two_variants(tiny_folder, tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be changed."""
    return shutil.copytree(bundle, tmp_path / "own_bundle")


def save_two_variants(backbone: Path, folder: Path, **settings: object) -> Path:
    """Saves a bundle with the variants ``angle`` and ``norm`` of different projectors."""
    for seed, variant in ((1, "angle"), (2, "norm")):
        extractor = make_extractor(backbone, seed=seed, **settings)
        extractor.variant = variant
        extractor.save_pretrained(folder)
    return folder
