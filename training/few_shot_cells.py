"""Cells of a comparison: the images of one category and view, encoded once, with their nearest references."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import OnError, PreparedBatches, PreparedImage, decode_image, to_device
from training.encoded import read_encoded
from training.masks import seen_mask
from training.seeds import named_generator

_LOG = logging.getLogger(__name__)
_BATCH = 16


@dataclass(frozen=True)
class Cell:
    """Positions of one category's and view's images in a data set; ``good`` are the normal ones of undamaged parts."""

    category: str
    view: str
    normal: list[int]
    anomalous: list[int]
    good: frozenset[int]

    def without(self, positions: Collection[int]) -> Cell:
        """The cell less some of its images."""
        normal, anomalous = ([p for p in own if p not in positions] for own in (self.normal, self.anomalous))
        return replace(self, normal=normal, anomalous=anomalous)

    def candidates(self) -> list[int]:
        """Indices of the normal images that may be references: those of damaged parts are none."""
        return [index for index, position in enumerate(self.normal) if position in self.good]


@dataclass(frozen=True)
class LevelTokens:
    """One level of N images on a grid of P patches, and for each patch its nearest one in each of R references.

    Attributes:
        tokens: (N, P, C), float16, as the backbone gives them.
        similarity: (N, R, P), float32, cosine of a patch and the nearest one of reference r.
        nearest: (N, R, P), int16, which of reference r's patches that is.
    """

    tokens: Tensor
    similarity: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class EncodedCell:
    """What a cell's features and scores are made of, in memory: in float16, 0.8 MB an image for ViT-S at 224 px.

    Attributes:
        cell: its positions; the N images are its normal ones and then its anomalous ones.
        levels: L of them.
        grid: h and w, h * w = P.
        masks: (N, H, W), bool, at the size of the network's input.
        references: (R,), indices of the images that any seed draws as a reference.
        draws: for each seed the indices of its references, (K,).
    """

    cell: Cell
    levels: list[LevelTokens]
    grid: tuple[int, int]
    masks: Tensor
    references: Tensor
    draws: dict[int, Tensor]

    def test_images(self, seed: int) -> Tensor:
        """Indices of the images that are not references of a seed."""
        drawn = set(self.draws[seed].tolist())
        return torch.tensor([image for image in range(len(self.masks)) if image not in drawn])

    def is_anomalous(self, images: Tensor) -> Tensor:
        """The labels of some images, bool."""
        return images >= len(self.cell.normal)


def find_cells(dataset: Dataset, categories: Sequence[str], shots: int) -> list[Cell]:
    """Finds the cells of some categories, in order; those without an anomalous or enough normal images are left out.

    Args:
        dataset: with the columns of ``load_real_iad``.
        categories: their names.
        shots: references of a cell; it needs one normal image more.

    Raises:
        InputError: a category is not in the data set, or has no cell that can be measured; or fewer than 2 shots.
    """
    if shots < 2:
        raise InputError(f"got {shots} shots, expected at least 2: each reference is taken against the others")
    columns = (list(dataset[name]) for name in ("category", "view", "is_anomalous", "is_good"))
    found: dict[tuple[str, str], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    good = set()
    for position, (category, view, is_anomalous, is_good) in enumerate(zip(*columns, strict=True)):
        found[category, view][is_anomalous].append(position)
        if is_good:
            good.add(position)
    cells = [
        Cell(*key, *found[key], frozenset(good.intersection(found[key][0])))
        for name in categories
        for key in sorted(found)
        if key[0] == name
    ]
    usable = [cell for cell in cells if cell.anomalous and len(cell.normal) > shots <= len(cell.good)]
    for cell in cells:
        if cell not in usable:
            counts = f"{len(cell.normal)} normal and {len(cell.anomalous)} anomalous images"
            _LOG.warning("%s %s is left out: it has %s", cell.category, cell.view, counts)
    missing = [name for name in categories if name not in {cell.category for cell in usable}]
    if missing or not usable:
        raise InputError(
            f"the categories {missing} have no view with an anomalous image and more than {shots} normal ones: "
            f"expected some of {sorted({key[0] for key in found})}"
        )
    return usable


def encode_cells(
    extractor: ADPretrainFeatureExtractor,
    dataset: Dataset,
    cells: Sequence[Cell],
    *,
    seeds: Sequence[int],
    shots: int,
    on_error: OnError | None = None,
) -> Iterator[EncodedCell]:
    """Encodes cells one after the other: one is in memory at a time, or all where the caller keeps them.

    Args:
        extractor: whose backbone encodes; its projectors are not used.
        dataset: that the cells were found in.
        cells: from ``find_cells``.
        seeds: one draw of references each.
        shots: references of a draw.
        on_error: called with the name and the error of an image that cannot be used, which is then left out, as is a
            cell that has too few images without it; by default the error is raised.

    Raises:
        ImageError: an image or mask cannot be read, or does not fit the other.
        InputError: the images of a cell are of different shapes, or there are no seeds.
    """
    if not seeds:
        raise InputError("got no seeds, expected at least one")
    for cell in cells:
        images, masks, left = _read(extractor, dataset, cell, on_error)
        if len(left.candidates()) < shots or len(left.normal) <= shots or not left.anomalous:
            _LOG.warning("%s %s is left out: too few of its images can be read", cell.category, cell.view)
            continue
        yield _encode(extractor, left, images, masks, seeds, shots)


def _read(
    extractor: ADPretrainFeatureExtractor, dataset: Dataset, cell: Cell, on_error: OnError | None
) -> tuple[list[PreparedImage], list[Tensor], Cell]:
    """Images and masks of a cell, and the cell of those that can be read."""
    rows = {str(position): dataset[position] for position in cell.normal + cell.anomalous}
    unusable: list[int] = []

    def leave_out(position: str, error: ImageError) -> None:
        if on_error is None:
            raise error
        unusable.append(int(position))
        on_error(str(rows[position]["image"]["path"]), error)

    sources = [(position, partial(_decode, row["image"])) for position, row in rows.items()]
    images, masks = [], []
    for batch in PreparedBatches(sources, extractor.preprocess, _BATCH, leave_out):
        for image in batch:
            try:
                masks.append(seen_mask(rows[image.name]["mask"], image, extractor.preprocess))
                images.append(image)
            except ImageError as error:
                leave_out(image.name, error)
    return images, masks, cell.without(unusable)


def _decode(entry: Mapping[str, Any]) -> Image.Image:
    return decode_image(read_encoded(entry), str(entry["path"]))


@torch.no_grad()
def _encode(
    extractor: ADPretrainFeatureExtractor,
    cell: Cell,
    images: Sequence[PreparedImage],
    masks: Sequence[Tensor],
    seeds: Sequence[int],
    shots: int,
) -> EncodedCell:
    tokens: list[list[Tensor]] = []
    for start in range(0, len(images), _BATCH):
        batch = torch.stack([image.tensor for image in images[start : start + _BATCH]])
        maps = extractor.backbone(to_device(batch, extractor.device, extractor.dtype))
        tokens.append([level.flatten(2).mT.float() for level in maps])
    shapes = {image.tensor.shape for image in images}
    if len(shapes) > 1:
        raise InputError(f"{cell.category} {cell.view} has images of different shapes {shapes}: use resize_mode='crop'")
    draws = {seed: _draw(cell, seed, shots) for seed in seeds}
    references = torch.cat(list(draws.values())).unique()
    levels = [_match(torch.cat(parts), references) for parts in zip(*tokens, strict=True)]
    return EncodedCell(cell, levels, (maps[0].shape[2], maps[0].shape[3]), torch.stack(list(masks)), references, draws)


def _draw(cell: Cell, seed: int, shots: int) -> Tensor:
    """Indices of normal images that depend on the seed and the cell's name, not on other cells."""
    random = named_generator(seed, cell.category, cell.view)
    return torch.from_numpy(np.sort(random.choice(cell.candidates(), shots, replace=False)))


def _match(tokens: Tensor, references: Tensor) -> LevelTokens:
    unit = F.normalize(tokens, dim=2)  # before they are rounded, which would change which is nearest
    queries, similarity, nearest = unit.flatten(0, 1), [], []
    for reference in references.tolist():
        best = (queries @ unit[reference].T).view(*tokens.shape[:2], -1).max(dim=2)
        similarity.append(best.values)
        nearest.append(best.indices.short())
    return LevelTokens(*(one.cpu() for one in (tokens.half(), torch.stack(similarity, 1), torch.stack(nearest, 1))))
