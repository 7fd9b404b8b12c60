"""What importing and installing the package does."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

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


def test_the_wheel_holds_the_package_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "adpretrain_hf", source / "adpretrain_hf")
    for other in ("training", "tests", "hub_cards"):
        (source / other).mkdir()
        (source / other / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"adpretrain_hf"}
    assert {"adpretrain_hf/py.typed", "adpretrain_hf/extractor.py"} <= set(names)
    assert "adpretrain_hf/bundle/card_template.md" in names


def test_core_dependencies_are_few():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    names = [line.split(">")[0] for line in settings["options"]["install_requires"].split("\n") if line]
    assert names == ["torch", "transformers", "huggingface-hub", "safetensors", "pillow", "numpy"]


def test_pyproject_holds_the_build_system_alone():
    tables = re.findall(r"^\[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert tables == ["build-system"]
