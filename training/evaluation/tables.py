"""The paper's tables, in percent: of every data set the means, the gains of pretrained features, and every class."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from adpretrain_hf.errors import InputError
from training.evaluation.metrics import auroc, overkill
from training.evaluation.plan import FEATURES, Cell
from training.evaluation.store import METRICS, Result

# What people call metrics, detectors and data sets, and the settings of a cell

_NAMES = ("image AUROC", "image AP", "image F1-max", "pixel AUROC", "pixel AP", "pixel F1-max", "AUPRO")
METRIC_NAMES = dict(zip(METRICS, _NAMES, strict=True))
_PROPER = ("PatchCore", "PaDiM", "CFLOW", "GLASS", "UniAD", "FeatureNorm", "MVTecAD", "VisA", "BTAD", "MPDD", "RealIAD")
_PROPER_NAMES = {name.lower(): name for name in _PROPER} | {"mvtec3d": "MVTec3D-AD"}
SETTINGS = ("shots", "noise", "fraction")


def proper_name(name: str) -> str:
    """E.g. ``"PatchCore"`` for ``"patchcore"``, ``"VisA"`` for ``"visa"``; what is not known stays as it is."""
    return _PROPER_NAMES.get(name, name)


def features_name(features: str, variant: str) -> str:
    """E.g. ``"pretrained (norm)"``."""
    return f"{features} ({variant})" if variant else features


def settings_text(shots: int, noise: float, fraction: float) -> str:
    """The ``SETTINGS`` of a cell, in words."""
    return (
        f"{shots} reference image{'s' * (shots != 1)}, {100 * noise:g} % anomalies among the training images, "
        f"{100 * fraction:g} % of the normal training images"
    )


# Numbers: means over seeds and then over categories, and the gains of pretrained features, paired by category and seed

BASELINES = ("raw", "residual")
_GROUP = ["data_set", "detector", *SETTINGS, "features", "variant"]
_PAIR = ["data_set", "category", "view", "detector", *SETTINGS, "seed"]
_GAINS = [f"{metric}_over_{baseline}" for baseline in BASELINES for metric in METRICS]
_VIEWS = ("realiad",)  # data sets that show an object in several images, in a folder of its own
DECISION_NAMES = {
    **{f"overkill_{escape}": f"images at {escape} %" for escape in (2, 5, 10)},
    "object_auroc": "object AUROC",
    **{f"object_overkill_{escape}": f"objects at {escape} %" for escape in (2, 5, 10)},
}
_Row = dict[str, Any]


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Means over seeds and then over categories, and those of each category.

    A gain is the mean over the seeds of pretrained minus the baseline under the same detector, category, settings and
    seed, then over the categories; its standard error is over the categories.

    Returns:
        One dict for each data set, detector, shots, noise, fraction, features and variant (the keys), and each of
        these with every category; ``category`` is None for the means. Besides: ``categories`` and ``seeds``, how many
        went in; each m of ``METRICS``, and what ``decisions`` gives; ``m_over_raw`` and ``m_over_residual``, and
        ``m_over_raw_error`` and ``m_over_residual_error`` of the means. None where there is nothing to average.

    Raises:
        InputError: there are no results.
    """
    if not results:
        raise InputError("there are no finished cells to sum up: run some first")
    metrics, numbers = list(METRICS), [*METRICS, *DECISION_NAMES]
    cells = pd.DataFrame([asdict(result.cell) for result in results])
    cells["features"] = pd.Categorical(cells["features"], FEATURES, ordered=True)  # sorted as the paper has them
    frame = cells.join(pd.DataFrame([{**decisions(one), **one.metrics} for one in results], None, numbers, float))
    pairs, is_pretrained = pd.MultiIndex.from_frame(frame[_PAIR]), frame["features"] == "pretrained"
    for baseline in BASELINES:
        counterpart = frame[frame["features"] == baseline].set_index(_PAIR)[metrics].reindex(pairs)
        gains = frame[metrics] - counterpart.to_numpy()
        frame[[f"{metric}_over_{baseline}" for metric in metrics]] = gains.where(is_pretrained)
    groups = frame.groupby([*_GROUP, "category"], observed=True)
    classes = groups[[*numbers, *_GAINS]].mean().assign(categories=1, seeds=groups["seed"].nunique())
    over = classes.groupby(_GROUP, observed=True)
    means = over[[*numbers, *_GAINS]].mean().assign(categories=over.size(), seeds=over["seeds"].max(), category=None)
    means = means.join(over[_GAINS].sem().add_suffix("_error"))
    tables = (table.reset_index().astype(object) for table in (means, classes))
    return [row for table in tables for row in table.where(table.notna(), None).to_dict("records")]  # JSON has no NaN


