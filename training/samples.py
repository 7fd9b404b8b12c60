"""Training samples: encoded images -> two augmented views with patch labels, made in the data workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils import data

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import Preprocessor, decode_image
from training.encoded import read_encoded, read_mask
from training.sampler import Item
from training.synthetic.defects import FAMILIES, paint_defect
from training.views import TwoViews, patch_labels_by_count, patch_labels_nearest

MAX_UNREADABLE = 0.001  # as a share of an epoch's images


@dataclass
class Batch:
    """A batch of training images, on the CPU.

    Attributes:
        views: (2, B, 3, S, S), uint8.
        angle_labels: (B, h, w), whether a patch counts as anomalous for the angle loss.
        norm_labels: (B, h, w), the same for the norm loss.
        positions: of the images in the data set.
        unreadable: what was wrong with images that others stand in for.
    """

    views: Tensor
    angle_labels: Tensor
    norm_labels: Tensor
    positions: list[int]
    unreadable: list[str]

    def pin_memory(self) -> Batch:
        """Puts the views where a GPU reads them while the CPU goes on; the labels stay, for the CPU indexes by them."""
        self.views = self.views.pin_memory()
        return self


@dataclass
class Sample:
    """One training image: views (2, 3, S, S) uint8, mask (S, S) bool, and where it comes from."""

    views: Tensor
    mask: Tensor
    position: int
    unreadable: list[str]


class Samples(data.Dataset[Any]):
    """Decodes and augments the images of a data set; what is random about an image follows from seed and ``Item``.

    An image that cannot be read is replaced by the next training image, so that batches keep their size, and reported.

    Args:
        dataset: from ``load_real_iad``.
        positions: of the training images in the data set.
        config: gives the size, the mean and the standard deviation.
        seed: of the run.
        paint_defects: share of the normal images that get a painted defect.
        plain_first: see ``TwoViews``.
    """

    def __init__(
        self,
        dataset: Dataset,
        positions: Sequence[int],
        config: ADPretrainConfig,
        *,
        seed: int = 0,
        paint_defects: float = 0.0,
        plain_first: bool = False,
    ) -> None:
        self._dataset, self._seed, self._paint_defects = dataset, seed, paint_defects
        self._next = dict(zip(positions, [*positions[1:], *positions[:1]], strict=True))
        self._preprocessor, self._two_views = Preprocessor(config), TwoViews(config, plain_first=plain_first)

    def __len__(self) -> int:
        return len(self._next)

    def __getitem__(self, item: Item) -> Sample:
        unreadable: list[str] = []
        position = item.position
        for _ in range(len(self)):
            try:
                return self._sample(position, item.epoch, unreadable)
            except ImageError as error:
                unreadable.append(str(error))
                position = self._next[position]
        raise InputError(f"no image of the data set can be read. {unreadable[0]}")

    def load_normal(self, position: int) -> Tensor:
        """An image as references are made of: prepared as at test time, (3, S, S)."""
        row = self._dataset[position]
        return self._preprocessor.prepare(_read(row["image"]), str(row["image"]["path"])).tensor

    def _sample(self, position: int, epoch: int, unreadable: list[str]) -> Sample:
        row = self._dataset[position]
        random = np.random.default_rng((self._seed, epoch, position))
        image, mask = _read(row["image"]), read_mask(row["mask"]) if row["mask"] else None
        if not row["is_anomalous"] and random.random() < self._paint_defects:
            image, mask = _paint(self._preprocessor.crop(image), random)
        views = self._two_views(image, mask, int(random.integers(2**63)))
        return Sample(views.images, views.mask, position, unreadable)


class Collate:
    """Puts samples together and labels their patches by both rules.

    Args:
        patch_size: of the backbone, in pixels.
    """

    def __init__(self, patch_size: int) -> None:
        self._patch_size = patch_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        masks = torch.stack([sample.mask for sample in samples])
        labels = patch_labels_by_count(masks, self._patch_size)
        return Batch(
            views=torch.stack([sample.views for sample in samples], dim=1),
            angle_labels=labels,
            norm_labels=patch_labels_nearest(masks, (labels.shape[1], labels.shape[2])),
            positions=[sample.position for sample in samples],
            unreadable=[message for sample in samples for message in sample.unreadable],
        )


class UnreadableImages:
    """Counts the images of an epoch that could not be read.

    Args:
        total: the images of the epoch.
    """

    def __init__(self, total: int) -> None:
        self._total, self.messages = total, list[str]()

    def add(self, messages: Sequence[str]) -> None:
        """Notes some.

        Raises:
            InputError: they are more than 0.1 % of the epoch's images.
        """
        self.messages += messages
        if len(self.messages) > MAX_UNREADABLE * self._total:
            listed = "\n  ".join(self.messages[:10])
            raise InputError(
                f"{len(self.messages)} of {self._total} images cannot be read, more than {MAX_UNREADABLE:.1%}: get the "
                f"data again, or remove them from the json. The first ones:\n  {listed}"
            )


def _read(entry: Mapping[str, Any]) -> Image.Image:
    return decode_image(read_encoded(entry), str(entry["path"]))


def _paint(image: Image.Image, random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    family = str(random.choice(list(FAMILIES)))
    painted, mask = paint_defect(np.asarray(image), family, random)
    return Image.fromarray(painted), Image.fromarray(mask)
