"""Means and paired gains over the cells of a comparison, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

METRICS = ["image_auroc", "pixel_auroc", "aupro"]
BASELINE = "unit residual"
ALL_DETECTORS = "mean"


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over categories, and gains over unit-length residuals under the same detector.

    Cells and seeds of a category are averaged first, so that categories count alike. Gains are paired by category;
    their standard error is over categories. The detector ``"mean"`` stands for the average of all detectors, where a
    kind of features has been scored by all of them; all ``"pretrained ..."`` variants are one kind there.

    Args:
        rows: from ``evaluate_features``.

    Returns:
        One dict for each kind of features and detector: ``features``, ``detector``, ``categories`` (their number) and
        for each metric m ``m``, ``m_gain`` and ``m_error`` (of the gain). The last two are None where there is no
        baseline, and the error where there is only one category.
    """
    frame = pd.DataFrame(rows)
    keys = ["features", "detector", "category"]
    by_category = _with_mean_of_detectors(frame.groupby(keys, sort=False)[METRICS].mean())
    gains = by_category.copy()
    for (features, detector, category), _ in by_category.iterrows():
        baseline = (BASELINE, detector, category)
        known = features != BASELINE and baseline in by_category.index
        gains.loc[(features, detector, category)] -= by_category.loc[baseline] if known else float("nan")
    groups = by_category.groupby(keys[:2], sort=False)
    table = groups.mean().assign(categories=groups.size())
    gain = gains.groupby(keys[:2], sort=False)
    table = table.join(gain.mean().add_suffix("_gain")).join(gain.sem().add_suffix("_error"))
    table = table.astype(object).where(table.notna(), None)  # JSON has no NaN
    return table.reset_index().to_dict("records")


def _with_mean_of_detectors(by_category: pd.DataFrame) -> pd.DataFrame:
    """Adds the rows of the average of all detectors."""
    flat = by_category.reset_index()
    flat["features"] = flat["features"].str.replace(r"^pretrained .*", "pretrained", regex=True)
    groups = flat.groupby(["features", "category"], sort=False)
    complete = groups["detector"].nunique() == flat["detector"].nunique()
    means = groups[METRICS].mean()[complete].assign(detector=ALL_DETECTORS).reset_index()
    return pd.concat([by_category, means.set_index(by_category.index.names)])


def markdown_table(summary: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables, in percent: image AUROC / pixel AUROC / AUPRO, and the gains with their standard errors."""
    number = max(row["categories"] for row in summary)
    means = _table(summary, lambda row: " / ".join(f"{100 * row[metric]:.1f}" for metric in METRICS))
    gains = _table([row for row in summary if row["image_auroc_gain"] is not None], _gains)
    return (
        f"Image AUROC / pixel AUROC / AUPRO in percent, mean of {number} categories.\n\n{means}\n"
        f"Gain over {BASELINE} features, paired by category, with its standard error.\n\n{gains}"
    )


def _gains(row: dict[str, Any]) -> str:
    pairs = ((row[f"{metric}_gain"], row[f"{metric}_error"]) for metric in METRICS)
    return " / ".join(
        f"{100 * gain:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}") for gain, error in pairs
    )


def _table(rows: Sequence[dict[str, Any]], show: Any) -> str:
    cells = {(row["features"], row["detector"]): show(row) for row in rows}
    kinds, detectors = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    lines = [["features", *detectors], ["---"] * (1 + len(detectors))]
    lines += [[kind, *(cells.get((kind, detector), "-") for detector in detectors)] for kind in kinds]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
