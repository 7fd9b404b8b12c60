"""Judging every epoch on the validation categories, and keeping the best weights for each variant."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from training.data.sources import TrainingData
from training.few_shot import encode_cells, find_cells, score_cells
from training.few_shot_cells import Cell, EncodedCell
from training.few_shot_summary import METRICS
from training.run import distributed
from training.run.checkpoint import Progress
from training.run.folder import RunFolder
from training.run.reporting import Reporter, scores_text
from training.settings import PretrainSettings

# Each variant goes with the detector that it is chosen under (paper, appendix; released code).
DETECTOR_OF = {"angle": "PatchCore", "norm": "FeatureNorm"}
_SEEDS = (0, 1)  # draws of references
_IMAGES = 40  # of a cell, normal and anomalous ones each: enough to choose an epoch by
_LOG = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]  # by detector and metric


class Validation:
    """Scores the projectors on the validation categories, in the first process alone.

    Args:
        settings: of the run.
        run: where the best weights go.
        data: the data and the names of the validation categories; without any, the last weights are kept.
        extractor: whose projectors are judged; the tokens of the images are computed now and kept in float16.

    Raises:
        InputError: no validation category has enough images.
    """

    def __init__(
        self, settings: PretrainSettings, run: RunFolder, data: TrainingData, extractor: ADPretrainFeatureExtractor
    ) -> None:
        self._run, self._extractor = run, extractor
        self._cells: list[EncodedCell] = []
        if distributed.rank() == 0 and data.validation:
            cells = [_some(cell, settings.seed) for cell in find_cells(data.dataset, data.validation, settings.shots)]
            encoded = encode_cells(
                extractor,
                data.dataset,
                cells,
                seeds=_SEEDS,
                shots=settings.shots,
                on_error=lambda name, error: _LOG.warning("left out of the validation: %s", error),
            )
            self._cells = list(tqdm(encoded, total=len(cells), unit="cell", desc="validation images"))

    def end_epoch(self, progress: Progress, reporter: Reporter, unreadable: Sequence[str]) -> None:
        """Scores the epoch that has just ended, and keeps the weights where they are the best so far."""
        scores = self.scores(self._extractor) if distributed.rank() == 0 else {}
        for variant, detector in DETECTOR_OF.items():
            if distributed.rank() == 0:
                self._keep_best(variant, scores.get(detector), progress)
        record: dict[str, Any] = {"epoch": progress.epoch + 1, "validation": scores, "unreadable": list(unreadable)}
        untrained = f" (untrained: {scores_text(progress.baseline)})"
        progress.history.append(record | reporter.end_epoch(progress.epoch, scores, untrained))
        if distributed.rank() == 0:
            self._run.write_metrics(progress)
        distributed.wait_for_all()

    def baseline(self) -> Scores:
        """What the residuals score that the projectors are given: new projectors are the identity."""
        extractor = self._extractor
        return self.scores(ADPretrainFeatureExtractor(extractor.config, extractor.backbone).to(extractor.device))

    def scores(self, extractor: ADPretrainFeatureExtractor) -> Scores:
        """Means over the cells of the first process, by detector and metric."""
        extractor.projectors.zero_grad(set_to_none=True)  # or their constants are computed again for every cell
        rows = score_cells(extractor, self._cells, features=["pretrained"], detectors=list(DETECTOR_OF.values()))
        by_detector = defaultdict(list)
        for row in rows:
            by_detector[row["detector"]].append(row)
        return {
            name: {metric: fmean(row[metric] for row in own) for metric in METRICS} for name, own in by_detector.items()
        }

    def _keep_best(self, variant: str, scores: dict[str, float] | None, progress: Progress) -> None:
        score = 0.0 if scores is None else (scores["image_auroc"] + scores["aupro"]) / 2
        if scores is None or variant not in progress.best or score > progress.best[variant]["score"]:
            progress.best[variant] = {"epoch": progress.epoch + 1, "score": score}
            self._run.save_variant(variant, self._extractor.projectors)


def _some(cell: Cell, seed: int) -> Cell:
    """A cell of at most so many images, chosen by chance but always the same."""
    random = np.random.default_rng(seed)

    def choose(positions: list[int]) -> list[int]:
        return sorted(random.permutation(positions)[:_IMAGES].tolist())

    return replace(cell, normal=choose(sorted(cell.good)), anomalous=choose(cell.anomalous))
