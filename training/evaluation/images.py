"""Images as anomalib's models take them, prepared exactly as the extractor prepares them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import Mask

from adpretrain_hf.errors import ImageError
from adpretrain_hf.preprocessing import PreparedImage, Preprocessor
from training.encoded import read_mask
from training.evaluation.categories import Sample


class ImageFiles(Dataset):
    """Images of a category, with their masks as the network sees them.

    Args:
        samples: which.
        preprocess: of the extractor. Models must not prepare images again: ``pre_processor=False``.
    """

    collate_fn = staticmethod(ImageBatch.collate)

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocessor) -> None:
        self._samples = list(samples)
        self._preprocess = preprocess

    def __len__(self) -> int:
        """How many."""
        return len(self._samples)

    def __getitem__(self, place: int) -> ImageItem:
        """One image (3, H, W) with its mask (H, W), label and path.

        Raises:
            ImageError: it cannot be used, or its mask does not fit it.
        """
        sample = self._samples[place]
        prepared = self._preprocess.prepare(sample.image)
        return ImageItem(
            image=prepared.tensor,
            gt_mask=Mask(seen_mask(sample, prepared)),
            gt_label=torch.tensor(sample.is_anomalous),
            image_path=str(sample.image),
            mask_path=str(sample.mask or ""),
        )


def test_masks(samples: Sequence[Sample], preprocess: Preprocessor) -> np.ndarray:
    """Masks of images as the network sees them, (N, H, W) bool; those of anomalous images must be known."""
    return np.stack([seen_mask(sample, preprocess.prepare(sample.image)).numpy() for sample in samples])


test_masks.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where it is imported


def seen_mask(sample: Sample, prepared: PreparedImage) -> Tensor:
    """The part of a mask that the network sees, (H, W) bool; all False where there is none.

    Raises:
        ImageError: the mask cannot be read, or is not of its image's size.
    """
    height, width = prepared.tensor.shape[-2:]
    if sample.mask is None:
        return torch.zeros(height, width, dtype=torch.bool)
    mask = read_mask({"bytes": None, "path": str(sample.mask)})
    if mask.size[::-1] != prepared.size:
        raise ImageError(
            f"the mask {sample.mask} has {mask.size[0]} x {mask.size[1]} pixels, its image {sample.image} "
            f"{prepared.size[1]} x {prepared.size[0]}: expected the same"
        )
    top, left, seen_height, seen_width = prepared.box
    box = (left, top, left + seen_width, top + seen_height)
    return torch.from_numpy(np.asarray(mask.resize((width, height), Image.Resampling.NEAREST, box)) > 0)
