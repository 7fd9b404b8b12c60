"""A miniature folder data set for anomalib, and an engine that is quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from PIL import Image
from torch import Tensor

SIZES = [(48, 40), (40, 40), (36, 52)]  # width and height, of images in turn


def write_images(root: Path) -> Path:
    """Eight normal training images, four normal and five anomalous ones to test, with masks; sizes differ."""
    for number in range(8):
        texture(number).save(_folder(root, "train") / f"{number}.png")
    for number in range(8, 12):
        texture(number).save(_folder(root, "normal_test") / f"{number}.png")
    for number in range(12, 17):
        image, mask = _with_defect(number)
        image.save(_folder(root, "defect") / f"{number}.png")
        mask.save(_folder(root, "mask") / f"{number}.png")
    return root


def datamodule(root: Path, **settings: Any) -> Folder:
    """anomalib's data module of what ``write_images`` wrote; the images to validate on are those to test on."""
    defaults = {"abnormal_dir": "defect", "mask_dir": "mask", "val_split_mode": "same_as_test"}
    defaults |= {"train_batch_size": 3, "eval_batch_size": 4}
    return Folder(
        name="tiny", root=root, normal_dir="train", normal_test_dir="normal_test", num_workers=0, **defaults | settings
    )


def normal_datamodule(root: Path, **settings: Any) -> Folder:
    """The same without anomalies: half of the training images are those to validate on."""
    none = {"abnormal_dir": None, "mask_dir": None, "val_split_mode": "from_train", "seed": 0}
    return datamodule(root, **none | settings)


def engine(root: Path, **settings: Any) -> Engine:
    """An engine on the CPU, with its results below a folder."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=root, accelerator="cpu", devices=1, **quiet | {"max_epochs": 1} | settings)


def predict(run: Engine, model: AnomalibModule, folder: Path, **settings: Any) -> tuple[Tensor, Tensor]:
    """Maps (N, H, W) and scores (N,) of all test images."""
    batches = run.predict(model, datamodule=datamodule(folder), **settings)
    maps = torch.cat([batch.anomaly_map.flatten(0, -3) for batch in batches])
    return maps, torch.cat([batch.pred_score.flatten() for batch in batches])


def _folder(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    return root / name


def texture(seed: int) -> Image.Image:
    """A normal image."""
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).normal(110, 12, (height, width, 3)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _with_defect(seed: int) -> tuple[Image.Image, Image.Image]:
    image = np.array(texture(seed))
    mask = np.zeros(image.shape[:2], dtype=np.uint8)
    mask[14:24, 14:24] = 255
    image[mask > 0] = (250, 20, 20)
    return Image.fromarray(image), Image.fromarray(mask)
