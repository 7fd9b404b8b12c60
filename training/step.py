"""One step of training: a batch and its references -> the loss. Every backbone goes through the same few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.matching import nearest_residual, to_rows
from training.distributed import gather_rows
from training.losses import angle_loss, norm_loss
from training.samples import Batch
from training.settings import PretrainSettings
from training.views import normalize

LevelPatches = list[Tensor]  # L x (K, C): the reference patches of one image


@dataclass
class StepLoss:
    """The loss of a step and, detached, its parts: scalars on the device."""

    total: Tensor
    angle: Tensor
    norm: Tensor


class PretrainStep:
    """Computes the loss of a batch (paper, section 3; released ``train.py``).

    Args:
        extractor: gives the frozen backbone, the configuration and the device.
        projectors: what is trained: the extractor's projectors, or ``DistributedDataParallel`` around them.
        centers: L x (C,), the normal centres.
        settings: weights of the losses, margin, temperature, precision.
    """

    def __init__(
        self,
        extractor: ADPretrainFeatureExtractor,
        projectors: nn.Module,
        centers: Sequence[Tensor],
        settings: PretrainSettings,
    ) -> None:
        self._extractor, self._projectors, self._settings = extractor, projectors, settings
        self._device = extractor.device
        self._centers = [center.to(self._device) for center in centers]

    def __call__(self, batch: Batch, references: Sequence[LevelPatches]) -> StepLoss:
        """The loss over the images of all processes; see ``training/losses.py`` for its gradients.

        Args:
            batch: B images.
            references: the reference patches of each of them, as ``encode`` gives them.
        """
        residuals = self.residuals(self.encode(batch), references)
        with autocast(self._device, self._settings.precision):
            features = self._projectors(residuals)
        return self.loss(features, batch)

    @torch.no_grad()
    def encode(self, batch: Batch) -> list[Tensor]:
        """Tokens of both views, the first views before the second: L x (2 B, C, h, w)."""
        config = self._extractor.config
        pixels = batch.views.to(self._device, non_blocking=True).flatten(0, 1)
        with autocast(self._device, self._settings.precision):
            return self._extractor.encode(normalize(pixels, config.mean, config.std))

    @torch.no_grad()
    def residuals(self, tokens: Sequence[Tensor], references: Sequence[LevelPatches]) -> list[Tensor]:
        """Scaled residuals of both views, each image's against its own references: L x (2 B, C, h, w)."""
        scales = self._extractor.config.residual_scale
        return [
            scales[level] * _match(maps, [patches[level] for patches in references])
            for level, maps in enumerate(tokens)
        ]

    def loss(self, features: Sequence[Tensor], batch: Batch) -> StepLoss:
        """Both losses, summed over the levels, from the features of both views: L x (2 B, C, h, w)."""
        labels = torch.stack([batch.angle_labels.flatten(), batch.norm_labels.flatten()], dim=1)
        angle_labels, norm_labels = gather_rows(labels).unbind(1)
        angle, norm = features[0].new_zeros((), dtype=torch.float32), features[0].new_zeros((), dtype=torch.float32)
        settings = self._settings
        for level, center in zip(features, self._centers, strict=True):
            first, second = (to_rows(view.float()) for view in level.chunk(2))
            angle = angle + angle_loss(first, second, angle_labels, center=center, temperature=settings.temperature)
            for view in (first, second):
                norm = norm + norm_loss(view, norm_labels, margin=settings.margin)
        return StepLoss(settings.angle_weight * angle + norm, angle.detach(), norm.detach())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or none; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _match(maps: Tensor, references: Sequence[Tensor]) -> Tensor:
    residuals = torch.empty_like(maps, dtype=torch.float32)
    images = len(references)
    for image, patches in enumerate(references):
        residuals[image::images] = nearest_residual(maps[image::images].float(), patches.float())
    return residuals
