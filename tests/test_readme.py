"""README and docs: their code runs, what comments say of shapes is so, commands are understood, names exist."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adpretrain_hf.cli import build_parser, main
from tests.conftest import BUNDLE, ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md"]
TRAINING = ROOT / "training" / "README.md"
SHAPE = r"\((\d+(?:, ?\d+)*),?\)"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    text = "\n".join(blocks(page, "bash")).replace("\\\n", "")
    return [line.partition("  #")[0] for line in text.splitlines()]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The repository's data in a folder that may be written to."""
    for folder in ("hub_cards", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Python


class ShapeComments(ast.NodeTransformer):
    """Gives the value of every statement that ends in a comment to a function ``check``, with the comment."""

    def __init__(self, block: str) -> None:
        self.comments = {number: line.partition("  # ")[2] for number, line in enumerate(block.splitlines(), start=1)}

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return self._checked(node, node.value)

    def visit_Assign(self, node: ast.Assign) -> Any:
        target = node.targets[0]
        if not isinstance(target, ast.Name):
            return node
        return [node, self._checked(ast.Expr(ast.Constant(None)), ast.Name(target.id, ast.Load()), node.end_lineno)]

    def _checked(self, node: ast.Expr, value: ast.expr, line: int | None = None) -> ast.Expr:
        comment = self.comments[line or node.end_lineno]
        call = ast.Call(ast.Name("check", ast.Load()), [value, ast.Constant(comment)], [])
        return ast.Expr(call) if comment else node


def shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def check_shapes(value: Any, comment: str) -> bool:
    """Compares a value with the shapes in a comment, and says whether there are any.

    ``(3, 4)`` at its beginning is the value's own, ``"layer2": (3, 4)`` of an entry, ``.maps (3, 4)`` of an attribute.
    """
    found = [(value[key], text) for key, text in re.findall(rf'"(\w+)": {SHAPE}', comment)]
    found += [(getattr(value, attribute), text) for attribute, text in re.findall(rf"\.(\w+) {SHAPE}", comment)]
    found += [(value, text) for text in re.findall(rf"^{SHAPE}", comment)]
    for one, text in found:
        assert (one if isinstance(one, tuple) else tuple(one.shape)) == shape(text), comment
    return bool(found)


def run_blocks(page: Path) -> set[str]:
    """Runs a page's Python blocks one after the other, and returns the comments whose shapes were compared."""
    compared = set()

    def check(value: Any, comment: str) -> None:
        if check_shapes(value, comment):
            compared.add(comment)

    names: dict[str, Any] = {"check": check}
    for number, block in enumerate(blocks(page, "python"), start=1):
        tree = ast.fix_missing_locations(ShapeComments(block).visit(ast.parse(block)))
        exec(compile(tree, f"{name(page)}, block {number}", "exec"), names)
    return compared


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run_one_after_the_other(page, checkout):
    comments = re.findall(r"  # (.*)", "".join(blocks(page, "python")))
    assert run_blocks(page) == {comment for comment in comments if re.search(SHAPE, comment)}
    assert_ignored([path.name + "/" * path.is_dir() for path in checkout.iterdir() if not path.is_symlink()])


def test_card_of_the_embedded_bundle_runs(checkout):
    for block in blocks(BUNDLE / "README.md", "python"):
        exec(compile(block, "model card", "exec"), {})


def test_code_comes_by_line_ten_and_all_in_less_than_two_hundred():
    text = README.read_text(encoding="utf-8")
    assert text[: text.index("```python")].count("\n") < 10
    assert text.count("\n") < 200


# Commands


@pytest.mark.parametrize("page", [*PAGES, TRAINING], ids=name)
def test_commands_are_understood(page):
    for line in commands(page):
        if line.startswith("adpretrain "):
            build_parser().parse_args(shlex.split(line)[1:])
        for extra in re.findall(r"pip install .*\.\[(.*)\]", line):
            assert set(extra.split(",")) <= extras(), line
        for module in re.findall(r"python -m ((?:training|tests|adpretrain_hf)\S*)", line):
            assert importlib.util.find_spec(module), line
        for target in re.findall(r"^make ([\w-]+)", line):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), line


