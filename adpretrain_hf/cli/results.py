"""What ``extract`` and ``score`` leave: a file of features or a map for each image, tables, and overlays."""

import json
import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.cli.folder_run import FolderRun
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.files import atomic_path, write_csv, write_text
from adpretrain_hf.images import read_image
from adpretrain_hf.overlays import colour_range, overlay
from adpretrain_hf.scoring import ScoredImage, place_map

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


def write_scores(run: FolderRun) -> None:
    """Writes ``scores.csv`` and ``scores.json``, the latter with the run's settings and the images that failed."""
    names, categories = run.images.names, run.images.categories
    header = ("image", "category", "score") if categories else ("image", "score")
    told = {image: (names[image], categories[image]) if categories else (names[image],) for image in names}
    scores = [(*told[image], float(load_score(path)["score"])) for image, path in run.results().items()]
    write_csv(run.output / "scores.csv", header, scores)
    report = {
        "settings": dict(sorted(run.settings.items())),
        "scores": [dict(zip(header, row, strict=True)) for row in scores],
        "failures": [{"image": name, "error": error} for name, error in run.errors.items()],
    }
    write_text(run.output / "scores.json", json.dumps(report, indent=2) + "\n")


def write_overlays(run: FolderRun) -> None:
    """Draws every image that has a result with its map over it into ``overlays/``, in a range of colours a product."""
    products: dict[str, dict[str, Path]] = {}
    for image, path in run.results().items():
        products.setdefault(run.images.categories.get(image, ""), {})[image] = path
    for results in products.values():
        _draw(run, results)


def _draw(run: FolderRun, results: dict[str, Path]) -> None:
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
        with atomic_path(run.result_path(image, "overlays")) as temporary:
            overlay(picture, anomaly.numpy(), colours, box).save(temporary)
