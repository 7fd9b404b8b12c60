"""Training samples, made in the data workers: encoded images -> crops with painted defects and labelled patches.

Which images a step sees, its references and all that is drawn follow from the seed, the epoch, the step and the image
alone: a run that was stopped finds its place, and any number of processes sees the same. The device gets the crops in 8
bits and makes both views of them itself (``training/data/augment.py``).
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils import data

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import Preprocessor
from training.data.augment import draw_augmentation
from training.data.slots import SlotFile
from training.data.table import prepare_entry, seen_mask
from training.references import ReferencePool
from training.seeds import generator
from training.settings import PretrainSettings
from training.synthetic.defects import FAMILIES, paint_defect

NORMAL, ANOMALOUS, IGNORED = 0, 1, 2  # labels of patches
_PUBLISHED_THRESHOLD = 32
_LOG = logging.getLogger(__name__)
_COVERED = 1 / 8  # the published threshold's share of a patch of 16 px


class Item(NamedTuple):
    """One image of a batch: its position in the data set, the epoch from 0, and how many images it is compared with."""

    position: int
    epoch: int
    references: int


class Batch(NamedTuple):
    """B training images.

    Attributes:
        images: (B, 3, S, S), uint8.
        augmentations: (B, 2, 10), float32; see ``draw_augmentation``.
        labels: (2, B, h, w), uint8, of the patches for the angle and for the norm loss: normal, anomalous or ignored.
        references: (B, R), int64, the images of the pool that each is compared with.
        unreadable: what was wrong with images of the batch that others stand in for.
    """

    images: Tensor
    augmentations: Tensor
    labels: Tensor
    references: Tensor
    unreadable: list[str]


class Sample(NamedTuple):
    """One training image: a crop (3, S, S) uint8, its mask (S, S) bool, and what was drawn for it."""

    image: Tensor
    mask: Tensor
    augmentation: Tensor
    references: Tensor
    unreadable: str | None


class Samples(data.Dataset[Any]):
    """Decodes, crops and paints the images of a data set, and draws their augmentation and references.

    An image that cannot be read is replaced by the next training image that can, so that batches keep their size, and
    reported once an epoch, where it was asked for.

    Args:
        dataset: of images, see ``make_table``.
        positions: of the training images in the data set.
        config: gives the size; images are cropped to a square, whatever its ``resize_mode``.
        pool: of the references.
        settings: of the run: ``seed``, ``paint_defects`` and ``plain_first`` are looked at.
        crops: keeps (4, S, S) uint8, crop and mask, by position, so that an image is decoded once.
    """

    def __init__(
        self,
        dataset: Dataset,
        positions: Sequence[int],
        config: ADPretrainConfig,
        pool: ReferencePool,
        settings: PretrainSettings,
        crops: SlotFile | None = None,
    ) -> None:
        self._dataset, self._pool, self._settings, self._crops = dataset, pool, settings, crops
        self._next = dict(zip(positions, [*positions[1:], *positions[:1]], strict=True))
        self._preprocessor = Preprocessor(config.replace(resize_mode="crop"))

    def __len__(self) -> int:
        return len(self._next)

    def __getitem__(self, item: Item) -> Sample:
        position, unreadable = item.position, None
        for _ in range(len(self)):
            try:
                return self._sample(position, item, unreadable)
            except ImageError as error:
                unreadable = unreadable or str(error)
                position = self._next[position]
        raise InputError(f"no image of the data set can be read. {unreadable}")

    def load_normal(self, position: int) -> Tensor:
        """An image as references are made of: prepared as at test time, (3, S, S)."""
        return prepare_entry(self._dataset[position]["image"], self._preprocessor).tensor

    def _sample(self, position: int, item: Item, unreadable: str | None) -> Sample:
        random = generator(self._settings.seed, "sample", item.epoch, position)
        image, mask = self._crop(position)
        if not mask.any() and random.random() < self._settings.paint_defects:
            image, mask = _paint(image, random)
        augmentation = draw_augmentation(random, plain_first=self._settings.plain_first)
        references = torch.from_numpy(self._pool.draw(position, item.references, random))
        return Sample(image, mask, augmentation, references, unreadable)

    def _crop(self, position: int) -> tuple[Tensor, Tensor]:
        """What the network sees of an image, (3, S, S) uint8, and of its mask, (S, S) bool."""
        if self._crops is None:
            return self._decode(position)
        kept = self._crops.read(position)
        if kept is not None:
            return kept[:3].clone(), kept[3] > 0  # no view of the file: painting would write to it
        image, mask = self._decode(position)
        try:
            self._crops.write(position, torch.cat([image, mask[None].byte()]))
        except InputError as error:
            _LOG.warning("crops are kept no more: %s", error)
            self._crops = None
        return image, mask

    def _decode(self, position: int) -> tuple[Tensor, Tensor]:
        row = self._dataset[position]
        prepared = prepare_entry(row["image"], self._preprocessor)
        return prepared.pixels, seen_mask(row["mask"], prepared, self._preprocessor)


def collate(rule: str, patch_size: int, samples: Sequence[Sample]) -> Batch:
    """Puts samples together and labels their patches by a rule of ``LABELS``."""
    images, masks, augmentations, references, unreadable = zip(*samples, strict=True)
    labels = LABELS[rule](torch.stack(masks), patch_size)
    stacked = torch.stack(images), torch.stack(augmentations), labels, torch.stack(references)
    return Batch(*stacked, unreadable=[message for message in unreadable if message])


def epoch_batches(
    positions: Sequence[int],
    settings: PretrainSettings,
    *,
    epoch: int = 0,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    anomalous: Sequence[int] | None = None,
) -> list[list[Item]]:
    """The batches of one epoch that are left for one process, parts of a step one by one.

    All processes go through one random order. Of every global batch, part by part, each takes its contiguous share:
    the images of a step do not depend on the number of processes. A rest smaller than a batch is left for the next
    epoch's order.

    Args:
        positions: of the training images in the data set, at least a batch.
        settings: ``batch_size`` is of a step over all processes, which is computed in ``accumulate`` parts; one of
            ``references`` is drawn for every step; all is drawn by ``seed``.
        epoch: counted from 0.
        first_step: steps of this epoch that are done already.
        rank, world_size: of the processes.
        anomalous: positions of anomalous images, of which every batch is to hold at least a quarter; where there are
            too few they come more than once an epoch, and some normal images not at all. None leaves it to chance.

    """
    batch_size, random = settings.batch_size, generator(settings.seed, "order", epoch)
    steps = len(positions) // batch_size
    order = random.permutation(positions)[: steps * batch_size].reshape(steps, batch_size)
    if anomalous is not None:
        order = _balance(order, np.asarray(anomalous), random)
    numbers = generator(settings.seed, "references", epoch).choice(settings.references, steps)
    own = order.reshape(steps, settings.accumulate, world_size, -1)[:, :, rank]
    return [
        [Item(int(position), epoch, int(number)) for position in part]
        for number, step in list(zip(numbers, own, strict=True))[first_step:]
        for part in step
    ]


def check_unreadable(messages: Sequence[str], images: int) -> None:
    """Tells a few damaged files from data that are damaged.

    Args:
        messages: what was wrong with images of an epoch that could not be read, over all processes.
        images: of the epoch.

    Raises:
        InputError: they are more than 0.1 % of the images and more than ten, or more than a tenth.
    """
    if len(messages) > max(0.001 * images, min(10, 0.1 * images)):
        listed = "\n  ".join(messages[:10])
        raise InputError(
            f"{len(messages)} of {images} images cannot be read: get the data again, or leave those images out. Some "
            f"of them:\n  {listed}"
        )


def published_labels(masks: Tensor, patch_size: int) -> Tensor:
    """The labels of the released code, by two rules.

    For the angle loss a patch is anomalous if more than 32 of its pixels are, whatever its size: 16 % of a patch of 14
    px, half of one of 8. For the norm loss the mask is down-sampled by nearest neighbour, each patch its first pixel,
    so that a defect between those pixels counts as normal.

    Args:
        masks: (B, H, W), bool.
        patch_size: side of a patch, in pixels, of which H and W are multiples.

    Returns:
        (2, B, H / patch_size, W / patch_size), uint8: for the angle and for the norm loss.
    """
    first = masks[:, ::patch_size, ::patch_size]
    return torch.stack([_anomalous_pixels(masks, patch_size) > _PUBLISHED_THRESHOLD, first]).byte()


def coverage_labels(masks: Tensor, patch_size: int) -> Tensor:
    """One rule for both losses: anomalous from an eighth of the patch, normal without one anomalous pixel.

    What lies between is ignored; only the most covered patches of an image whose defect covers no patch that far are
    anomalous all the same, so that no defect goes unseen. Arguments and result as of ``published_labels``.
    """
    counts = _anomalous_pixels(masks, patch_size)
    enough = counts.amax(dim=(1, 2), keepdim=True).clamp(min=1, max=_COVERED * patch_size**2)
    labels = (counts >= enough).byte() * ANOMALOUS + ((counts > 0) & (counts < enough)).byte() * IGNORED
    return labels.expand(2, *labels.shape).contiguous()


LABELS = {"coverage": coverage_labels, "published": published_labels}


def _anomalous_pixels(masks: Tensor, patch_size: int) -> Tensor:
    return masks.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).sum(dim=(2, 4))


def _balance(order: np.ndarray, anomalous: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Replaces normal images of batches (steps, B) until a quarter of each is anomalous."""
    steps, batch_size = order.shape
    quarter = -(-batch_size // 4)
    is_anomalous = np.isin(order, anomalous)
    order = np.take_along_axis(order, np.argsort(~is_anomalous, axis=1, kind="stable"), axis=1)  # these first
    passes = [random.permutation(anomalous) for _ in range(-(-steps * quarter // len(anomalous)))]
    spare = np.concatenate(passes)[: steps * quarter].reshape(steps, quarter)
    kept = np.sort(is_anomalous, axis=1)[:, ::-1][:, :quarter]
    order[:, :quarter] = np.where(kept, order[:, :quarter], spare)
    return random.permuted(order, axis=1)


def _paint(image: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    family = str(random.choice(list(FAMILIES)))
    painted, mask = paint_defect(image.permute(1, 2, 0).numpy(), family, random)
    return torch.from_numpy(painted).permute(2, 0, 1).contiguous(), torch.from_numpy(mask) > 0
