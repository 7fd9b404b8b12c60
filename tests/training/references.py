"""Encoders and caches of tiny backbones and random images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from training.content_keys import content_keys
from training.reference_cache import ReferenceCache
from training.reference_encoding import ReferenceEncoder

SLOT_BYTES = 4 * 16 * 32 * 2  # L, K and C of the tiny backbone at 32 px, float16


def make_encoder(backbone: Path, images: Path, **options: Any) -> ReferenceEncoder:
    """An encoder of the images in a folder, in the order of their names."""
    extractor = ADPretrainFeatureExtractor.from_backbone(
        str(backbone), image_size=32, num_reference_tokens=24, num_heads=4
    )
    paths = sorted(images.iterdir())
    return ReferenceEncoder(extractor, lambda position: extractor.preprocess.prepare(paths[position]).tensor, **options)


def make_cache(backbone: Path, images: Path, encoder: dict[str, Any] | None = None, **options: Any) -> ReferenceCache:
    """A cache of the images in a folder."""
    return ReferenceCache(make_encoder(backbone, images, **(encoder or {})), keys_of(images), **options)


def keys_of(images: Path) -> list[str]:
    """The keys of the images in a folder."""
    return content_keys({"bytes": None, "path": str(path)} for path in sorted(images.iterdir()))


def fill(backbone: Path, images: Path, folder: Path, positions: Sequence[int]) -> int:
    """Fills the cache in a folder, as another process would; returns how many images it encoded."""
    cache = make_cache(backbone, images, folder=folder)
    for position in positions:  # one by one, so that a signal comes in the middle of writing
        cache.get([position])
    return cache.encoded


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all levels are bit for bit the same."""
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
