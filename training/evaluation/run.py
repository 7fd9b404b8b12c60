"""Running cells."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from adpretrain_hf.errors import InputError
from training.evaluation.cells import Cell
from training.evaluation.data_sets import Sample
from training.evaluation.detectors import DETECTORS, model_class
from training.evaluation.fitting import fit, predict, predict_likelihoods, quietly, seed
from training.evaluation.images import test_masks
from training.evaluation.measure import Predicted, measure
from training.evaluation.plan import Plan
from training.evaluation.remember import RememberedFeatures
from training.evaluation.results import (
    Result,
    copy_result,
    is_done,
    patches_done,
    save_failure,
    save_patches,
    save_result,
)
from training.evaluation.sampling import Drawn
from training.evaluation.shared import Shared
from training.evaluation.shown import choose_shown, sample_patches

_LOG = logging.getLogger(__name__)


def run_cells(shared: Shared, cells: Sequence[Cell]) -> None:
    """Runs cells that one model serves, and saves their results; those that are done are left alone.

    Where a detector fails, of memory that runs out for example, its cells get that as their result, and others go on.

    Args:
        shared: by all cells of the plan.
        cells: that differ in the category alone.

    Raises:
        InputError: something about the data; the message names the cell.
    """
    for cell in cells:
        _take_over(shared.plan, cell)
    pending = [cell for cell in cells if not is_done(shared.plan.output, cell)]
    if not pending:
        return
    try:
        _fit_and_test(shared, cells, pending)
    except InputError as error:
        raise InputError(f"{pending[0].name}: {error}") from error
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        return
    # Not in the handler, which keeps the tensors of all frames that the error came through.
    gc.collect()
    if shared.device.type == "cuda":
        torch.cuda.empty_cache()
    for cell in pending:
        if not is_done(shared.plan.output, cell):
            _LOG.warning("%s failed: %s", cell.name, reason)
            save_failure(shared.plan.output, cell, reason)


def _take_over(plan: Plan, cell: Cell) -> None:
    """Gives a cell of raw features the result of one with another number of references, which these do not know."""
    if cell.features != "raw" or is_done(plan.output, cell):
        return
    for other in (replace(cell, shots=shots) for shots in plan.shots):
        if is_done(plan.output, other):
            copy_result(plan.output, other, cell)
            return


def _fit_and_test(shared: Shared, cells: Sequence[Cell], pending: Sequence[Cell]) -> None:
    began, first = time.monotonic(), cells[0]
    drawn = {cell: shared.draw(cell) for cell in cells}
    seed(first.seed)
    with quietly():
        model = _model(shared, first, drawn)
    train = [sample for cell in cells for sample in drawn[cell].train]
    images = shared.images(train, shared.plan.batch_size, shuffle=True)
    fit(model, images, epochs=shared.plan.epochs_of(first.detector), device=shared.device)
    seconds = (time.monotonic() - began) / len(cells)
    for cell in pending:
        model.set_reference(shared.references(drawn[cell].references).bank)
        _test(shared, cell, model, drawn[cell].test, seconds)


def _model(shared: Shared, cell: Cell, drawn: dict[Cell, Drawn]) -> Any:
    """A model that remembers features, and compares each training image with the references of its category."""
    without = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    kind = model_class(cell.detector)
    own = shared.plan.set.get(cell.detector, {})
    model = kind(shared.plan.bundle, variant=cell.variant or None, features=cell.features, **own, **without)
    shared.remember_tokens(model.features.extractor)
    of_path = {
        str(sample.image): references
        for one in drawn.values()
        for references in [shared.references(one.references)]
        for sample in one.train
    }
    model.install_features(RememberedFeatures(model.features, shared.memory, of_path))
    model.set_reference(shared.references(drawn[cell].references).bank)
    return model


def _test(shared: Shared, cell: Cell, model: Any, samples: Sequence[Sample], seconds: float) -> None:
    """Tests a model on one category and saves the result.

    Args:
        seconds: that fitting took.
    """
    began = time.monotonic()
    ask = predict_likelihoods if DETECTORS[cell.detector].has_likelihoods else predict
    maps, scores = ask(model, shared.images(samples, shared.plan.batch_size), device=shared.device)
    labels = np.array([sample.is_anomalous for sample in samples])
    predicted = Predicted(maps, scores, labels, _masks(shared, samples))
    metrics = measure(predicted)
    if predicted.masks is not None:
        _keep_patches(shared, cell, model, samples, predicted.masks)
    names = [shared.name(cell, sample) for sample in samples]
    seconds += time.monotonic() - began
    defects = [sample.defect for sample in samples]
    result = Result(cell, metrics, scores.tolist(), labels.tolist(), names, seconds, defects)
    save_result(shared.plan.output, result, choose_shown(predicted, samples, shared.extractor.preprocess))


def _masks(shared: Shared, samples: Sequence[Sample]) -> np.ndarray | None:
    """Masks of the test images, or None where those of anomalous images are not known."""
    if any(sample.is_anomalous and sample.mask is None for sample in samples):
        return None
    return test_masks(samples, shared.extractor.preprocess)


def _keep_patches(shared: Shared, cell: Cell, model: Any, samples: Sequence[Sample], masks: np.ndarray) -> None:
    """Saves some features of the deepest level, once for each category and kind of features."""
    if patches_done(shared.plan.output, cell.data_set, cell.category, cell.features, cell.variant):
        return
    deepest = model.features.layers[-1]
    batches = shared.images(samples, shared.plan.batch_size)
    features = torch.cat([model.features(batch.image)[deepest].cpu() for batch in batches])
    save_patches(shared.plan.output, sample_patches(cell, features, masks, shared.extractor.config.patch_size))
