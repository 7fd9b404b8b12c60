"""The command: its outputs, going on after an interruption, and what it says of mistakes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from tests.conftest import ROOT, make_extractor
from tests.processes import kill, start
from training.evaluate import main
from training.evaluation.detectors import PatchCore, check_settings
from training.evaluation.plan import chosen_categories, parse_plan
from training.evaluation.store import load_failures, load_results
from training.evaluation.tables import misses


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
        if name in ("data", "detectors", "shots", "features", "epochs", "fraction")
    ]
    return [values["bundle"], "--output", values["output"], "--device", "cpu", *itertools.chain(*named)]


@pytest.fixture(scope="module")
def whole(
    two_variants: Path, small_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, str]:
    """A plan of two detectors that one command ran to its end and into the bundle's card; what it printed and said."""
    folder = tmp_path_factory.mktemp("whole")
    values = {
        **{"bundle": str(shutil.copytree(two_variants, folder / "bundle")), "output": str(folder / "run")},
        **{"data": {"mvtecad": str(small_tree)}, "detectors": ["featurenorm", "patchcore"], "shots": [3]},
    }
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*words(values), "--export-card", values["bundle"]]) == 0
    return values, out.getvalue(), err.getvalue()


def test_one_command_makes_the_tables_and_the_report(
    whole: tuple[dict[str, Any], str, str], two_variants: Path
) -> None:
    values, out, err = whole
    folder = Path(values["output"])
    assert len(load_results(folder)) == 2 * 2 * 3
    assert out.strip() == (folder / "tables.md").read_text().strip()
    assert "PatchCore" in out
    assert "longtable" in (folder / "tables.tex").read_text()
    report = (folder / "report.html").read_text()
    assert "Image AUROC by kind of defect" in report
    missed = [one for one in load_results(folder) if misses(one)]
    assert ("Missed where 5 % of the normal images are rejected" in report) == bool(missed)
    assert "pixel AUROC " in report
    assert "<html" in report and f"Bundle <code>{values['bundle']}</code>, 20" in report
    assert f"<code>python -m training.evaluate {values['bundle']} --output" in report and "anomalib 2." in report
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {row["detector"] for row in metrics["summary"]} == {"featurenorm", "patchcore"}
    assert metrics["versions"]["anomalib"]
    assert "model-index" in Path(values["bundle"], "README.md").read_text()
    assert "model-index" not in (two_variants / "README.md").read_text()
    # Nothing of the libraries' own chatter: only the bar.
    assert {part.strip()[:9] for part in re.split(r"[\r\n]", err) if part.strip()} == {"evaluate:"}
    assert "12/12" in err


def test_arguments_go_before_the_file(
    plan_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_values["features"] = ["raw", "residual"]
    assert main([*config(plan_values, tmp_path), "--categories", "nut", "--features", "raw"]) == 0
    (result,) = load_results(plan_values["output"])
    assert (result.cell.category, result.cell.features) == ("nut", "raw")


def start_until(values: dict[str, Any], cells: int, stderr: Path) -> BaseProcess:
    """Starts the command and waits until some cells are finished."""
    process = start(main, words(values), stderr=stderr)
    folder, deadline = Path(values["output"], "cells"), time.monotonic() + 100
    while len(list(folder.glob("[!.]*.json"))) < cells:
        assert process.is_alive(), stderr.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_a_killed_run_goes_on(
    plan_values: dict[str, Any], whole: tuple[dict[str, Any], str, str], tmp_path: Path
) -> None:
    plan_values["detectors"] = ["featurenorm", "patchcore"]
    kill(start_until(plan_values, 2, tmp_path / "stderr.txt"))
    folder, uninterrupted = Path(plan_values["output"]), Path(whole[0]["output"])
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("cells/[!.]*.json")}
    assert 2 <= len(finished) < 12
    assert not (folder / "metrics.json").exists()
    assert main(words(plan_values)) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    first, second = (
        [(one.cell, one.metrics, one.scores) for one in load_results(one)] for one in (folder, uninterrupted)
    )
    assert first == second
    assert (folder / "tables.md").read_text() == (uninterrupted / "tables.md").read_text()


