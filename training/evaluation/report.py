"""The report: tables, plots and maps of a run in one HTML file that needs nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from training.evaluation.figures import scatter_figure, scores_figure, strips
from training.evaluation.plan import FEATURES, Cell, read_origin
from training.evaluation.store import PatchSample, Result, load_failures, load_patches, load_results, load_shown
from training.evaluation.tables import DataSetTables, data_set_tables, features_name, misses, proper_name, settings_text


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` from the finished cells of a run.

    Args:
        folder: of the run.

    Returns:
        The report's path.

    Raises:
        InputError: no cell is finished.
        BundleError: a file of the run is damaged.
    """
    results, samples = load_results(folder), load_patches(folder)
    if not results:
        raise InputError(f"{folder} has no finished cells: there is nothing to report, run some first")
    # Also what comes from names of files is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    asked = (proper_name, features_name, settings_text, misses, load_shown, strips, scores_figure, scatter_figure)
    text = environment.get_template("report_template.html").render(
        folder=folder,
        results=results,
        sections=[_section(tables, results, samples) for tables in data_set_tables(results)],
        origin=read_origin(folder),
        failures=load_failures(folder),
        **{one.__name__: one for one in asked},
    )
    path = Path(folder, "report.html")
    write_text(path, text)
    return path


def _section(tables: DataSetTables, results: Sequence[Result], samples: Sequence[PatchSample]) -> dict[str, Any]:
    """What the template shows of a data set: by detector and settings all results, and by class the plainest ones."""
    results = [result for result in results if result.cell.data_set == tables.data_set]
    samples = [sample for sample in samples if sample.data_set == tables.data_set]
    detectors: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        cell = result.cell
        detectors[cell.detector, cell.shots, cell.noise, cell.fraction].append(result)
    classes = {
        name: {
            "results": _plainest([result for result in results if result.cell.category == name]),
            "samples": sorted((sample for sample in samples if sample.category == name), key=_place),
        }
        for name in tables.classes
    }
    several = len({key[1:] for key in detectors}) > 1
    return {"tables": tables, "detectors": sorted(detectors.items()), "several": several, "classes": classes}


def _plainest(results: Sequence[Result]) -> list[Result]:
    """Of every detector and kind of features the result of the plainest settings: most references, least noise."""
    plain = sorted(results, key=lambda one: (one.cell.shots, -one.cell.noise, one.cell.fraction, -one.cell.seed))
    chosen = {(one.cell.detector, *_place(one.cell)): one for one in plain}  # the last one of each
    return [chosen[key] for key in sorted(chosen)]


def _place(one: Cell | PatchSample) -> tuple[int, str]:
    return FEATURES.index(one.features), one.variant  # the paper's order
