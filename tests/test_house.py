"""The house: rooms behind doors, imports downward only, and what an import loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "adpretrain_hf"
FILES = sorted(PACKAGE.rglob("*.py"))


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_imports_keep_to_the_floors_and_the_doors():
    """The contracts stand in setup.cfg."""
    pytest.importorskip("importlinter")
    done = python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr


def test_few_modules_lie_at_the_root():
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 14, modules


def test_no_file_is_long():
    lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {name: number for name, number in lines.items() if number > 400} == {}


def test_every_module_says_what_it_is():
    silent = [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_the_extractor_loads_neither_the_hub_nor_pushing_nor_cards():
    code = "import sys; from adpretrain_hf import ADPretrainFeatureExtractor; print(*sys.modules)"
    done = python(code)
    ours = {name.removeprefix("adpretrain_hf.") for name in done.stdout.split() if name.startswith("adpretrain_hf")}
    assert "bundle.load" in ours and "extractor" in ours
    on_request = {"hub", "quantization", "bundle.push", "bundle.card", "bundle.released", "overlays"}
    assert ours & on_request == set()
    assert {name for name in ours if name.startswith(("cli", "integrations"))} == set()
    assert {"jinja2", "yaml", "anomalib", "open_clip", "datasets", "ray"} & set(done.stdout.split()) <= {"yaml"}
