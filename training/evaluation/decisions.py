"""What a production line pays: how many good ones are rejected where only few damaged ones may pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from training.evaluation.cells import FEATURES
from training.evaluation.results import Result
from training.evaluation.summary import GROUP

ESCAPES = (0.02, 0.05, 0.1)  # shares of the damaged ones that may pass
_VIEWS = ("realiad",)  # data sets that show an object in several images, in a folder of its own


def decision_means(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Means over seeds and then over categories.

    Returns:
        One dict for each data set, detector, features, variant and settings: ``overkill_2``, ``_5`` and ``_10`` of the
        images and, of data sets with several views, the same of the objects with ``object_auroc``; and ``categories``,
        how many went in. None where there are no objects.
    """
    frame = pd.DataFrame([asdict(result.cell) | decisions(result) for result in results])
    frame["features"] = pd.Categorical(frame["features"], FEATURES, ordered=True)  # sorted as the paper has them
    names = [name for name in frame if name.startswith(("overkill", "object"))]
    classes = frame.groupby([*GROUP, "category"], sort=True, observed=True)[names].mean()
    over = classes.groupby(GROUP, sort=True, observed=True)
    table = over.mean().assign(categories=over.size()).reset_index().astype(object)
    return table.where(table.notna(), None).to_dict("records")


def decisions(result: Result) -> dict[str, float]:
    """The numbers of one cell.

    An object is anomalous if one of its images is, and its score is the largest of theirs.
    """
    from training.metrics import image_auroc, overkill  # of scikit-learn, which takes seconds to import

    scores, labels = np.array(result.scores), np.array(result.is_anomalous)
    numbers = {f"overkill_{100 * escape:g}": overkill(scores, labels, escape) for escape in ESCAPES}
    if result.cell.data_set not in _VIEWS:
        return numbers
    objects = pd.DataFrame({"scores": scores, "labels": labels}).groupby(
        [str(PurePosixPath(name).parent) for name in result.names]
    )
    scores, labels = (objects[name].max().to_numpy() for name in ("scores", "labels"))
    if labels.all():
        return numbers
    numbers["object_auroc"] = image_auroc(scores, labels)
    return numbers | {f"object_overkill_{100 * escape:g}": overkill(scores, labels, escape) for escape in ESCAPES}


def defect_aurocs(result: Result) -> dict[str, float]:
    """Image AUROC of each kind of defect against all normal images, by the kinds' names; empty where none is known."""
    from training.metrics import image_auroc

    scores, labels, kinds = np.array(result.scores), np.array(result.is_anomalous), np.array(result.defects)
    return {
        str(kind): image_auroc(scores[chosen], labels[chosen])
        for kind in (np.unique(kinds[labels]) if len(kinds) else ())
        for chosen in [(kinds == kind) | ~labels]
    }


def misses(result: Result, rejected: float = 0.05) -> list[str]:
    """The anomalous images that pass where a share of the normal ones is rejected, those first that pass by most."""
    scores, labels = np.array(result.scores), np.array(result.is_anomalous)
    threshold = np.quantile(scores[~labels], 1 - rejected, method="higher")
    passing = [place for place in np.argsort(scores, kind="stable") if labels[place] and scores[place] < threshold]
    return [result.names[place] for place in passing]