def decisions(result: Result) -> dict[str, float]:
    """What a production line pays: how many good ones are rejected where only few damaged ones may pass.

    An object is anomalous if one of its images is, and its score is the largest of theirs.

    Returns:
        Of one cell: ``overkill_2``, ``_5`` and ``_10`` of the images and, of data sets with several views, the same of
        the objects with ``object_auroc``, unless all objects are anomalous or each view is evaluated on its own.
    """
    seen = {"": pd.DataFrame({"scores": result.scores, "labels": result.is_anomalous})}
    if result.cell.data_set in _VIEWS and not result.cell.view:
        objects = seen[""].groupby([str(PurePosixPath(name).parent) for name in result.names]).max()
        if not objects["labels"].all():
            seen["object_"] = objects
    numbers = {
        f"{prefix}overkill_{100 * escape:g}": overkill(one["scores"], one["labels"], escape)
        for prefix, one in seen.items()
        for escape in (0.02, 0.05, 0.1)  # the share of the damaged ones that may pass
    }
    if "object_" in seen:
        numbers["object_auroc"] = auroc(objects["scores"], objects["labels"])
    return numbers


def defect_aurocs(result: Result) -> dict[str, float]:
    """Image AUROC of each kind of defect against all normal images, by the kinds' names; empty where none is known."""
    scores, labels, kinds = np.array(result.scores), np.array(result.is_anomalous), np.array(result.defects)
    return {
        str(kind): auroc(scores[chosen], labels[chosen])
        for kind in (np.unique(kinds[labels]) if len(kinds) else ())
        for chosen in [(kinds == kind) | ~labels]
    }


def misses(result: Result, rejected: float = 0.05) -> list[str]:
    """The anomalous images that pass where a share of the normal ones is rejected, those first that pass by most."""
    scores, labels = np.array(result.scores), np.array(result.is_anomalous)
    threshold = np.quantile(scores[~labels], 1 - rejected, method="higher")
    passing = [place for place in np.argsort(scores, kind="stable") if labels[place] and scores[place] < threshold]
    return [result.names[place] for place in passing]


# Tables of texts

