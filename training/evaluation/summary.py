"""Means over seeds and categories, and the gains of pretrained features, paired by category and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from adpretrain_hf.errors import InputError
from training.evaluation.cells import FEATURES
from training.evaluation.results import METRICS, Result

BASELINES = ("raw", "residual")
GROUP = ["data_set", "detector", "shots", "noise", "fraction", "features", "variant"]
_PAIR = ["data_set", "category", "detector", "shots", "noise", "fraction", "seed"]
_GAINS = [f"{metric}_over_{baseline}" for baseline in BASELINES for metric in METRICS]


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Means over seeds and then over categories, and those of each category.

    A gain is the mean over the seeds of pretrained minus the baseline under the same detector, category, settings and
    seed, then over the categories; its standard error is over the categories.

    Returns:
        One dict for each data set, detector, shots, noise, fraction, features and variant (the keys), and each of
        these with every category; ``category`` is None for the means. Besides: ``categories`` and ``seeds``, how many
        went in; each m of ``METRICS``; ``m_over_raw`` and ``m_over_residual``, and ``m_over_raw_error`` and
        ``m_over_residual_error`` of the means. None where there is nothing to average.

    Raises:
        InputError: there are no results.
    """
    if not results:
        raise InputError("there are no finished cells to sum up: run some first")
    frame = _frame(results)
    groups = frame.groupby([*GROUP, "category"], sort=True, observed=True)
    classes = groups[[*METRICS, *_GAINS]].mean().assign(categories=1, seeds=groups["seed"].nunique())
    over = classes.groupby(GROUP, sort=True, observed=True)
    means = over[[*METRICS, *_GAINS]].mean().assign(categories=over.size(), seeds=over["seeds"].max())
    means = means.join(over[_GAINS].sem().add_suffix("_error"))
    return _records(means.assign(category=None)) + _records(classes)


def _frame(results: Sequence[Result]) -> pd.DataFrame:
    """One row a cell, with its gains: NaN where there are none."""
    frame = pd.DataFrame([asdict(result.cell) | {m: result.metrics.get(m) for m in METRICS} for result in results])
    frame = frame.astype(dict.fromkeys(METRICS, float))
    frame["features"] = pd.Categorical(frame["features"], FEATURES, ordered=True)  # sorted as the paper has them
    pairs = pd.MultiIndex.from_frame(frame[_PAIR])
    for baseline in BASELINES:
        counterpart = frame[frame["features"] == baseline].set_index(_PAIR)[list(METRICS)].reindex(pairs)
        gains = frame[list(METRICS)] - counterpart.to_numpy()
        pretrained = frame["features"] == "pretrained"
        frame[[f"{metric}_over_{baseline}" for metric in METRICS]] = gains.where(pretrained)
    return frame


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    table = table.reset_index().astype(object)
    return table.where(table.notna(), None).to_dict("records")  # JSON has no NaN
