"""The paper's tables: of every data set the means, the gains of pretrained features, and every class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.evaluation.cells import Cell
from training.evaluation.decisions import decision_means, defect_aurocs
from training.evaluation.names import (
    DECISION_NAMES,
    METRIC_NAMES,
    SETTINGS,
    data_set_name,
    detector_name,
    features_name,
    setting_text,
    settings_text,
)
from training.evaluation.results import METRICS, Result
from training.evaluation.summary import BASELINES, summary
from training.evaluation.table_text import Table, latex_text, markdown_text

__all__ = ["DataSetTables", "data_set_tables", "latex_tables", "markdown_tables", "summary"]

_Row = dict[str, Any]


@dataclass(frozen=True)
class DataSetTables:
    """The tables of a data set.

    Attributes:
        data_set: its name, as in ``Cell``.
        title: its name, for people.
        notes: what holds for all numbers.
        means: over the classes.
        gains: of pretrained features over the others; without rows where there is nothing to compare.
        decisions: how many normal images, and objects, are rejected where few anomalous ones pass.
        classes: one table each, by the category's name.
        kinds: image AUROC of each kind of defect, by the category's name; without rows where there are no kinds.
    """

    data_set: str
    title: str
    notes: str
    means: Table
    gains: Table
    decisions: Table
    classes: dict[str, Table] = field(default_factory=dict)
    kinds: dict[str, Table] = field(default_factory=dict)


def markdown_tables(results: Sequence[Result], failures: Mapping[Cell, str] | None = None) -> str:
    """All tables as Markdown, in percent, and the cells that failed.

    Raises:
        InputError: there are no results; so do the functions below.
    """
    parts: list[str] = []
    for one in data_set_tables(results):
        parts += [f"## {markdown_text(one.title)}\n", f"{markdown_text(one.notes)}\n"]
        parts += [f"### {markdown_text(table.title)}\n\n{table.markdown()}" for table in _with_rows(one)]
    if failures:
        parts.append("## Cells that failed\n")
        parts += [f"- {markdown_text(cell.name)}: {markdown_text(reason)}" for cell, reason in failures.items()]
        parts.append("")
    return "\n".join(parts)


def latex_tables(results: Sequence[Result]) -> str:
    """All tables as LaTeX, in percent: one ``longtable`` each, for a document with booktabs and longtable."""
    parts = ["% \\usepackage{booktabs,longtable}\n"]
    for one in data_set_tables(results):
        parts.append(f"% {' '.join(latex_text(one.title).split())}\n")
        parts += [table.latex(f"{one.title}: {table.title}. {one.notes}") for table in _with_rows(one)]
    return "\n".join(parts)


def data_set_tables(results: Sequence[Result]) -> list[DataSetTables]:
    """The tables of every data set."""
    by_data_set = defaultdict(list)
    for row in summary(results):
        by_data_set[row["data_set"]].append(row)
    decided = decision_means(results)
    return [
        _tables(
            rows,
            [row for row in decided if row["data_set"] == data_set],
            [result for result in results if result.cell.data_set == data_set],
        )
        for data_set, rows in by_data_set.items()
    ]


def _tables(rows: list[_Row], decided: list[_Row], results: Sequence[Result]) -> DataSetTables:
    data_set = results[0].cell.data_set
    varying = tuple(name for name in SETTINGS if len({row[name] for row in rows}) > 1)
    means = [row for row in rows if row["category"] is None]
    by_class = defaultdict(list)
    for row in rows:
        if row["category"] is not None:
            by_class[row["category"]].append(row)
    count = len(by_class)
    return DataSetTables(
        data_set,
        data_set_name(data_set),
        _notes(rows, varying),
        _values(f"Mean of {_count(count, 'class', 'classes')}", means, varying, count),
        _gains(means, varying),
        _decisions(decided, varying, count),
        {name: _values(name, by_class[name], varying, 1) for name in sorted(by_class)},
        {name: _kinds([one for one in results if one.cell.category == name], varying) for name in by_class},
    )


def _with_rows(tables: DataSetTables) -> list[Table]:
    return [table for table in (tables.means, tables.gains, tables.decisions, *tables.classes.values()) if table.rows]


def _notes(rows: Sequence[_Row], varying: Sequence[str]) -> str:
    seeds = max(row["seeds"] for row in rows)
    notes = "In percent; AUPRO up to a false positive rate of 0.3. "
    notes += f"Means over {seeds} seeds. " if seeds > 1 else ""
    return notes + ("" if varying else f"{settings_text(rows[0])}.")


def _values(title: str, rows: Sequence[_Row], varying: Sequence[str], count: int) -> Table:
    header = ("detector", "features", *varying, *METRIC_NAMES.values())
    lines = tuple(
        (*_labels(row, varying, count), *("-" if row[m] is None else f"{100 * row[m]:.1f}" for m in METRICS))
        for row in rows
    )
    return Table(title, header, lines, labels=2 + len(varying), best=frozenset(_best(rows, varying, count)))


def _labels(row: _Row, varying: Sequence[str], count: int) -> tuple[str, ...]:
    features = features_name(row["features"], row["variant"])
    if row["categories"] < count:
        features += f", {row['categories']} of {count} classes only"
    return detector_name(row["detector"]), features, *(setting_text(name, row[name]) for name in varying)


def _best(rows: Sequence[_Row], varying: Sequence[str], count: int) -> Iterable[tuple[int, int]]:
    """Places of the best of a detector's features, as they are printed; means over fewer classes do not compete."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row["categories"] == count:
            groups[(row["detector"], *(row[name] for name in SETTINGS))].append(place)
    for places in groups.values():
        for column, metric in enumerate(METRICS, start=2 + len(varying)):
            printed = {
                place: round(100 * rows[place][metric], 1) for place in places if rows[place][metric] is not None
            }
            if len(printed) > 1:
                yield from ((place, column) for place, value in printed.items() if value == max(printed.values()))