_LATEX_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = {ord(character): f"\\text{name}{{}}" for character, name in _LATEX_NAMES.items()}
_LATEX |= {ord(character): f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class Table:
    """A table as it is printed.

    Attributes:
        title: above it.
        header: of the columns.
        rows: of texts, as many as in the header each.
        labels: how many columns at the left say what the numbers are of.
        best: (row, column) of what is printed bold.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """The table, without its title."""
        marks = ["---"] * self.labels + ["--:"] * (len(self.header) - self.labels)
        lines = [map(markdown_text, self.header), marks, *self._lines(markdown_text, markdown_text, "**{}**")]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self, caption: str) -> str:
        """The table as a ``longtable``, which may go over pages, with booktabs' rules."""
        lines = self._lines(latex_text, _latex_number, r"\textbf{{{}}}")
        frame = pd.DataFrame(lines, columns=[*map(latex_text, self.header)])
        columns = "l" * self.labels + "r" * (len(self.header) - self.labels)
        form: Any = {"column_format": columns, "escape": False, "longtable": True, "caption": latex_text(caption)}
        table = frame.to_latex(index=False, **form)
        return f"\\begingroup\n\\footnotesize\n\\setlength{{\\tabcolsep}}{{3pt}}\n{table}\\endgroup\n"

    def _lines(self, label: Callable[[str], str], number: Callable[[str], str], bold: str) -> Iterator[list[str]]:
        for place, row in enumerate(self.rows):
            texts = [*map(label, row[: self.labels]), *map(number, row[self.labels :])]
            yield [bold.format(text) if (place, n) in self.best else text for n, text in enumerate(texts)]


def markdown_text(text: str) -> str:
    """A text in Markdown that shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def latex_text(text: str) -> str:
    """A text in LaTeX that shows as it is, on one line."""
    return " ".join(text.split()).translate(_LATEX)


def _latex_number(text: str) -> str:
    """Numbers with a sign are set as formulas, for the minus and the plus-minus."""
    formula = text.replace("±", r"\pm")
    return f"${formula}$" if text[0] in "+-" and len(text) > 1 else text


class DataSetTables(NamedTuple):
    """The tables of a data set, all of which have rows.

    Attributes:
        data_set: its name, as in ``Cell``.
        title: its name, for people.
        notes: what holds for all numbers.
        overall: means over the classes; gains of pretrained features over the others; how many normal images, and
            objects, are rejected where few anomalous ones pass.
        classes: one table each, by the category's name.
        kinds: image AUROC of each kind of defect, by the category's name, of those that have kinds.
    """

    data_set: str
    title: str
    notes: str
    overall: list[Table]
    classes: dict[str, Table]
    kinds: dict[str, Table]


def markdown_tables(results: Sequence[Result], failures: Mapping[Cell, str] | None = None) -> str:
    """All tables as Markdown, in percent, and the cells that failed.

    Raises:
        InputError: there are no results; so do the functions below.
    """
    parts: list[str] = []
    for one in data_set_tables(results):
        parts += [f"## {markdown_text(one.title)}\n", f"{markdown_text(one.notes)}\n"]
        for table in (*one.overall, *one.classes.values()):
            parts.append(f"### {markdown_text(table.title)}\n\n{table.markdown()}")
    if failures:
        lines = (f"- {markdown_text(cell.name)}: {markdown_text(reason)}\n" for cell, reason in failures.items())
        parts.append(f"## Cells that failed\n\n{''.join(lines)}")
    return "\n".join(parts)


def latex_tables(results: Sequence[Result]) -> str:
    """All tables as LaTeX, in percent: one ``longtable`` each, for a document with booktabs and longtable."""
    parts = ["% \\usepackage{booktabs,longtable}\n"]
    for one in data_set_tables(results):
        parts.append(f"% {latex_text(one.title)}\n")
        for table in (*one.overall, *one.classes.values()):
            parts.append(table.latex(f"{one.title}: {table.title}. {one.notes}"))
    return "\n".join(parts)


def data_set_tables(results: Sequence[Result]) -> list[DataSetTables]:
    """The tables of every data set."""
    rows = summary(results)
    return [
        _tables([row for row in rows if row["data_set"] == name], [one for one in results if one.cell.data_set == name])
        for name in dict.fromkeys(row["data_set"] for row in rows)
    ]


def _tables(rows: list[_Row], results: list[Result]) -> DataSetTables:
    varying = tuple(name for name in SETTINGS if len({row[name] for row in rows}) > 1)
    means, seeds = [row for row in rows if row["category"] is None], max(row["seeds"] for row in rows)
    notes = "In percent; AUPRO up to a false positive rate of 0.3. "
    notes += f"Means over {seeds} seeds. " if seeds > 1 else ""
    notes += "" if varying else f"{settings_text(*(means[0][name] for name in SETTINGS))}."
    if any(result.made_by.get("protocol") == "few-shot" for result in results):
        notes += " Few-shot: the training images are the references, each taken against the others, view by view."
    classes = sorted({result.cell.category for result in results})
    count = len(classes)
    decided = {name: text for name, text in DECISION_NAMES.items() if any(row[name] is not None for row in means)}
    rejected = "Overkill: normal ones that are rejected where 2, 5 and 10 % of the anomalous ones pass"
    overall = [
        _metrics(f"Mean of {count} class{'es' * (count != 1)}", means, varying, count),
        _gains(means, varying),
        _table(rejected, decided, means, varying, count),
    ]
    kinds = {name: _kinds([one for one in results if one.cell.category == name], varying) for name in classes}
    return DataSetTables(
        means[0]["data_set"],
        proper_name(means[0]["data_set"]),
        notes,
        [table for table in overall if table.rows],
        {name: _metrics(name, [row for row in rows if row["category"] == name], varying) for name in classes},
        {name: table for name, table in kinds.items() if table.rows},
    )


def _metrics(title: str, rows: Sequence[_Row], varying: tuple[str, ...], count: int = 1) -> Table:
    """A table with the best of each detector's features, as they are printed; means over fewer classes are none."""
    table = _table(title, METRIC_NAMES, rows, varying, count)
    printed = pd.DataFrame([row[table.labels :] for row in table.rows]).apply(pd.to_numeric, errors="coerce")
    printed = printed[[row["categories"] == count for row in rows]]
    groups = printed.groupby([[rows[place][name] for place in printed.index] for name in ("detector", *SETTINGS)])
    is_best = printed.eq(groups.transform("max")) & (groups.transform("count") > 1)
    places = ((row, column + table.labels) for (row, column), best in is_best.stack().items() if best)
    return replace(table, best=frozenset(places))


def _gains(means: Sequence[_Row], varying: tuple[str, ...]) -> Table:
    title = "Gain of pretrained features, with its standard error over the classes"
    rows = []
    for row, baseline in product(means, BASELINES):
        gains = {metric: _gain(row, f"{metric}_over_{baseline}") for metric in METRICS}
        if any(gains.values()):
            rows.append(row | gains | {"over": baseline})
    return _table(title, METRIC_NAMES, rows, (*varying, "over"))


def _gain(row: _Row, name: str) -> str | None:
    gain, error = row[name], row[f"{name}_error"]
    return gain if gain is None else f"{100 * gain:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _kinds(results: Sequence[Result], varying: tuple[str, ...]) -> Table:
    """Means over the views of the first seed alone: how many images of a kind there are does not depend on it."""
    seed = min(result.cell.seed for result in results)
    first = [one for one in results if one.cell.seed == seed]
    cells = pd.DataFrame([asdict(one.cell) for one in first])
    kinds = pd.DataFrame([defect_aurocs(one) for one in first]).sort_index(axis=1)
    means = kinds.groupby([cells[name] for name in _GROUP], sort=False).mean().dropna(how="all")
    rows = means.add_prefix("kind ").reset_index().to_dict("records")
    return _table("Image AUROC by kind of defect", {f"kind {kind}": str(kind) for kind in kinds}, rows, varying)


def _table(title: str, names: Mapping[str, str], rows: Sequence[_Row], varying: Sequence[str], count: int = 0) -> Table:
    """What rows have under names, with what people call that; of means, over how many classes if not all ``count``."""
    lines = []
    for row in rows:
        some = f", {row['categories']} of {count} classes only" if row.get("categories", count) < count else ""
        labels = (proper_name(row["detector"]), features_name(row["features"], row["variant"]) + some)
        settings = (f"{100 * row[name]:g} %" if name in ("noise", "fraction") else str(row[name]) for name in varying)
        lines.append((*labels, *settings, *(_percent(row[name]) for name in names)))
    return Table(title, ("detector", "features", *varying, *names.values()), tuple(lines), labels=2 + len(varying))


def _percent(value: Any) -> str:
    return value if isinstance(value, str) else "-" if pd.isna(value) else f"{100 * value:.1f}"
