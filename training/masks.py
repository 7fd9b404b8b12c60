"""Masks as the network sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adpretrain_hf.errors import ImageError
from adpretrain_hf.images import PreparedImage, Preprocessor
from training.encoded import read_mask


def seen_mask(entry: Mapping[str, Any] | None, prepared: PreparedImage, preprocess: Preprocessor) -> Tensor:
    """The part of an image's mask that the network sees, (H, W) bool; all False where there is none.

    Args:
        entry: the encoded mask, as ``read_mask`` takes it, or None.
        prepared: the image.
        preprocess: that it was prepared by.

    Raises:
        ImageError: the mask cannot be read, or is not of its image's size.
    """
    height, width = prepared.network_size
    if entry is None:
        return torch.zeros(height, width, dtype=torch.bool)
    mask = read_mask(entry)
    if mask.size[::-1] != prepared.size:
        raise ImageError(
            f"the mask {entry['path']} has {mask.size[0]} x {mask.size[1]} pixels, its image {prepared.name} "
            f"{prepared.size[1]} x {prepared.size[0]}: expected the same"
        )
    if preprocess.config.resize_mode == "crop":
        mask = preprocess.crop_mask(mask)  # to the pixel; PreparedImage.box is rounded
    else:
        mask = mask.resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(mask) > 0)
