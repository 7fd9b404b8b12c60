"""Made-up results of a run: scores and maps that detectors could have given, and the metrics of these very scores."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from training.evaluation.metrics import auroc, precision_recall
from training.evaluation.plan import FEATURES, Cell
from training.evaluation.store import METRICS, PatchSample, Result, Shown, save_patches, save_result

VARIANTS = {"patchcore": "angle", "padim": "angle", "cflow": "norm", "glass": "norm", "uniad": "norm"}
NAMES = [f"test/crack/{number:03}.png" for number in range(6)] + [f"test/good/{number:03}.png" for number in range(6)]


def made_up_cell(
    data_set: str = "visa",
    category: str = "candle",
    detector: str = "patchcore",
    features: str = "raw",
    shots: int = 8,
    noise: float = 0.0,
    fraction: float = 1.0,
    seed: int = 0,
) -> Cell:
    """A cell, with the variant that is published for its detector."""
    variant = VARIANTS.get(detector, "norm") if features == "pretrained" else ""
    return Cell(data_set, category, detector, features, variant, shots, noise, fraction, seed)


def made_up_result(cell: Cell, *, masks: bool = True) -> Result:
    """Scores of 12 test images, half of them anomalous, drawn by the cell's name; better ones for pretrained."""
    random = np.random.default_rng(list(cell.name.encode()))
    is_anomalous = np.arange(12) < 6
    scores = random.normal(size=12) + is_anomalous * (0.5 + FEATURES.index(cell.features))
    measured = [auroc(scores, is_anomalous), *precision_recall(scores, is_anomalous)]
    pixels = random.uniform(0.5, 1, size=4) if masks else [None] * 4
    metrics = dict(zip(METRICS, [*measured, *pixels], strict=True))
    return Result(cell, metrics, scores.tolist(), is_anomalous.tolist(), NAMES, seconds=1.5)


def result_of(cell: Cell, value: float | None, **metrics: float | None) -> Result:
    """A result all of whose metrics are ``value``, but for those that are given."""
    return Result(cell, dict.fromkeys(METRICS, value) | metrics, [0.1, 0.9], [False, True], ["a.png", "b.png"], 1.0)


def made_up_shown(cell: Cell, number: int = 4, side: int = 64) -> Shown:
    """Images of noise with a square on each; its map is high on the square."""
    random = np.random.default_rng(list(cell.name.encode()))
    masks = np.zeros((number, side, side), dtype=bool)
    images = random.integers(90, 160, (number, side, side, 3), dtype=np.uint8)
    for place, (top, left) in enumerate(random.integers(4, side - 20, (number, 2))):
        masks[place, top : top + 14, left : left + 14] = True
    images[masks] //= 3
    maps = random.random((number, side, side)) * 0.2 + masks
    return Shown(np.arange(number), images, masks, maps.astype(np.float16))


def made_up_patches(data_set: str, category: str, features: str, number: int = 60) -> PatchSample:
    """Two clouds of patches in 8 dimensions, further apart for pretrained features."""
    random = np.random.default_rng(list(f"{data_set}{category}{features}".encode()))
    is_anomalous = np.arange(number) % 3 == 0
    values = random.normal(size=(number, 8)) + (1 + 3 * (features == "pretrained")) * is_anomalous[:, None]
    variant = "angle" if features == "pretrained" else ""
    return PatchSample(data_set, category, features, variant, values.astype(np.float32), is_anomalous)


def write_run(
    folder: Path,
    *,
    data_sets: Iterable[str] = ("mvtecad", "folder"),
    categories: Iterable[str] = ("bottle", "tile", "zipper"),
    detectors: Iterable[str] = ("patchcore", "featurenorm"),
    patches: int = 60,
    side: int = 64,
) -> list[Cell]:
    """Writes a run of all detectors and features on all categories; ``"folder"`` has no masks. Returns its cells."""
    cells = [
        made_up_cell(data_set, category, detector, features)
        for data_set in data_sets
        for category in categories
        for detector in detectors
        for features in FEATURES
    ]
    for cell in cells:
        save_result(folder, made_up_result(cell, masks=cell.data_set != "folder"), made_up_shown(cell, side=side))
    for name in sorted({(cell.data_set, cell.category) for cell in cells}):
        for features in ("raw", "pretrained"):
            save_patches(folder, made_up_patches(*name, features, patches))
    return cells
