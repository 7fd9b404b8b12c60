"""The losses of patches that are given one by one, with their labels, as the formulas have them."""

from __future__ import annotations

import torch
from torch import Tensor

from training import losses


def angle_loss(
    first: Tensor, second: Tensor, is_anomalous: Tensor, *, center: Tensor | None, temperature: float = 0.15,
    ignored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Of patches (N, C) in two views, with labels (P N,), bool."""
    rows = losses.Rows.of(labels_of(is_anomalous, ignored), first.device)
    return losses.angle_loss(torch.stack([first, second]), rows, center, temperature)


def norm_loss(
    features: Tensor, is_anomalous: Tensor, *, r_max: float = 0.4, margin: float = 0.75, ignored: Tensor | None = None
) -> Tensor:
    """Of patches (N, C) with labels (P N,), bool."""
    with torch.autocast(features.device.type, enabled=False):
        lengths = features.float().norm(dim=1)[None]
        return losses.norm_loss(lengths, labels_of(is_anomalous, ignored), r_max, margin)


def labels_of(is_anomalous: Tensor, ignored: Tensor | None) -> Tensor:
    labels = is_anomalous.byte()
    return labels if ignored is None else labels.masked_fill(ignored, 2)
