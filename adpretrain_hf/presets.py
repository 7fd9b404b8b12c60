"""The known backbones: the five published ones, and two more of the same family."""

from __future__ import annotations

import math
from typing import Any

from adpretrain_hf.sources import CLIP_MEAN, CLIP_STD


def quarter_levels(depth: int) -> tuple[int, ...]:
    """Blocks at the quarters of a network, rounded up: 12 -> (3, 6, 9, 12)."""
    return tuple(sorted({math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)}))


def _published(backbone: str, width: int, patch: int, depth: int, **more: Any) -> dict[str, Any]:
    sizes = {"backbone": backbone, "hidden_size": width, "patch_size": patch, "layers": quarter_levels(depth)}
    return sizes | {"normalize_tokens": False} | more


_CLIP_STATISTICS = {"mean": CLIP_MEAN, "std": CLIP_STD}

PRESETS: dict[str, dict[str, Any]] = {
    "dinov2-base": _published("facebook/dinov2-base", 768, 14, 12),
    "dinov2-large": _published("facebook/dinov2-large", 1024, 14, 24),
    "clip-base": _published("open_clip:ViT-B-16-quickgelu/openai", 768, 16, 12, **_CLIP_STATISTICS),
    "clip-large": _published("open_clip:ViT-L-14-quickgelu/openai", 1024, 14, 24, **_CLIP_STATISTICS),
    "imagebind": _published("imagebind:imagebind_huge.pth", 1280, 14, 32, **_CLIP_STATISTICS),
    "dinov2-small": _published("facebook/dinov2-small", 384, 14, 12, normalize_tokens=True),
    "dinov2-giant": _published("facebook/dinov2-giant", 1536, 14, 40, normalize_tokens=True),
}