def extras() -> set[str]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return set(settings["options.extras_require"])


def test_commands_on_the_repositorys_data_run_as_printed(checkout, capsys):
    here = ("hub_cards/", "gravel.safetensors")
    run = [line for line in commands(ROOT / "docs" / "command_line.md") if any(name in line for name in here)]
    assert [line.split()[1] for line in run] == ["score", "reference", "info", "reference", "extract", "info"]
    assert set(run) >= {line for line in commands(README) if line.startswith("adpretrain ")}
    for line in run:
        assert main(shlex.split(line)[1:]) == 0, line
    assert len((checkout / "results" / "scores.csv").read_text().splitlines()) == 12
    assert len(list((checkout / "features").rglob("*.safetensors"))) == 11
    assert "category='gravel'" in capsys.readouterr().out


@pytest.mark.slow
def test_readme_says_what_the_demo_says(checkout, capsys):
    assert main(["demo", "--image-size", "224"]) == 0
    out = capsys.readouterr().out
    caught = dict(re.findall(r"(\w+): normal images score up to .*; (\d+ of \d+) defective", out))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"here {caught['gravel']} are, on brick {caught['brick']}, on grass {caught['grass']} (" in text
    assert f"which reach {re.findall('gravel: normal images score up to ([0-9.]+);', out)[0]}:" in text


def test_what_commands_leave_is_ignored():
    text = "\n".join(line for page in [*PAGES, TRAINING] for line in commands(page))
    outputs = {output for output in re.findall(r"--output (\S+)", text) if not output.startswith("/")}
    assert len(outputs) > 5
    assert_ignored([output if Path(output).suffix else output.rstrip("/") + "/" for output in outputs])


def assert_ignored(names: list[str]) -> None:
    """Checks that git ignores all of these at the root of the repository, wherever there is git."""
    if names and shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "check-ignore", "--no-index", *names]
        ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        assert ignored == names


# Names


def tree() -> dict[str, str]:
    """The files and folders of README's tree, with what it says of them."""
    (text,) = (block for block in blocks(README, "text") if block.startswith("adpretrain_hf/"))
    found, folder = {}, ""
    for line in text.splitlines():
        indent, path, about = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folder = folder if indent else path
        found[f"{folder}{path}" if indent else path] = about
    return found


def test_tree_names_every_file_and_room_of_the_package_and_nothing_else():
    found = tree()
    package = {path.name + "/" * path.is_dir() for path in (ROOT / "adpretrain_hf").iterdir()}
    package -= {"__init__.py", "__pycache__/", "py.typed"}
    docs = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".py")}
    expected = {f"adpretrain_hf/{path}" for path in package} | {f"docs/{path}" for path in docs}
    expected |= {"adpretrain_hf/", "training/", "hub_cards/", "tests/", "docs/"}
    assert sorted(expected - set(found)) == []
    for path, about in found.items():
        assert about, path
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", [*PAGES, TRAINING, ROOT / "CHANGELOG.md", ROOT / "BENCHMARKS.md"], ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([\w./]+)`", text) if "/" in path or path.endswith((".py", ".cfg", ".md"))}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    names = re.findall(r"`(\w+)`\s(?:of|in)\s`([\w./]+\.py)`", text)
    assert len(names) > 5
    assert [name for name, path in names if name not in (ROOT / path).read_text(encoding="utf-8")] == []


# Pictures and weights


def test_picture_is_what_its_script_draws(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))
    script["main"](tmp_path / "picture.jpg")
    with Image.open(tmp_path / "picture.jpg") as again, Image.open(ROOT / "docs" / "picture.jpg") as kept:
        assert again.size == kept.size
        assert np.abs(np.asarray(again, dtype=float) - np.asarray(kept, dtype=float)).mean() < 2
    assert (ROOT / "docs" / "picture.jpg").stat().st_size < 300e3


def test_embedded_bundle_is_small_enough():
    sizes = [path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()]
    assert sum(sizes) < 64e6
    assert max(sizes) < 50e6


def test_photographs_are_small_enough():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "photos").rglob("*") if path.is_file()) < 3e6
