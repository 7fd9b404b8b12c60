"""The normal centre of every level, and how long normal residuals are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError


class NormalStatistics(NamedTuple):
    """What normal residuals have in common.

    Attributes:
        centers: L tensors (C,), float32: the mean residual.
        mean_norms: (L,), float64: the mean length of a residual.
    """

    centers: list[Tensor]
    mean_norms: Tensor

    def residual_scale(self) -> tuple[float, ...]:
        """One factor per level that makes normal residuals 1 long on average: ``ADPretrainConfig.residual_scale``.

        Residuals that are scaled by it have the centres ``centers[l] * residual_scale()[l]``.
        """
        return tuple((1 / self.mean_norms).tolist())


def normal_statistics(batches: Iterable[Sequence[Tensor]]) -> NormalStatistics:
    """Centres and mean lengths of the raw residuals of normal images (paper, section 3.4; released ``get_center``).

    One batch is held at a time; sums are in float64.

    Args:
        batches: each L maps (B, C, h, w), the residuals of normal images against references of their own kind.

    Raises:
        InputError: no batches, residuals that are not finite, or a level where all are 0, as they are where images are
            their own references.
    """
    sums: list[Tensor] = []
    lengths: list[Tensor] = []
    patches = 0
    for levels in batches:
        batch_sums = [level.sum(dim=(0, 2, 3), dtype=torch.float64) for level in levels]
        batch_lengths = [level.float().norm(dim=1).sum(dtype=torch.float64) for level in levels]
        sums = [a + b for a, b in zip(sums, batch_sums, strict=True)] if sums else batch_sums
        lengths = [a + b for a, b in zip(lengths, batch_lengths, strict=True)] if lengths else batch_lengths
        patches += levels[0][:, 0].numel()
    if not patches:
        raise InputError("no residuals were given: expected those of at least one normal image")
    mean_norms = torch.stack(lengths) / patches
    _check(mean_norms)
    return NormalStatistics([(level / patches).float() for level in sums], mean_norms)


def _check(mean_norms: Tensor) -> None:
    for level, length in enumerate(mean_norms.tolist()):
        if not 0 < length < float("inf"):
            raise InputError(
                f"the normal residuals of level {level} are {length} long on average, expected a finite length > 0: "
                "no image may be its own reference, and no image or reference may hold NaN"
            )
