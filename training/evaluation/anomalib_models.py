"""anomalib's detectors on a bundle's features: fitted and asked by Lightning's trainer, without a word."""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from adpretrain_hf.images import Preprocessor
from adpretrain_hf.integrations.anomalib import DetectorFeatures
from adpretrain_hf.reference import ReferenceBank
from training.data.table import Row

_IMAGES = 64  # whose maps are made at a time
_TEXTURES = (".jpg", ".jpeg", ".png", ".webp")


def image_batches(
    rows: Sequence[Row], preprocess: Preprocessor, size: int, workers: int, *, shuffle: bool = False
) -> DataLoader[ImageBatch]:
    """Images of a category as anomalib's models take them, prepared exactly as the extractor prepares them.

    Args:
        rows: of the images.
        preprocess: of the extractor. Models must not prepare images again: ``pre_processor=False``.
        size: images of a batch.
        workers: processes that read them.
        shuffle: anew for every pass.
    """
    collate = functools.partial(_batch, preprocess)
    return DataLoader(list(rows), size, shuffle, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]


def _batch(preprocess: Preprocessor, rows: list[Row]) -> ImageBatch:
    images = [(preprocess.prepare(row.image).tensor, torch.tensor(row.is_anomalous), row.image) for row in rows]
    return ImageBatch.collate([ImageItem(image=image, gt_label=label, image_path=at) for image, label, at in images])


class CategoryFeatures(DetectorFeatures):
    """``DetectorFeatures`` of several categories: a training image is compared with the references of its own.

    Args:
        features: of one.
        levels: block numbers.
        banks: for the path of each training image its category's references, and their paths.
    """

    def __init__(
        self, features: DetectorFeatures, levels: Sequence[int], banks: Mapping[str, tuple[ReferenceBank, list[str]]]
    ) -> None:
        super().__init__(features.extractor, features.kind, levels)
        self._banks, self._noted = banks, list[str]()

    def note_own(self, names: Sequence[str]) -> None:
        """See ``DetectorFeatures``."""
        self._noted = list(map(str, names))
        super().note_own([])  # of the last group; forward says it of each

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See ``DetectorFeatures``."""
        if not self._noted or not self.needs_reference:
            return super().forward(images)
        of_image = [self._banks[name] for name in self._noted]
        maps: dict[str, Tensor] = {}
        for bank, names in {id(bank): (bank, names) for bank, names in of_image}.values():
            rows = [row for row, (own, _) in enumerate(of_image) if own is bank]
            self.set_reference(bank, names)
            super().note_own([self._noted[row] for row in rows])
            for name, part in super().forward(images[rows]).items():
                maps.setdefault(name, part.new_empty(len(images), *part.shape[1:]))[rows] = part
        return maps


def give_textures(model: Any, images: Sequence[Path]) -> None:
    """Lets a model that paints anomalies take textures from images, where it was given none; else they are noise.

    Those of other suffixes are passed over: the generator reads them by ``torchvision.io``.
    """
    images = [image for image in images if image.suffix.lower() in _TEXTURES]
    for generator in model.modules():
        if isinstance(generator, PerlinAnomalyGenerator) and not generator.anomaly_source_paths:
            generator.anomaly_source_paths = list(images)


def fit(model: Any, images: DataLoader, *, epochs: int, device: torch.device) -> None:
    """Fits a model on training images.

    Args:
        model: one of anomalib's.
        images: batches of them.
        epochs: passes over them, for models that do not have their own number.
        device: to fit on.
    """
    with quietly():
        _trainer(model, device, epochs).fit(model, train_dataloaders=images)


def predict(model: Any, images: DataLoader, *, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, S, S) and scores (N,) of test images, float32.

    Args:
        model: that was fitted.
        images: batches of them.
        device: to compute on.
    """
    with quietly():
        batches = _trainer(model, device, 1).predict(model, dataloaders=images)
    maps = np.concatenate([_array(batch.anomaly_map) for batch in batches])
    scores = np.concatenate([_array(batch.pred_score) for batch in batches])
    return maps.reshape(len(maps), *maps.shape[-2:]), scores.ravel()


def predict_likelihoods(model: Any, images: DataLoader, *, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """``predict`` of CFLOW, whose likelihoods are divided by the largest of all test images, as published.

    anomalib divides by the largest of a batch, which would have to hold them all: instead a batch gives its likelihoods
    alone, one number for a patch and level.
    """
    generator, kept = model.model.anomaly_map_generator, _Likelihoods()
    model.model.anomaly_map_generator = kept
    try:
        predict(model, images, device=device)
    finally:
        model.model.anomaly_map_generator = generator
    levels = [torch.cat(level) for level in zip(*kept.levels, strict=True)]
    largest = [level.max() for level in levels]
    likelihoods = []
    for parts in zip(*(level.split(_IMAGES) for level in levels), strict=True):
        scaled = [(part - most).exp()[:, None] for part, most in zip(parts, largest, strict=True)]
        upsampled = (F.interpolate(one, kept.size, mode="bilinear", align_corners=True)[:, 0] for one in scaled)
        likelihoods.append(torch.stack(list(upsampled)).sum(dim=0).numpy())
    maps = np.concatenate(likelihoods)
    np.subtract(maps.max(), maps, out=maps)
    return maps, maps.max(axis=(1, 2))


class _Likelihoods(nn.Module):
    """Stands in for anomalib's maps of a batch, and keeps what they are made of: L maps (B, h, w) of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[list[torch.Tensor]] = []
        self.size: tuple[int, int] = (0, 0)

    def forward(
        self, distribution: list[torch.Tensor], height: list[int], width: list[int], image_size: tuple[int, int]
    ) -> torch.Tensor:
        """Keeps the likelihoods, L tensors (B * h * w,), and returns maps of nothing, (B, 1, 1)."""
        grids = zip(distribution, height, width, strict=True)
        self.levels.append([level.reshape(-1, h, w).float().cpu() for level, h, w in grids])
        self.size = (int(image_size[0]), int(image_size[1]))
        return torch.zeros(len(self.levels[-1][0]), 1, 1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _trainer(model: Any, device: torch.device, epochs: int) -> Any:
    from lightning.pytorch import Trainer

    arguments = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        # Tensors made in inference mode cannot be trained on, and those that are remembered may be.
        "inference_mode": False,
    }
    own = {name: value for name, value in model.trainer_arguments.items() if name != "devices"}
    return Trainer(**arguments | own)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what Lightning and anomalib say, warn of and draw bars for off the terminal; Ctrl-C comes through."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "anomalib")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except SystemExit as stop:
        # Lightning makes a KeyboardInterrupt an exit.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
