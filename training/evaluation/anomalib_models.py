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
from torch import Tensor
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
    """Images in batches of a size as anomalib's models take them, prepared exactly as the extractor prepares them.

    Models must not prepare images again: ``pre_processor=False``. So many worker processes read them; ``shuffle`` is
    anew for every pass.
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
        banks: for the path of each training image its category's references, and their paths.
    """

    def __init__(self, features: DetectorFeatures, banks: Mapping[str, tuple[ReferenceBank, list[str]]]) -> None:
        levels = [int(name.removeprefix("layer")) for name in features.layers]
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
    """Fits one of anomalib's models on batches of training images, so often if it does not have its own number."""
    from lightning.pytorch import Trainer

    is_gpu = device.type == "cuda"
    where = {"accelerator": "gpu" if is_gpu else device.type, "devices": [device.index or 0] if is_gpu else 1}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    own = {name: value for name, value in model.trainer_arguments.items() if name != "devices"}
    with quietly():
        Trainer(**{"max_epochs": epochs, **where, **off, **own}).fit(model, train_dataloaders=images)


@torch.no_grad()
def predict(model: Any, images: DataLoader, *, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, S, S) and scores (N,), float32, that a fitted model gives batches of test images."""
    network, parts = model.to(device).eval().model, []
    with quietly():
        for batch in images:
            found = network(batch.image.to(device))
            parts.append([part.float().cpu() for part in (found.anomaly_map, found.pred_score)])
    maps, scores = (torch.cat(own).numpy() for own in zip(*parts, strict=True))
    return maps.reshape(len(maps), *maps.shape[-2:]), scores.ravel()


def predict_likelihoods(model: Any, images: DataLoader, *, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """``predict`` of CFLOW, whose likelihoods are divided by the largest of all test images, as published.

    anomalib divides by the largest of a batch, which would have to hold them all: of its maps nothing is used but what
    they are made of, one likelihood for a patch and level.
    """
    given: list[dict[str, Any]] = []
    generator = model.model.anomaly_map_generator
    hook = generator.register_forward_pre_hook(lambda _, __, named: given.append(named), with_kwargs=True)
    predict(model, images, device=device)
    hook.remove()
    levels = []
    for place, grid in enumerate(zip(given[0]["height"], given[0]["width"], strict=True)):
        level = torch.cat([one["distribution"][place].reshape(-1, *grid).float().cpu() for one in given])
        levels.append((level - level.max()).exp()[:, None])
    sums = []
    for parts in zip(*(level.split(_IMAGES) for level in levels), strict=True):
        size = given[0]["image_size"]
        upsampled = [F.interpolate(part, size, mode="bilinear", align_corners=True)[:, 0] for part in parts]
        sums.append(torch.stack(upsampled).sum(dim=0).numpy())
    maps = np.concatenate(sums)
    np.subtract(maps.max(), maps, out=maps)
    return maps, maps.max(axis=(1, 2))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what Lightning and anomalib say, warn of and draw bars for off the terminal; Ctrl-C comes through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
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
        logging.disable(disabled)