def test_interrupting_leaves_tables_of_what_is_finished(plan_values: dict[str, Any], tmp_path: Path) -> None:
    endless = {"detectors": ["featurenorm", "glass"], "features": ["raw"], "epochs": {"glass": 10**6}}
    process = start_until(plan_values | endless, 1, tmp_path / "stderr.txt")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    err = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 130, err
    assert "evaluate: stopped; the same command goes on from here" in err
    assert "Traceback" not in err
    assert len(load_results(plan_values["output"])) == 1
    assert json.loads(Path(plan_values["output"], "metrics.json").read_text())["summary"]


def test_a_detector_that_fails_costs_its_own_cells_alone_and_is_tried_again(
    plan_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plan_values |= {"detectors": ["featurenorm", "patchcore"], "features": ["raw"]}
    whole = PatchCore.fit

    def out_of_memory(detector: PatchCore, features: list[Tensor]) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 51 GiB")

    monkeypatch.setattr(PatchCore, "fit", out_of_memory)
    assert main(words(plan_values)) == 1
    folder = Path(plan_values["output"])
    out, err = capsys.readouterr()
    assert f"evaluate: 2 cells failed, see {folder}/failed:\n  mvtecad__bolt__patchcore__raw__-__3" in err
    assert "## Cells that failed" in out and "RuntimeError: CUDA out of memory. Tried to allocate 51 GiB" in out
    assert {result.cell.detector for result in load_results(folder)} == {"featurenorm"}
    failures = load_failures(folder)
    assert {cell.detector for cell in failures} == {"patchcore"} and len(failures) == 2
    assert list(json.loads((folder / "metrics.json").read_text())["failures"]) == [cell.name for cell in failures]
    assert "RuntimeError: CUDA out of memory" in (folder / "report.html").read_text()
    assert "patchcore__raw" in caplog.text and "out of memory" in caplog.text
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("cells/[!.]*.json")}

    monkeypatch.setattr(PatchCore, "fit", whole)
    assert main(words(plan_values)) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert len(load_results(folder)) == 4 and load_failures(folder) == {}
    assert "Cells that failed" not in capsys.readouterr().out + (folder / "report.html").read_text()
    assert "failures" not in json.loads((folder / "metrics.json").read_text())


def test_too_few_images_for_a_detector_cost_its_own_cells_alone(plan_values: dict[str, Any]) -> None:
    plan_values |= {"detectors": ["padim", "featurenorm"], "features": ["raw"], "fraction": [0.1]}  # of 6 images
    assert main(words(plan_values)) == 1
    assert {result.cell.detector for result in load_results(plan_values["output"])} == {"featurenorm"}
    failures = load_failures(plan_values["output"])
    assert set(failures.values()) == {"InputError: got 1 normal image, expected at least 2: a covariance needs them"}


