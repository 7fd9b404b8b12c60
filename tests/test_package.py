"""What importing and installing the package does."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys

import pytest
import tomllib

import adpretrain_hf
from tests.conftest import ROOT


def python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_import_is_lazy():
    heavy = python(
        "import adpretrain_hf, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_the_extractor_does_not_import_optional_packages():
    code = (
        "import sys; from adpretrain_hf import ADPretrainFeatureExtractor; print([m for m in {} if m in sys.modules])"
    )
    optional = ("open_clip", "anomalib", "datasets", "training", "timm")
    assert python(code.format(optional)).strip() == "[]"


def test_public_names():
    assert set(adpretrain_hf.__all__) <= set(dir(adpretrain_hf))
    for name in adpretrain_hf.__all__:
        assert getattr(adpretrain_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = adpretrain_hf.nothing


def test_only_the_package_is_installed():
    import setuptools

    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    include = settings["options.packages.find"]["include"].split()
    assert setuptools.find_packages(str(ROOT), include=include) == ["adpretrain_hf"]


def test_core_dependencies_are_few():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    names = [line.split(">")[0] for line in settings["options"]["install_requires"].split("\n") if line]
    assert names == ["torch", "transformers", "huggingface-hub", "safetensors", "pillow", "numpy"]


def test_pyproject_holds_the_build_system_alone():
    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text())) == ["build-system"]
