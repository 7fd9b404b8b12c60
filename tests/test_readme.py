"""The README's code runs, and what its comments say of shapes is so."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from adpretrain_hf.cli import build_parser
from tests.conftest import BUNDLE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (BUNDLE / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The repository's data in a folder that may be written to."""
    for name in ("hub_cards", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_blocks_run_one_after_the_other(checkout):
    names: dict = {}
    for number, block in enumerate(blocks(README, "python")):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
        if number == 0:
            shapes = {layer: tuple(maps.shape) for layer, maps in names["features"].items()}
            assert shapes == {f"layer{n}": (3, 384, 16, 16) for n in (2, 5, 8)}
            assert tuple(names["images"].shape) == (3, 3, 224, 224)
            assert tuple(names["result"].maps.shape) == (3, 102, 102)
            assert tuple(names["result"].scores.shape) == (3,)
    assert tuple(names["features"]["layer8"].shape) == (384, 16, 16)
    assert tuple(names["whole"].preprocess("tests/photos/gravel/test/wire/002.jpg").shape) == (1, 3, 308, 224)
    assert (checkout / "my-bundle" / "config.json").is_file()


def test_card_of_the_embedded_bundle_runs(checkout):
    for block in blocks(CARD, "python"):
        exec(compile(block, "model card", "exec"), {})


def test_code_comes_by_line_ten():
    assert README[: README.index("```python")].count("\n") < 10


def test_commands_are_understood():
    text = "\n".join(blocks(README, "bash")).replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("adpretrain ")]
    assert len(lines) == 7
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])


def test_make_targets_exist():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(README, "bash"):
        for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
            assert f"\n{target}:" in makefile


def test_embedded_bundle_is_small_enough():
    sizes = [path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()]
    assert sum(sizes) < 64e6
    assert max(sizes) < 50e6


def test_photographs_are_small_enough():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "photos").rglob("*") if path.is_file()) < 3e6