def test_a_detectors_own_settings_are_given_by_name(
    plan_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan_values |= {"detectors": ["patchcore", "anomalib_patchcore"], "features": ["raw"]}
    assert main(words(plan_values)) == 0
    given = ("--set", "patchcore.coreset_sampling_ratio=0.5", "anomalib_patchcore.num_neighbors=3")
    capsys.readouterr()
    assert main([*words(plan_values), *given]) == 1  # not beside results of others
    assert "holds results of something else (settings of patchcore" in capsys.readouterr().err
    other = plan_values | {"output": f"{plan_values['output']}-other"}
    assert main([*words(other), *given]) == 0
    decided = json.loads(Path(other["output"], "plan.json").read_text())["decided by"]
    assert decided["settings of patchcore"] == {"coreset_sampling_ratio": 0.5}
    assert decided["settings of anomalib_patchcore"] == {"num_neighbors": 3}
    plain, changed = (load_results(one["output"]) for one in (plan_values, other))
    assert [one.cell for one in plain] == [one.cell for one in changed]
    assert all(one.scores != another.scores for one, another in zip(plain, changed, strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("patchcore.coreset=0.5", "patchcore has no setting coreset: expected some of width, coreset_sampling_ratio, "),
        ("patchcore.variant=norm", "patchcore has no setting variant"),
        ("nothing.a=1", "unknown detectors nothing"),
        ("patchcore.coreset_sampling_ratio=-1", "coreset_sampling_ratio is -1, expected a number in (0, 1]"),
        ("patchcore.coreset_sampling_ratio=half", "coreset_sampling_ratio is 'half', expected a number"),
        ("patchcore.width=0", "width is 0, expected an integer >= 1"),
        ("patchcore.seed=x", "seed is 'x', expected a whole number"),
        ("padim.regularization=abc", "regularization is 'abc', expected a number > 0"),
        ("padim.regularization=-1", "regularization is -1, expected a number > 0"),
        ("anomalib_patchcore.levels=[99]", "levels are [99], expected some of [1, 2, 3, 4]"),
        ("anomalib_padim.n_features=100000", "n_features is 100000, expected a number from 1 to the levels'"),
    ],
)
def test_settings_that_there_are_not_are_refused_before_the_first_result(
    plan_values: dict[str, Any], capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    plan_values["detectors"] = ["featurenorm", "patchcore", "padim", "anomalib_patchcore", "anomalib_padim"]
    assert main([*words(plan_values), "--set", setting]) == 1
    assert message in capsys.readouterr().err
    assert not load_results(plan_values["output"])


def test_settings_of_detectors_that_are_not_run_are_told(
    plan_values: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_values |= {"detectors": ["featurenorm"], "features": ["raw"]}
    assert main([*words(plan_values), "--set", "patchcore.width=3"]) == 0
    assert "settings of patchcore are not used: not among --detectors" in caplog.text
    assert main([*words(plan_values), "--epochs", "padim=3"]) == 1
    assert "epochs of padim: it is fitted in one pass, expected none" in capsys.readouterr().err


def test_values_by_name_add_up_that_are_given_twice_or_in_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    own = {"patchcore": {"width": 256, "seed": 3}, "padim": {"regularization": 0.5}}
    file.write_text(yaml.safe_dump({"data": {"mvtecad": "a"}, "output": "b", "bundle": "c", "set": own}))
    flags = ["--set", "patchcore.width=512", "--data", "visa=d", "--set", "patchcore.projected=9", "--data", "btad=e"]
    plan, _ = parse_plan(["--config", str(file), *flags])
    assert plan.set == {"patchcore": {"width": 512, "seed": 3, "projected": 9}, "padim": {"regularization": 0.5}}
    assert plan.data == {"visa": "d", "btad": "e"}


def test_the_report_names_every_command_that_results_are_of(plan_values: dict[str, Any]) -> None:
    for detector in ("featurenorm", "patchcore"):
        assert main(words(plan_values | {"detectors": [detector], "features": ["raw"]})) == 0
    report = Path(plan_values["output"], "report.html").read_text()
    assert all(f"--detectors {detector}" in report for detector in ("featurenorm", "patchcore"))
    made_by = load_results(plan_values["output"])[0].made_by
    assert list(made_by) == ["bundle", "protocol", "command", "date", "versions"]
    assert made_by["date"] in report and made_by["protocol"] == "full"


def test_the_example_of_a_plan_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan, _ = parse_plan(["--config", "training/evaluation/example_plan.yaml"])
    assert [name for name, root in chosen_categories(plan).items()] == ["folder"]
    for detector, settings in plan.set.items():
        check_settings(detector, settings)


def test_the_module_is_a_program(
    plan_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *words(plan_values | {"shots": [100]})])
    monkeypatch.delitem(sys.modules, "training.evaluate")
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("training.evaluate", run_name="__main__")
    assert "evaluate: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bundle": "nowhere/to-be-found/at-all"}, "at-all"),
        ({"data": {"mvtecad": "no-such-folder"}}, "no-such-folder"),
        ({"categories": ["screw"]}, "unknown categories screw: expected some of mvtecad: bolt, nut"),
        ({"detectors": ["svm"]}, "unknown detectors svm"),
        ({"variants": ["best"], "features": ["pretrained"]}, "best"),
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
    few = plan_values | {"categories": ["nut"], "features": ["raw"]}
    assert main(config(few, tmp_path)) == 0
    make_extractor(wide_folder, layers=(1, 2)).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(config(few | {"bundle": str(tmp_path / "other")}, tmp_path)) == 1
    assert "choose another --output" in capsys.readouterr().err
