"""The report: tables, plots and maps of a run in one HTML file that needs nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from training.evaluation.cells import FEATURES, Cell
from training.evaluation.decisions import misses
from training.evaluation.figures import Kind, histogram_figure, roc_figure
from training.evaluation.map_strips import Strip, strips
from training.evaluation.names import SETTINGS, detector_name, features_name, settings_text
from training.evaluation.patch_plots import PatchPlot, patch_plots
from training.evaluation.plan_file import read_origin
from training.evaluation.results import Result, load_failures, load_patches, load_results, load_shown
from training.evaluation.tables import DataSetTables, data_set_tables

REPORT = "report.html"
_TEMPLATE = "report_template.html"
# Above so many groups of maps, half of them are left out: 250 groups of four strips are some 10 MB.
_MANY_GROUPS = 250


@dataclass(frozen=True)
class DetectorPlots:
    """What a detector makes of the images of a data set, under settings that are named where there are several."""

    title: str
    settings: str
    roc: str
    histograms: str


@dataclass(frozen=True)
class Maps:
    """The best and worst maps of a cell, whose settings are named where there are several."""

    detector: str
    features: str
    settings: str
    strips: list[Strip]


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
    results = load_results(folder)
    if not results:
        raise InputError(f"{folder} has no finished cells: there is nothing to report, run some first")
    maps, patches = _maps(folder, results), patch_plots(load_patches(folder))
    # Also what comes from names of files is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sections = [_section(tables, results, maps, patches) for tables in data_set_tables(results)]
    text = environment.get_template(_TEMPLATE).render(
        sections=sections, facts=_facts(results), origin=read_origin(folder), failures=load_failures(folder)
    )
    path = Path(folder, REPORT)
    write_text(path, text)
    return path


def _facts(results: Sequence[Result]) -> dict[str, str]:
    cells = [result.cell for result in results]
    return {
        "data sets": str(len({cell.data_set for cell in cells})),
        "classes": str(len({(cell.data_set, cell.category) for cell in cells})),
        "detectors": str(len({cell.detector for cell in cells})),
        "finished cells": str(len(cells)),
        "hours of computing": f"{sum(result.seconds for result in results) / 3600:.2g}",
    }


def _section(
    tables: DataSetTables,
    results: Sequence[Result],
    maps: Mapping[tuple[str, str], list[Maps]],
    patches: Mapping[tuple[str, str], PatchPlot],
) -> dict[str, Any]:
    """All that is shown of a data set."""
    ours = [result for result in results if result.cell.data_set == tables.data_set]
    classes = [
        {
            "name": name,
            "table": table,
            "kinds": tables.kinds[name],
            "misses": _misses([one for one in ours if one.cell.category == name]),
            "maps": maps[tables.data_set, name],
            "patches": patches.get((tables.data_set, name)),
        }
        for name, table in tables.classes.items()
    ]
    return {"tables": tables, "detectors": _detector_plots(ours), "classes": classes}


def _misses(results: Sequence[Result]) -> dict[str, list[str]]:
    """The images that every detector lets pass, by its name and features: of the plainest settings."""
    chosen = {
        f"{detector_name(cell.detector)}, {features_name(cell.features, cell.variant)}": result
        for result in sorted(results, key=lambda one: _plainness(one.cell))
        for cell in [result.cell]
    }
    return {name: misses(result) for name, result in chosen.items()}


def _detector_plots(results: Sequence[Result]) -> list[DetectorPlots]:
    """The plots of every detector and choice of settings, over all classes and seeds."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[(result.cell.detector, *(getattr(result.cell, name) for name in SETTINGS))].append(result)
    plots = []
    for detector, *settings in sorted(groups):
        by_kind = _by_kind(groups[(detector, *settings)])
        words = settings_text(dict(zip(SETTINGS, settings, strict=True))) if _settings_vary(results) else ""
        plots.append(DetectorPlots(detector_name(detector), words, roc_figure(by_kind), histogram_figure(by_kind)))
    return plots


def _by_kind(results: Sequence[Result]) -> dict[Kind, list[Result]]:
    by_kind: dict[Kind, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda one: _place(one.cell)):
        by_kind[Kind(result.cell.features, features_name(result.cell.features, result.cell.variant))].append(result)
    return by_kind


def _maps(folder: str | Path, results: Sequence[Result]) -> dict[tuple[str, str], list[Maps]]:
    """The maps of each class, by data set and category: of the plainest settings where there are several."""
    chosen: dict[Any, Result] = {}
    for result in sorted(results, key=lambda one: _plainness(one.cell)):
        cell = result.cell
        chosen[cell.data_set, cell.category, cell.detector, cell.features, cell.variant] = result
    maps: dict[tuple[str, str], list[Maps]] = defaultdict(list)
    vary = _settings_vary(results)
    for result in sorted(chosen.values(), key=lambda one: _place(one.cell)):
        cell, each = result.cell, 2 if len(chosen) <= _MANY_GROUPS else 1
        pictures = list(strips(result, load_shown(folder, cell), each))
        settings = settings_text({name: getattr(cell, name) for name in SETTINGS}) if vary else ""
        features = features_name(cell.features, cell.variant)
        maps[cell.data_set, cell.category].append(Maps(detector_name(cell.detector), features, settings, pictures))
    return maps


def _settings_vary(results: Sequence[Result]) -> bool:
    return len({tuple(getattr(result.cell, name) for name in SETTINGS) for result in results}) > 1


def _plainness(cell: Cell) -> tuple[float, ...]:
    return cell.shots, -cell.noise, cell.fraction, -cell.seed


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell.detector, FEATURES.index(cell.features), cell.variant
