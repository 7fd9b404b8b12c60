"""What ``extract`` and ``score`` leave: a file of features or a map for each image, tables, and overlays."""

import json
import logging
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.cli.folder_run import FolderRun
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, remove, write_csv, write_text
from adpretrain_hf.images import read_image
from adpretrain_hf.overlays import ColourRange, calibrated_colours, colour_range, framed, outlined, overlay
from adpretrain_hf.scoring import Judgement, Region, ScoredImage, mark_regions, of_product, place_map, required

_LOG = logging.getLogger(__name__)
Result = dict[str, Tensor]
_COLUMNS = ("image", "category", "score", "p_value", "decision", "confidence")
_REGION_COLUMNS = ("image", "top", "left", "height", "width", "area", "peak", "mean")


def _save_npz(features: Result, path: Path) -> None:
    with path.open("wb") as file:
        arrays = {name: value.float() if value.is_floating_point() else value for name, value in features.items()}
        np.savez(file, **{name: value.numpy() for name, value in arrays.items()})  # type: ignore[arg-type]


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
class Decision:
    """How the scores of a product are decided, and how its maps are drawn.

    Attributes:
        judgement: of its reference; without a calibration there are scores alone.
        false_alarms: the rate, or None for the calibration's own.
        colours: or None: then they are of the maps of the run.
        regions: ``min_area`` and ``at_most`` of the regions that are looked for, or None.
    """

    judgement: Judgement
    false_alarms: float | None
    colours: ColourRange | None
    regions: dict[str, Any] | None

    def row(self, score: float) -> dict[str, Any]:
        """What is written of a score."""
        if (calibration := self.judgement.calibration) is None:
            return {"score": score}
        return {
            "score": score,
            "p_value": calibration.p_value(score),
            "decision": "anomalous" if calibration.is_anomalous(score, self.false_alarms) else "normal",
            "confidence": calibration.confidence(score, self.false_alarms),
        }

    def about(self) -> dict[str, Any]:
        """What all rows are decided by."""
        if (calibration := self.judgement.calibration) is None:
            return {}
        return {
            "false_alarms": self.false_alarms or calibration.false_alarms,
            "threshold": calibration.threshold(self.false_alarms),
            "calibration_images": len(calibration.scores),
            "approximate": calibration.approximate,
        }

    def full_size_map(self, result: Result) -> Tensor:
        """The map (H, W) of what ``load_score`` read."""
        size, box = (tuple(result[name].tolist()) for name in ("size", "box"))
        return self.judgement.within(place_map(result["map"], size, box))

    def regions_of(self, anomaly: Tensor) -> tuple[list[Region], np.ndarray]:
        """Where a map (H, W) is anomalous, if that is looked for, and the pixels (H, W) of that."""
        if self.regions is None:
            return [], np.zeros(anomaly.shape, dtype=bool)
        threshold = required(self.judgement.calibration).pixel_threshold(self.false_alarms)
        return mark_regions(anomaly, threshold, **self.regions)

    def draw(self, picture: Image.Image, result: Result, colours: ColourRange) -> Image.Image:
        """The picture with its map over it, its regions outlined, framed by its decision."""
        anomaly, box = self.full_size_map(result), tuple(result["box"].tolist())
        drawn = overlay(picture, anomaly.numpy(), colours, box)
        if (calibration := self.judgement.calibration) is None:
            return drawn
        if self.regions is not None:
            drawn = outlined(drawn, self.regions_of(anomaly)[1])
        return framed(drawn, calibration.is_anomalous(float(result["score"]), self.false_alarms))


def decisions_of(extractor: ADPretrainFeatureExtractor, args: Namespace) -> dict[str, Decision]:
    """The decision of every product whose reference is set, by category.

    Raises:
        InputError: what is asked for needs a calibration and there is none, or a rate that it does not allow.
    """
    regions = {"min_area": args.min_area or 1, "at_most": args.max_regions} if args.regions else None
    decisions = {}
    for category, judgement in extractor.judgements.items():
        calibration = judgement.calibration
        if args.regions or args.fail_on_anomaly or args.false_alarms is not None:
            with of_product(category):
                calibration = required(calibration)
                calibration.threshold(args.false_alarms)
        colours = calibrated_colours(calibration) if calibration else None
        colours = ColourRange(*args.colours) if args.colours else colours
        decisions[category] = Decision(judgement, args.false_alarms, colours, regions)
    return decisions


def write_scores(run: FolderRun, decisions: Mapping[str, Decision]) -> int:
    """Writes ``scores.csv`` and ``scores.json``, the latter with the run's settings and the images that failed.

    Returns:
        How many images are anomalous.
    """
    names, categories = run.images.names, run.images.categories
    rows: list[dict[str, Any]] = []
    places: list[tuple[Any, ...]] = []
    for image, path in run.results().items():
        decision, result = _own(run, image, decisions), load_score(path)
        told = {"image": names[image]} | ({"category": categories[image]} if categories else {})
        rows.append(told | decision.row(float(result["score"])))
        if decision.regions is not None:
            regions, _ = decision.regions_of(decision.full_size_map(result))
            places += [(names[image], *region.box, region.area, region.peak, region.mean) for region in regions]
            rows[-1]["regions"] = [asdict(region) for region in regions]
    columns = [name for name in _COLUMNS if name in ("image", "score") or any(name in row for row in rows)]
    write_csv(run.output / "scores.csv", tuple(columns), [tuple(row.get(name, "") for name in columns) for row in rows])
    listed = run.output / "regions.csv"
    if any(decision.regions is not None for decision in decisions.values()):
        write_csv(listed, _REGION_COLUMNS, places)
    else:
        remove(listed)  # of an earlier run, whose images may be others now
    about = {category: decision.about() for category, decision in decisions.items()}
    report = {
        "settings": dict(sorted(run.settings.items())),
        "decision": about if categories else next(iter(about.values())),
        "scores": rows,
        "failures": [{"image": name, "error": error} for name, error in run.errors.items()],
    }
    write_text(run.output / "scores.json", json.dumps(report, indent=2) + "\n")
    return sum(row.get("decision") == "anomalous" for row in rows)


def write_overlays(run: FolderRun, decisions: Mapping[str, Decision]) -> None:
    """Draws every image that has a result with its map over it into ``overlays/``, framed by its decision."""
    results = run.results()
    for decision in decisions.values():
        own = {image: path for image, path in results.items() if _own(run, image, decisions) is decision}
        _draw(run, own, decision)


def _own(run: FolderRun, image: str, decisions: Mapping[str, Decision]) -> Decision:
    return decisions[run.images.categories.get(image, next(iter(decisions)))]


def _draw(run: FolderRun, results: dict[str, Path], decision: Decision) -> None:
    if not results:
        return
    if (colours := decision.colours) is None:
        _LOG.warning("the reference has no calibration: the overlays' colours are of this run alone; give --colours")
        colours = colour_range(load_score(path)["map"].numpy() for path in results.values())
    for image, path in results.items():
        try:
            picture = read_image(run.images.source(image), image)
        except ImageError as error:  # gone since it was scored: its score stands, and the others get their picture
            _LOG.warning("no overlay is drawn: %s", error)
            continue
        drawn = decision.draw(picture, load_score(path), colours)
        with atomic_path(run.result_path(image, "overlays")) as temporary:
            drawn.save(temporary)
