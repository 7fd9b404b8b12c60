"""The kinds of features that are compared, made of a cell's tokens for one draw of references."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from training.few_shot_cells import EncodedCell, LevelTokens

# (cell, seed, images (n,)) -> L maps (n, C, h, w), float32, on the extractor's device
MakeFeatures = Callable[[EncodedCell, int, Tensor], list[Tensor]]

FEATURES = ("raw", "residual", "unit raw", "unit residual", "pretrained")


def feature_maker(kind: str, extractor: ADPretrainFeatureExtractor) -> MakeFeatures:
    """How features of a kind are made.

    ``"raw"``: the backbone's tokens. ``"residual"``: less their nearest reference (a reference's own among the others
    of its draw). ``"unit raw"``, ``"unit residual"``: of tokens scaled to unit length first. ``"pretrained"``: what the
    extractor makes of an image, by its own configuration.

    Args:
        kind: one of ``FEATURES``.
        extractor: whose projectors and configuration are used.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in FEATURES:
        raise InputError(f"unknown features {kind!r}: expected some of {', '.join(FEATURES)}")
    if kind == "pretrained":
        return lambda cell, seed, images: _pretrained(extractor, cell, seed, images)
    unit, make = kind.startswith("unit"), _residuals if kind.endswith("residual") else _tokens
    return lambda cell, seed, images: [
        _to_maps(make(level, cell, seed, images, unit, extractor.device), cell) for level in cell.levels
    ]


@torch.no_grad()
def _pretrained(extractor: ADPretrainFeatureExtractor, cell: EncodedCell, seed: int, images: Tensor) -> list[Tensor]:
    config, device = extractor.config, extractor.device
    features = []
    for level, projector, scale in zip(cell.levels, extractor.projectors, config.residual_scale, strict=True):
        residuals = scale * _residuals(level, cell, seed, images, config.normalize_tokens, device)
        features.append(projector(_to_maps(residuals, cell).to(extractor.dtype)).float())
    return features


def _to_maps(rows: Tensor, cell: EncodedCell) -> Tensor:
    return rows.mT.unflatten(2, cell.grid)


def _tokens(
    level: LevelTokens, cell: EncodedCell, seed: int, images: Tensor, unit: bool, device: torch.device
) -> Tensor:
    """Tokens (n, P, C) of some images."""
    tokens = level.tokens[images].to(device).float()
    return F.normalize(tokens, dim=2) if unit else tokens


def _residuals(
    level: LevelTokens, cell: EncodedCell, seed: int, images: Tensor, unit: bool, device: torch.device
) -> Tensor:
    """Tokens (n, P, C) of some images, less their nearest references."""
    draw = cell.draws[seed]
    references = _tokens(level, cell, seed, draw, unit, device).flatten(0, 1)
    nearest = _nearest(level, cell, draw, images).to(device)
    return _tokens(level, cell, seed, images, unit, device) - references[nearest]


def _nearest(level: LevelTokens, cell: EncodedCell, draw: Tensor, images: Tensor) -> Tensor:
    """Which of the patches of the drawn references, (K * P,), is nearest to each patch (n, P) of some images.

    An image is never its own reference: its residual would be exactly 0, which no image to be tested has.
    """
    columns = torch.searchsorted(cell.references, draw)
    similarity = level.similarity[images][:, columns]  # (n, K, P)
    similarity.masked_fill_((images[:, None] == draw)[:, :, None], -torch.inf)
    which = similarity.argmax(dim=1, keepdim=True)  # (n, 1, P)
    patches = level.nearest[images][:, columns].gather(1, which).long()
    return (which * level.tokens.shape[1] + patches)[:, 0]
