"""The benchmarks' own parts: the published form gives what the package gives, and rows say what was measured."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from adpretrain_hf import ReferenceBank
from tests.benchmarks import __main__ as program
from tests.benchmarks.published import PublishedProjectors, encode_references, published_residual
from tests.benchmarks.rows import at_least, at_most, table
from tests.benchmarks.timing import side_by_side
from tests.conftest import ROOT


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_published_form_gives_the_same_features(extractor, need_weights):
    images, references = torch.randn(2, 3, 3, 32, 32)
    expected = list(extractor(images, references=references).values())
    patches = encode_references(extractor.encode, references)
    residuals = [published_residual(*pair) for pair in zip(extractor.encode(images), patches, strict=True)]
    for residual, level in zip(residuals, ReferenceBank(patches).residuals(extractor.encode(images)), strict=True):
        assert torch.equal(residual, level)
    for got, level in zip(PublishedProjectors(extractor.projectors, need_weights)(residuals), expected, strict=True):
        torch.testing.assert_close(got, level, atol=1e-5, rtol=1e-5)


def test_rows_say_whether_their_goal_is_reached():
    assert [at_least(4, "", "", "", ratio).reached for ratio in (3.99, 4, 5)] == [False, True, True]
    assert [at_most(1.25, "", "", "", ratio).reached for ratio in (1.2, 1.25, 1.26)] == [True, True, False]
    assert at_least(4, "projector", "1 s", "3 s", 3.0).cells() == (
        "projector",
        "1 s",
        "3 s",
        "3",
        "at least 4",
        "**no**",
    )
    assert table([("a", "b")], ("x", "y")) == "| x | y |\n| --- | --- |\n| a | b |"


def test_calls_are_timed_in_turn():
    calls: list[str] = []
    seconds = side_by_side(lambda: calls.append("ours"), lambda: calls.append("other"), repeats=2)
    assert calls == ["ours", "other"] * 3
    assert len(seconds) == 2 and all(taken >= 0 for taken in seconds)


def test_a_new_table_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    path.write_text("before\n<!-- table begins -->\nold\n<!-- table ends -->\nafter\n")
    program._put_between_marks(path, "new\n")
    assert path.read_text() == "before\n<!-- table begins -->\n\nnew\n\n<!-- table ends -->\nafter\n"


def test_the_kept_table_has_a_row_of_every_benchmark():
    text = (ROOT / "BENCHMARKS.md").read_text()
    for name in program.NAMES:
        assert f"`python -m tests.benchmarks.bench_{name}`" in text
        assert (ROOT / f"tests/benchmarks/bench_{name}.py").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "tests/benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path):
    assert import_module(f"tests.benchmarks.{path.stem}").__doc__


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "projectors"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "unknown benchmarks ['projectors'], expected some of projector, extraction" in capsys.readouterr().err
