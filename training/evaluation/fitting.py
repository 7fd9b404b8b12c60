"""Fitting a detector and asking it, by Lightning's trainer, without a word."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

_IMAGES = 64  # whose maps are made at a time


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


def seed(number: int) -> None:
    """Seeds everything that models draw."""
    from lightning.pytorch import seed_everything

    seed_everything(number, verbose=False)


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