def _gains(means: Sequence[_Row], varying: Sequence[str]) -> Table:
    lines = [
        (*_labels(row, varying, 0), baseline, *(_gain(row, f"{metric}_over_{baseline}") for metric in METRICS))
        for row in means
        for baseline in BASELINES
        if any(row[f"{metric}_over_{baseline}"] is not None for metric in METRICS)
    ]
    title = "Gain of pretrained features, with its standard error over the classes"
    header = ("detector", "features", *varying, "over", *METRIC_NAMES.values())
    return Table(title, header, tuple(lines), labels=3 + len(varying))


def _decisions(decided: Sequence[_Row], varying: Sequence[str], count: int) -> Table:
    names = [name for name in DECISION_NAMES if any(row.get(name) is not None for row in decided)]
    lines = [
        (*_labels(row, varying, count), *("-" if row[n] is None else f"{100 * row[n]:.1f}" for n in names))
        for row in decided
    ]
    title = "Overkill: normal ones that are rejected where 2, 5 and 10 % of the anomalous ones pass"
    header = ("detector", "features", *varying, *(DECISION_NAMES[name] for name in names))
    return Table(title, header, tuple(lines), labels=2 + len(varying))


def _kinds(results: Sequence[Result], varying: Sequence[str]) -> Table:
    """Of the first seed alone: how many images of a kind there are does not depend on it."""
    seed = min(result.cell.seed for result in results)
    rows = [(asdict(one.cell) | {"categories": 1}, defect_aurocs(one)) for one in results if one.cell.seed == seed]
    kinds = sorted({kind for _, found in rows for kind in found})
    lines = [
        (*_labels(row, varying, 1), *(f"{100 * found[kind]:.1f}" if kind in found else "-" for kind in kinds))
        for row, found in rows
        if found
    ]
    header = ("detector", "features", *varying, *kinds)
    return Table("Image AUROC by kind of defect", header, tuple(lines), labels=2 + len(varying))


def _gain(row: _Row, name: str) -> str:
    gain, error = row[name], row[f"{name}_error"]
    if gain is None:
        return "-"
    return f"{100 * gain:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
