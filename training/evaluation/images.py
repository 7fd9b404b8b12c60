"""Images as anomalib's models take them, prepared exactly as the extractor prepares them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from torch.utils.data import Dataset
from torchvision.tv_tensors import Mask

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import Preprocessor
from training.data.folders import Sample
from training.masks import seen_mask


class ImageFiles(Dataset):
    """Images of a category, with their masks as the network sees them.

    Args:
        samples: which.
        preprocess: of the extractor. Models must not prepare images again: ``pre_processor=False``.
    """

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
            gt_mask=Mask(seen_mask(_entry(sample), prepared, self._preprocess)),
            gt_label=torch.tensor(sample.is_anomalous),
            image_path=str(sample.image),
            mask_path=str(sample.mask or ""),
        )

    @staticmethod
    def collate_fn(items: Sequence[ImageItem]) -> ImageBatch:
        """One batch of images.

        Raises:
            InputError: they are of different shapes, which ``resize_mode="resize"`` keeps.
        """
        shapes = sorted({tuple(item.image.shape) for item in items})
        if len(shapes) > 1:
            raise InputError(
                f"prepared images of different shapes {shapes} do not make one batch: evaluate a bundle with "
                "resize_mode='crop', or data whose images have one shape"
            )
        return ImageBatch.collate(list(items))


def test_masks(samples: Sequence[Sample], preprocess: Preprocessor) -> np.ndarray:
    """Masks of images as the network sees them, (N, H, W) bool; those of anomalous images must be known."""
    return np.stack(
        [seen_mask(_entry(sample), preprocess.prepare(sample.image), preprocess).numpy() for sample in samples]
    )


test_masks.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where it is imported


def _entry(sample: Sample) -> dict[str, str | None] | None:
    return {"bytes": None, "path": str(sample.mask)} if sample.mask else None
