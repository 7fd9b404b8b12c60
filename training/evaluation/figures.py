"""The plots of the report, as addresses that hold the picture itself."""

from __future__ import annotations

import io
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from training.evaluation.results import Result

_NORMAL, _ANOMALOUS = "#4878a8", "#d1495b"
# Told apart by dashes too; variants differ in width.
_LINES = {"raw": ("#8a8a8a", ":"), "residual": ("#e08e1b", "--"), "pretrained": ("#1d5fa8", "-")}
SCATTER_INCHES = 2.6  # the width of a panel
_RATES = np.linspace(0, 1, 201)
_BINS = np.linspace(0, 1, 31)
# Glyphs as shapes look alike everywhere; with a fixed salt the same results make the same file.
_STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Kind:
    """Features that a plot compares, by what they are called there.

    Attributes:
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, which decides the colour.
        name: for people.
    """

    features: str
    name: str


@rc_context(_STYLE)
def roc_figure(by_kind: Mapping[Kind, Sequence[Result]]) -> str:
    """ROC curves of image scores, a line for each kind: the mean of its cells' curves at equal false positive rates."""
    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
    drawn: Counter[str] = Counter()
    for kind, results in by_kind.items():
        colour, dashes = _LINES[kind.features]
        drawn[kind.features] += 1
        width = 2 / drawn[kind.features]
        rates = np.mean([_true_positive_rates(result) for result in results], axis=0)
        axes.plot(_RATES, rates, dashes, color=colour, linewidth=width, label=_plain(kind.name))
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.legend(loc="lower right")
    return _svg(figure)


def _true_positive_rates(result: Result) -> np.ndarray:
    false, true, _ = roc_curve(result.is_anomalous, result.scores)
    rates = np.interp(_RATES, false, true)
    rates[0] = 0
    return rates


@rc_context(_STYLE)
def histogram_figure(by_kind: Mapping[Kind, Sequence[Result]]) -> str:
    """Histograms of image scores, a panel for each kind; every cell's scores are scaled to [0, 1].

    Scores of different categories are not on one scale: unscaled, the widest would be all that is seen.
    """
    figure = Figure(figsize=(2.5 * len(by_kind), 3.2), layout="constrained")
    panels = figure.subplots(1, len(by_kind), sharey=True, squeeze=False)[0]
    for axes, (kind, results) in zip(panels, by_kind.items(), strict=True):
        scores = np.concatenate([_scaled(np.asarray(result.scores)) for result in results])
        is_anomalous = np.concatenate([np.asarray(result.is_anomalous) for result in results])
        for label, colour, chosen in _kinds_of_image(is_anomalous):
            shares = np.full(chosen.sum(), 1 / max(1, chosen.sum()))
            axes.hist(scores[chosen], _BINS, weights=shares, color=colour, alpha=0.6, label=label)
        axes.set(title=_plain(kind.name), xlabel="image score", xlim=(0, 1))
    panels[0].set_ylabel("share of images")
    _legend_below(figure, panels[-1])
    return _svg(figure)


@rc_context(_STYLE)
def scatter_figure(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Patches in a plane, a panel for each kind of features: its name -> positions (n, 2) and is_anomalous (n,)."""
    figure = Figure(figsize=(SCATTER_INCHES * len(points), 2.9), layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (name, (places, is_anomalous)) in zip(panels, points.items(), strict=True):
        for label, colour, chosen in _kinds_of_image(is_anomalous):
            axes.scatter(*places[chosen].T, s=6, color=colour, alpha=0.7, linewidths=0, label=label)
        axes.set(title=_plain(name), xticks=[], yticks=[])
        _frame(axes)
    _legend_below(figure, panels[-1])
    return _data_uri(_written(figure, "png"), "image/png")


def jpeg(data: bytes) -> str:
    """The address of a JPEG file."""
    return _data_uri(data, "image/jpeg")


def _scaled(scores: np.ndarray) -> np.ndarray:
    span = scores.max() - scores.min()
    return (scores - scores.min()) / span if span > 0 else np.zeros(len(scores))


def _kinds_of_image(is_anomalous: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    return [("normal", _NORMAL, ~is_anomalous), ("anomalous", _ANOMALOUS, is_anomalous)]


def _frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc")


def _legend_below(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=2)


def _plain(text: str) -> str:
    """A text without formulas in it: names may hold any character."""
    return text.replace("$", r"\$")


def _svg(figure: Figure) -> str:
    return _data_uri(_written(figure, "svg"), "image/svg+xml")


def _written(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"
