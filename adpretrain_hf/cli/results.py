"""What ``extract`` and ``score`` leave: a file of features or a map for each image, tables, and overlays."""

import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.cli.folder_run import FolderRun
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, write_csv, write_text
from adpretrain_hf.images import read_image
from adpretrain_hf.overlays import ColourRange, calibrated_colours, colour_range, framed, overlay
from adpretrain_hf.scoring import Calibration, ScoredImage, place_map, required

_LOG = logging.getLogger(__name__)
Result = dict[str, Tensor]


def _save_npz(features: Result, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{layer: level.float().numpy() for layer, level in features.items()})  # type: ignore[arg-type]


FEATURE_FORMATS: dict[str, Callable[[Result, Path], None]] = {"safetensors": save_file, "npz": _save_npz}
"""Writers of features, the levels ``layer<n>`` (C, h, w), by the name of the format."""


def save_score(scored: ScoredImage, path: Path) -> None:
    """Writes an image's map at the size of the network's input, its score, and where the map belongs in the image.

    ``map`` (H', W'); ``score``; ``size``, H and W of the image; ``box``: top, left, height and width of the part of the
    image that the map shows.
    """
    image = scored.image
    np.savez_compressed(path, map=scored.anomaly.numpy(), score=scored.score, size=image.size, box=image.box)


def load_score(path: Path) -> Result:
    """Reads what ``save_score`` wrote.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as result:
            return {key: torch.from_numpy(result[key]) for key in ("map", "score", "size", "box")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): remove it, and run the command again") from error


@dataclass(frozen=True)
class Decisions:
    """How a run's scores are decided, and in which colours its maps are drawn.

    Attributes:
        calibration: of the reference, or None: there are scores alone.
        false_alarms: the rate, or None for the calibration's own.
        colours: or None: then they are of the run's own maps.
    """

    calibration: Calibration | None
    false_alarms: float | None
    colours: ColourRange | None

    @classmethod
    def of(
        cls, extractor: ADPretrainFeatureExtractor, false_alarms: float | None, colours: Sequence[float] | None
    ) -> "Decisions":
        """Those of an extractor's reference.

        Raises:
            InputError: a rate without a calibration, or one that it does not allow.
        """
        calibration = extractor.judgement.calibration
        decisions = cls(calibration, false_alarms, ColourRange(*colours) if colours else None)
        if false_alarms is not None:
            decisions.required().threshold(false_alarms)
        elif calibration and not colours:
            return cls(calibration, None, calibrated_colours(calibration))
        return decisions

    def required(self) -> Calibration:
        """The calibration; InputError if there is none."""
        return required(self.calibration)

    def row(self, score: float) -> dict[str, Any]:
        """What is written of a score."""
        if self.calibration is None:
            return {"score": score}
        return {
            "score": score,
            "p_value": self.calibration.p_value(score),
            "decision": "anomalous" if self.calibration.is_anomalous(score, self.false_alarms) else "normal",
            "confidence": self.calibration.confidence(score),
        }

    def about(self) -> dict[str, Any]:
        """What all rows are decided by."""
        if self.calibration is None:
            return {}
        return {
            "false_alarms": self.false_alarms or self.calibration.false_alarms,
            "threshold": self.calibration.threshold(self.false_alarms),
            "calibration_images": len(self.calibration.scores),
            "approximate": self.calibration.approximate,
        }


def write_scores(run: FolderRun, decisions: Decisions) -> int:
    """Writes ``scores.csv`` and ``scores.json``, the latter with the run's settings and the images that failed.

    Returns:
        How many images are anomalous.
    """
    rows = [
        {"image": run.images.names[image], **decisions.row(float(load_score(path)["score"]))}
        for image, path in run.results().items()
    ]
    header = ("image", *decisions.row(0.0))
    write_csv(run.output / "scores.csv", header, [tuple(row.values()) for row in rows])
    report = {
        "settings": dict(sorted(run.settings.items())),
        "decision": decisions.about(),
        "scores": rows,
        "failures": [{"image": name, "error": error} for name, error in run.errors.items()],
    }
    write_text(run.output / "scores.json", json.dumps(report, indent=2) + "\n")
    return sum(row.get("decision") == "anomalous" for row in rows)


def write_overlays(run: FolderRun, decisions: Decisions) -> None:
    """Draws every image that has a result with its map over it into ``overlays/``, framed by its decision."""
    results = run.results()
    if not results:
        return
    if (colours := decisions.colours) is None:
        _LOG.warning("the reference has no calibration: the overlays' colours are of this run alone; give --colours")
        colours = colour_range(load_score(path)["map"].numpy() for path in results.values())
    for image, path in results.items():
        try:
            picture = read_image(run.images.source(image), image)
        except ImageError as error:  # gone since it was scored: its score stands, and the others get their picture
            _LOG.warning("no overlay is drawn: %s", error)
            continue
        result = load_score(path)
        box = tuple(result["box"].tolist())
        anomaly = place_map(result["map"], tuple(result["size"].tolist()), box)
        drawn = overlay(picture, anomaly.numpy(), colours, box)
        if decisions.calibration is not None:
            is_anomalous = decisions.calibration.is_anomalous(float(result["score"]), decisions.false_alarms)
            drawn = framed(drawn, is_anomalous)
        with atomic_path(run.result_path(image, "overlays")) as temporary:
            drawn.save(temporary)
