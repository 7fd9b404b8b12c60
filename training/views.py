"""Two augmented views of a training image, and the labels of its patches.

The augmentation is the published one (paper, appendix; MoCo v2's without its geometric part, so that patches at the
same position of both views show the same thing). It works on PIL images, which took a third of the time that tensors
did (one view of 224 px on one core: 3 ms), and blurs as MoCo v2 does, by Pillow's filter, without a kernel size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as adjust

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import Preprocessor, normalize, to_pixels

__all__ = ["TwoViews", "Views", "normalize", "patch_labels_by_count", "patch_labels_nearest"]

_JITTERS = (adjust.adjust_brightness, adjust.adjust_contrast, adjust.adjust_saturation, adjust.adjust_hue)
_LOWEST, _HIGHEST = (0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1)  # ColorJitter(.4, .4, .4, .1)
_PUBLISHED_THRESHOLD = 32


class Views(NamedTuple):
    """Two views of one image.

    Attributes:
        images: (2, 3, S, S), uint8.
        mask: (S, S), bool, anomalous pixels of both.
    """

    images: Tensor
    mask: Tensor


class TwoViews:
    """Crops an image as at test time and changes its colours and sharpness twice, by chance.

    What is random follows from the seed alone: global random states are neither read nor changed, and threads may share
    one object.

    Args:
        config: gives the size; ``resize_mode`` is taken to be ``"crop"``.
        plain_first: leave the first view as it is at test time, rather than augment both as published.
    """

    def __init__(self, config: ADPretrainConfig, *, plain_first: bool = False) -> None:
        self._preprocessor, self._size, self._plain_first = Preprocessor(config), config.image_size, plain_first

    def __call__(self, image: Image.Image, mask: Image.Image | None, seed: int) -> Views:
        """Makes the two views.

        Args:
            image: RGB, of any size (one that is already S x S is not resized).
            mask: of the image, one channel, any value but 0 anomalous; None for a normal image.
            seed: an integer >= 0.

        Raises:
            ImageError: the mask has another size than the image.
        """
        if mask is not None and mask.size != image.size:
            raise ImageError(f"the mask is {mask.size[0]} x {mask.size[1]} pixels, its image {image.size}")
        random = np.random.default_rng(seed)
        cropped = self._preprocessor.crop(image)
        first = cropped if self._plain_first else _augment(cropped, random)
        views = [to_pixels(view) for view in (first, _augment(cropped, random))]
        return Views(torch.stack(views), self._crop_mask(mask))

    def _crop_mask(self, mask: Image.Image | None) -> Tensor:
        if mask is None:
            return torch.zeros(self._size, self._size, dtype=torch.bool)
        return torch.from_numpy(np.asarray(self._preprocessor.crop_mask(mask)) != 0)


def _augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    if random.random() < 0.8:
        strengths = random.uniform(_LOWEST, _HIGHEST)
        for kind in random.permutation(len(_JITTERS)):
            image = _JITTERS[kind](image, float(strengths[kind]))
    if random.random() < 0.2:
        image = adjust.rgb_to_grayscale(image, num_output_channels=3)
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return image


def patch_labels_by_count(mask: Tensor, patch_size: int, threshold: int = _PUBLISHED_THRESHOLD) -> Tensor:
    """Labels of the angle loss: a patch is anomalous if more than ``threshold`` of its pixels are (released code).

    The published threshold is a number of pixels, for patches of 14 and 16 px (16 % and 12.5 % of their area). It stays
    the same number here for every patch size, so that patches of 8 px count from half their area, and smaller ones
    than 6 px never do: give another threshold for those.

    Args:
        mask: (B, H, W), bool.
        patch_size: side of a patch, in pixels.
        threshold: in pixels.

    Returns:
        (B, H / patch_size, W / patch_size), bool.

    Raises:
        InputError: H or W is not a multiple of ``patch_size``.
    """
    height, width = mask.shape[-2:]
    if height % patch_size or width % patch_size:
        raise InputError(f"got masks of {height} x {width} pixels, expected multiples of the patch size {patch_size}")
    patches = mask.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (B, h, patch, w, patch)
    return patches.sum(dim=(2, 4)) > threshold


def patch_labels_nearest(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels of the norm loss: the mask down-sampled to the patch grid, each patch its first pixel (released code).

    Args:
        mask: (B, H, W), bool.
        grid: h and w, patches along each axis.

    Returns:
        (B, h, w), bool.
    """
    return F.interpolate(mask[:, None].float(), size=grid, mode="nearest")[:, 0].bool()
