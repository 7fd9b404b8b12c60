"""Means, paired gains and standard errors of a comparison, against numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from training.few_shot_summary import markdown_table, summarise


def row(features: str, detector: str, category: str, score: float, view: str = "C1", seed: int = 0) -> dict[str, Any]:
    metrics = {"image_auroc": score, "pixel_auroc": score / 2, "aupro": score / 4}
    return {"category": category, "view": view, "seed": seed, "features": features, "detector": detector} | metrics


def find(summary: list[dict[str, Any]], features: str, detector: str) -> dict[str, Any]:
    (found,) = (one for one in summary if (one["features"], one["detector"]) == (features, detector))
    return found


def test_cells_and_seeds_of_a_category_are_averaged_first() -> None:
    rows = [row("unit residual", "PaDiM", "a", 0.4), row("unit residual", "PaDiM", "b", 0.6)]
    # Category a has three cells, b one: they count alike.
    rows += [row("raw", "PaDiM", "a", score, f"C{score}") for score in (0.5, 0.6, 0.7)]
    rows += [row("raw", "PaDiM", "b", 0.9, seed=seed) for seed in (0, 1)]
    got = find(summarise(rows), "raw", "PaDiM")
    assert got["categories"] == 2
    assert got["image_auroc"] == pytest.approx(0.75) and got["aupro"] == pytest.approx(0.75 / 4)
    # Gains of 0.2 and 0.3: a standard deviation of 0.0707, over the root of 2.
    assert got["image_auroc_gain"] == pytest.approx(0.25) and got["image_auroc_error"] == pytest.approx(0.05)
    assert got["pixel_auroc_gain"] == pytest.approx(0.125) and got["pixel_auroc_error"] == pytest.approx(0.025)


def test_gains_are_taken_under_the_same_detector() -> None:
    rows = [row("unit residual", "PaDiM", "a", 0.4), row("raw", "PaDiM", "a", 0.5), row("raw", "PatchCore", "a", 0.5)]
    summary = summarise(rows)
    assert find(summary, "raw", "PaDiM")["image_auroc_gain"] == pytest.approx(0.1)
    assert find(summary, "raw", "PaDiM")["image_auroc_error"] is None  # one category
    assert find(summary, "raw", "PatchCore")["image_auroc_gain"] is None
    assert find(summary, "unit residual", "PaDiM")["image_auroc_gain"] is None
    json.dumps(summary, allow_nan=False)


def test_the_mean_of_the_detectors_is_paired_too() -> None:
    scores = {"unit residual": (0.4, 0.6), "pretrained angle": (0.6, None), "pretrained norm": (None, 0.7)}
    rows = [
        row(features, detector, category, score + shift)
        for features, pair in scores.items()
        for detector, score in zip(("PaDiM", "FeatureNorm"), pair, strict=True)
        for category, shift in (("a", 0.0), ("b", 0.1 if features != "unit residual" else 0.0))
        if score is not None
    ]
    summary = summarise([*rows, row("raw", "PaDiM", "a", 0.5)])
    mean = find(summary, "pretrained", "mean")
    assert mean["image_auroc"] == pytest.approx(0.7)
    assert mean["image_auroc_gain"] == pytest.approx(0.2) and mean["image_auroc_error"] == pytest.approx(0.05)
    assert not any(one["features"] == "raw" and one["detector"] == "mean" for one in summary)


def test_the_table() -> None:
    rows = [
        row(features, "PaDiM", category, score)
        for features, pair in {"unit residual": (0.4, 0.6), "pretrained angle": (0.6, 0.72)}.items()
        for category, score in zip("ab", pair, strict=True)
    ]
    rows.append(row("raw", "PatchCore", "a", 0.84))
    lines = markdown_table(summarise(rows)).splitlines()
    assert "| features | PaDiM | PatchCore |" in lines
    assert "| unit residual | 50.0 / 25.0 / 12.5 | - |" in lines
    assert "| raw | - | 84.0 / 42.0 / 21.0 |" in lines
    assert "| pretrained angle | +16.0 ± 4.0 / +8.0 ± 2.0 / +4.0 ± 1.0 |" in lines
