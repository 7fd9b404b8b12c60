"""PatchCore's embedding of a patch: its 3 x 3 neighbours at several levels, pooled to one width."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_IMAGES = 4  # at a time: more take memory that is slower to get, fewer are more calls


def embed_patches(features: Sequence[Tensor], width: int) -> Tensor:
    """Embeds every patch (Roth et al. 2022, section 3.1; released ``PatchMaker``, ``Preprocessing``, ``Aggregator``).

    At each level the C x 9 values of the 3 x 3 neighbours, zeros beyond the border, are average-pooled to ``width``;
    the levels one after the other are pooled to ``width`` again. Both together are one sparse linear map, which takes a
    sixth of the time of the two in turn.

    Args:
        features: L maps (B, C, h, w).
        width: D, of an embedding.

    Returns:
        (B, h*w, D), float32.
    """
    pooled = [
        _pool_levels([level[part : part + _IMAGES] for level in features], width)
        for part in range(0, len(features[0]), _IMAGES)
    ]
    return torch.cat(pooled)


def _pool_levels(features: Sequence[Tensor], width: int) -> Tensor:
    images, channels, height, breadth = features[0].shape
    embedded = features[0].new_zeros(width, images * height * breadth, dtype=torch.float32)
    for number, level in enumerate(features):
        embedded += torch.sparse.mm(_pooling(channels, len(features), number, width, level.device), _neighbours(level))
    return embedded.unflatten(1, (images, -1)).permute(1, 2, 0)


def _neighbours(level: Tensor) -> Tensor:
    """The 3 x 3 neighbours of every patch: (B, C, h, w) -> (C * 9, B * h*w)."""
    padded = F.pad(level.transpose(0, 1).float().contiguous(), (1, 1, 1, 1))
    windows = padded.unfold(2, level.shape[2], 1).unfold(3, level.shape[3], 1)  # (C, B, 3, 3, h, w)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(level.shape[1] * 9, -1)


@functools.lru_cache(maxsize=16)
def _pooling(channels: int, levels: int, number: int, width: int, device: torch.device) -> Tensor:
    """What one level adds to the embedding, as a sparse matrix (width, channels * 9)."""
    one_level = F.adaptive_avg_pool1d(torch.eye(channels * 9), width)  # (channels * 9, width)
    over_levels = F.adaptive_avg_pool1d(torch.eye(levels * width)[number * width : (number + 1) * width], width)
    return (one_level @ over_levels).T.to_sparse().coalesce().to(device)
