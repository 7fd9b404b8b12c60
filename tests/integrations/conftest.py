"""Fixtures of the integrations' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.conftest import make_extractor


@pytest.fixture
def bundle(tiny_folder: Path, extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> Path:
    """A tiny bundle of two variants, ``angle`` and ``norm``, with different projectors."""
    extractor.save_pretrained(tmp_path / "bundle")
    other = make_extractor(tiny_folder, seed=2)
    other.variant = "norm"
    other.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"
