"""The command: its outputs, going on after an interruption, and what it says of mistakes."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from training.evaluate import main
from training.evaluation.results import load_results


def config(values: dict[str, Any], tmp_path: Path) -> list[str]:
    """The arguments of a plan in a file."""
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["--config", str(file)]


def words(values: dict[str, Any]) -> list[str]:
    """The arguments of a plan on the command line."""
    named = [
        [f"--{name}", *(f"{k}={v}" for k, v in value.items())]
        if isinstance(value, dict)
        else [f"--{name}", *map(str, value)]
        for name, value in values.items()
        if name in ("data", "detectors", "shots")
    ]
    return [values["bundle"], "--output", values["output"], "--device", "cpu", *itertools.chain(*named)]


def test_one_command_makes_the_tables_and_the_report(
    plan_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_values["detectors"] = ["featurenorm", "patchcore", "padim"]
    before = Path(plan_values["bundle"], "README.md").read_text()
    assert main([*words(plan_values), "--export-card", plan_values["bundle"]]) == 0
    folder, out = Path(plan_values["output"]), capsys.readouterr()
    assert len(load_results(folder)) == 2 * 3 * 3
    assert out.out.strip() == (folder / "tables.md").read_text().strip()
    assert "PatchCore" in out.out
    assert "longtable" in (folder / "tables.tex").read_text()
    assert "<html" in (folder / "report.html").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {row["detector"] for row in metrics["summary"]} == {"featurenorm", "patchcore", "padim"}
    assert metrics["versions"]["anomalib"]
    card = Path(plan_values["bundle"], "README.md").read_text()
    assert "model-index" in card
    assert "model-index" not in before
    # Nothing of the libraries' own chatter: only the bar.
    assert {part.strip()[:9] for part in re.split(r"[\r\n]", out.err) if part.strip()} == {"evaluate:"}
    assert "18/18" in out.err


def test_arguments_go_before_the_file(
    plan_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_values["features"] = ["raw", "residual"]
    assert main([*config(plan_values, tmp_path), "--categories", "nut", "--features", "raw"]) == 0
    (result,) = load_results(plan_values["output"])
    assert (result.cell.category, result.cell.features) == ("nut", "raw")


def start(values: dict[str, Any], cells: int) -> subprocess.Popen[str]:
    """Starts the command and waits until some cells are finished."""
    command = [sys.executable, "-m", "training.evaluate", *words(values)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder, deadline = Path(values["output"], "cells"), time.monotonic() + 100
    while len(list(folder.glob("[!.]*.json"))) < cells:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_a_killed_run_goes_on(plan_values: dict[str, Any], tmp_path: Path) -> None:
    plan_values["detectors"] = ["featurenorm", "patchcore"]
    process = start(plan_values, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = Path(plan_values["output"])
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("cells/[!.]*.json")}
    assert 2 <= len(finished) < 12
    assert not (folder / "metrics.json").exists()
    assert main(words(plan_values)) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    whole = plan_values | {"output": str(tmp_path / "whole")}
    assert main(words(whole)) == 0
    resumed, uninterrupted = load_results(folder), load_results(whole["output"])
    assert [(one.cell, one.metrics, one.scores) for one in resumed] == [
        (one.cell, one.metrics, one.scores) for one in uninterrupted
    ]
    assert (folder / "tables.md").read_text() == Path(whole["output"], "tables.md").read_text()


def test_interrupting_leaves_tables_of_what_is_finished(plan_values: dict[str, Any]) -> None:
    plan_values["detectors"] = ["featurenorm", "patchcore", "padim"]
    process = start(plan_values, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; finished cells are in" in err
    assert "Traceback" not in err
    done = len(load_results(plan_values["output"]))
    assert 1 <= done < 18
    assert json.loads(Path(plan_values["output"], "metrics.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bundle": "nowhere/to-be-found/at-all"}, "at-all"),
        ({"data": {"mvtecad": "no-such-folder"}}, "no-such-folder"),
        ({"categories": ["screw"]}, "unknown categories screw: expected some of mvtecad: bolt, nut"),
        ({"detectors": ["svm"]}, "unknown detectors svm"),
        ({"variants": ["best"], "features": ["pretrained"]}, "best"),
        ({"shot": [1]}, "unknown settings shot"),
        ({"shots": [100]}, "100"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_mistakes_are_one_line(
    plan_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    message: str,
) -> None:
    assert main(config(plan_values | changed, tmp_path)) == 1
    err = capsys.readouterr().err.strip()
    last = err.splitlines()[-1]
    assert last.startswith("evaluate: error: ")
    assert message in last


def test_another_bundle_needs_another_output(
    plan_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], wide_folder: Path
) -> None:
    from tests.conftest import make_extractor

    few = plan_values | {"categories": ["nut"], "features": ["raw"]}
    assert main(config(few, tmp_path)) == 0
    make_extractor(wide_folder, layers=(1, 2)).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(config(few | {"bundle": str(tmp_path / "other")}, tmp_path)) == 1
    assert "choose another --output" in capsys.readouterr().err
