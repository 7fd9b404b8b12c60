"""Judging every epoch on the validation categories, and keeping the best weights for each variant."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from training.data.sources import TrainingData
from training.evaluation.detectors import FeatureNorm, PatchCore, PublishedDetector
from training.evaluation.encoded import EncodedImages, feature_maker, fit_and_score
from training.evaluation.metrics import auroc, pixel_metrics
from training.run import distributed
from training.run.folder import RunFolder
from training.run.reporting import Reporter, scores_text
from training.run.state import Progress
from training.seeds import named_generator
from training.settings import PretrainSettings

# Each variant goes with the detector that it is chosen under (paper, appendix; released code).
DETECTOR_OF: Mapping[str, type[PublishedDetector]] = {"angle": PatchCore, "norm": FeatureNorm}
_DRAWS = 2  # of references
_IMAGES = 40  # of a cell, normal and anomalous ones each: enough to choose an epoch by
_BATCH = 64  # images whose features are in memory
_LOG = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]  # by detector and metric


class Cell(NamedTuple):
    """Images of one view of a category.

    Attributes:
        images: N of them, encoded.
        usable: places of those that can be used.
        is_anomalous: (N,), bool.
        draws: of references, their places.
    """

    images: EncodedImages
    usable: list[int]
    is_anomalous: Tensor
    draws: list[list[int]]

    @classmethod
    def of(
        cls, extractor: ADPretrainFeatureExtractor, view: Dataset, shots: int, seed: int, file: Path
    ) -> "Cell | None":
        """Encodes some images of a view, chosen by chance but always the same; None where there are too few."""
        random, labels = np.random.default_rng(seed), np.array(view["is_anomalous"])
        some = [random.permutation(np.flatnonzero(labels == label))[:_IMAGES] for label in (False, True)]
        rows = [view[position] for position in sorted(np.concatenate(some).tolist())]
        images = EncodedImages(extractor, [row["image"] for row in rows], [row["mask"] for row in rows], file)
        usable = images.encode(range(len(rows)), lambda _, error: _LOG.warning("left out of the validation: %s", error))
        good = [place for place in usable if rows[place]["is_good"]]
        normal = [place for place in usable if not rows[place]["is_anomalous"]]
        if len(good) < shots or not shots < len(normal) < len(usable):
            return None
        draws = [
            named_generator(draw, rows[0]["category"], rows[0]["view"]).choice(good, shots, replace=False).tolist()
            for draw in range(_DRAWS)
        ]
        return cls(images, usable, torch.tensor([row["is_anomalous"] for row in rows]), draws)

    def scores(
        self, extractor: ADPretrainFeatureExtractor, detector: type[PublishedDetector], references: list[int]
    ) -> dict[str, float]:
        """How well a detector does that is fitted on some references, on all other images."""
        make = feature_maker(self.images, extractor, "pretrained", references)
        test = torch.tensor([place for place in self.usable if place not in references])
        maps, scores = fit_and_score(detector(), make, torch.tensor(references), test, self.images, _BATCH)
        pixels, pro = pixel_metrics(maps, self.images.masks(test))
        return {"image_auroc": auroc(scores, self.is_anomalous[test]), "pixel_auroc": pixels, "aupro": pro}


class Validation:
    """Scores the projectors on the validation categories, in the first process alone.

    A cell is a category's view. For each draw of references, detectors are fitted on their features, each taken against
    the others, and tested on all other images of the cell against all references.

    Args:
        settings: of the run.
        run: where the best weights and, while it goes on, the tokens go.
        data: the data and the names of the validation categories; without any, the last weights are kept.
        extractor: whose projectors are judged; the images are encoded now.

    Raises:
        InputError: a validation category has no view with enough images.
    """

    def __init__(
        self, settings: PretrainSettings, run: RunFolder, data: TrainingData, extractor: ADPretrainFeatureExtractor
    ) -> None:
        self._run, self._extractor, self._cells = run, extractor, list[Cell]()
        if distributed.rank() > 0 or not data.validation:
            return
        columns = pd.DataFrame({name: list(data.dataset[name]) for name in ("category", "view")})
        views = columns[columns["category"].isin(data.validation)].groupby(["category", "view"]).groups
        missing, file = set(data.validation), run.cache / "validation.bin"
        for (name, view), positions in tqdm(sorted(views.items()), unit="cell", desc="validation images"):
            cell = Cell.of(extractor, data.dataset.select(positions.tolist()), settings.shots, settings.seed, file)
            if cell is None:
                _LOG.warning("%s %s is left out of the validation: it has too few images that can be used", name, view)
                continue
            self._cells.append(cell)
            missing.discard(name)
        if missing:
            raise InputError(
                f"the validation categories {sorted(missing)} have no view with an anomalous image and more than "
                f"{settings.shots} normal ones: name others, or lower --shots"
            )

    def end_epoch(self, progress: Progress, reporter: Reporter, unreadable: Sequence[str]) -> None:
        """Scores the epoch that has just ended, and keeps the weights where they are the best so far."""
        scores: Scores = {}
        if distributed.rank() == 0:
            scores = self.scores(self._extractor)
            for variant, detector in DETECTOR_OF.items():
                own = scores.get(detector.__name__)
                score = (own["image_auroc"] + own["aupro"]) / 2 if own else 0.0
                if not own or variant not in progress.best or score > progress.best[variant]["score"]:
                    progress.best[variant] = {"epoch": progress.epoch + 1, "score": score}
                    self._run.save_variant(variant, self._extractor.projectors)
        record: dict[str, Any] = {"epoch": progress.epoch + 1, "validation": scores, "unreadable": list(unreadable)}
        untrained = f" (untrained: {scores_text(progress.baseline)})"
        progress.history.append(record | reporter.end_epoch(progress.epoch, scores, untrained))
        if distributed.rank() == 0:
            self._run.write_metrics(progress)
        distributed.anyone(False)  # the others wait

    def baseline(self) -> Scores:
        """What the residuals score that the projectors are given: new projectors are the identity."""
        extractor = self._extractor
        return self.scores(ADPretrainFeatureExtractor(extractor.config, extractor.backbone).to(extractor.device))

    def scores(self, extractor: ADPretrainFeatureExtractor) -> Scores:
        """Means over the cells and draws, by detector and metric; nothing where there is no cell."""
        extractor.projectors.zero_grad(set_to_none=True)  # or their constants are computed again for every cell
        rows = {
            detector.__name__: [cell.scores(extractor, detector, draw) for cell in self._cells for draw in cell.draws]
            for detector in (DETECTOR_OF.values() if self._cells else ())
        }
        return {name: {metric: fmean(row[metric] for row in own) for metric in own[0]} for name, own in rows.items()}
