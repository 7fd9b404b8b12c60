"""Any number of images -> batches of prepared ones, decoded ahead in threads, in order and in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from itertools import chain, groupby, islice, zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError, check_count
from adpretrain_hf.images.ahead import THREADS, OnError, prepare_ahead
from adpretrain_hf.images.preprocessing import PreparedImage, Preprocessor, check_prepared, is_prepared
from adpretrain_hf.images.sources import named_sources
from adpretrain_hf.images.tiles import Tiles


class PreparedBatches:
    """Prepared images in groups of equal shape, consecutive, at most ``batch_size`` of them; iterated once.

    Args:
        images: what ``named_sources`` takes, or a float tensor (B, 3, H, W) or a list of images that are prepared.
        preprocessor: prepares one image.
        batch_size: images at a time.
        on_error: called with the name and the error of an image that cannot be used, which is then left out; by default
            the error is raised.
        categories: of the images, one for each in their order, or one text for all.
        tiles: by category, how its images are cut into windows, which come one after the other and of which a batch has
            ``batch_size``, and the rows and columns of windows that every image must have, if any.

    Attributes:
        total: the number of images, or None where it is not known before the end.

    Raises:
        InputError: ``batch_size`` is not a positive integer, there is no image, not one category for each, or tiles of
            prepared ones.
        ImageError: an image cannot be used.
    """

    def __init__(
        self,
        images: Any,
        preprocessor: Preprocessor,
        batch_size: int,
        on_error: OnError | None = None,
        categories: Iterable[str] = "",
        tiles: Mapping[str, tuple[Tiles, tuple[int, ...]]] = MappingProxyType({}),
    ) -> None:
        batch_size = check_count("batch_size", batch_size)
        if is_prepared(images):
            if tiles:
                raise InputError("images that are prepared cannot be cut into tiles: give them unprepared, or no tiles")
            check_prepared(images, preprocessor.config)
        named, self.total = named_sources(images)
        # Before any is read: an image that is left out takes its category along.
        sources = _categorised(named, self.total, categories)
        if is_prepared(images):
            size = (images.shape[2], images.shape[3])
            prepared: Iterable[PreparedImage] = (
                PreparedImage(tensor, name, size, (0, 0, *size), category=category)
                for tensor, name, category in sources
            )
        elif isinstance(images, list) and images and isinstance(images[0], PreparedImage):
            prepared = (replace(image, category=category) for image, _, category in sources)
        elif tiles:

            def cut(source: Any, name: str, category: str) -> list[PreparedImage]:
                if category not in tiles:
                    return [preprocessor.prepare(source, name, category)]
                own, grid = tiles[category]
                return preprocessor.prepare_windows(source, name, category, tiles=own, grid=grid)

            ahead = min(2 * batch_size, THREADS + 1)  # large images: as many as there are cores to decode them
            prepared = chain.from_iterable(prepare_ahead(cut, sources, ahead, on_error))
        else:
            prepared = prepare_ahead(preprocessor.prepare, sources, 2 * batch_size, on_error)
        self._batches = _group(prepared, batch_size)

    def __iter__(self) -> Iterator[list[PreparedImage]]:
        return self._batches


def _categorised(
    named: Iterable[tuple[Any, str]], total: int | None, categories: Iterable[str]
) -> Iterator[tuple[Any, str, str]]:
    """Images and their names, each with its category."""
    if isinstance(categories, str):
        return ((image, name, categories) for image, name in named)
    if isinstance(categories, Sized) and total not in (None, len(categories)):
        raise InputError(f"got {len(categories)} categories for {total} images, expected one for each")
    return _in_step(named, categories)


def _in_step(named: Iterable[tuple[Any, str]], categories: Iterable[str]) -> Iterator[tuple[Any, str, str]]:
    for number, (image, category) in enumerate(zip_longest(named, categories)):
        if image is None or category is None:
            found = "fewer" if category is None else "more"
            raise InputError(f"got {found} categories than images, {number} of them: expected one for each")
        yield *image, category


def _group(images: Iterable[PreparedImage], batch_size: int) -> Iterator[list[PreparedImage]]:
    for _, alike in groupby(images, key=lambda image: image.pixels.shape):
        while batch := list(islice(alike, batch_size)):
            yield batch


def by_image(
    batches: Iterable[tuple[list[PreparedImage], list[Tensor]]],
) -> Iterator[tuple[PreparedImage, list[Tensor]]]:
    """Takes batches apart into images, with tensors that keep nothing else in memory; windows are put together.

    Args:
        batches: prepared images, in the order of ``PreparedBatches``, and tensors (B, ...).

    Returns:
        An iterator of images and their tensors (...); of images that are cut into T windows, (T, ...).
    """
    parts: list[list[Tensor]] = []
    for batch, tensors in batches:
        for row, image in enumerate(batch):
            own = [_copy(tensor[row]) for tensor in tensors]
            if image.windows is None:
                yield image, own
                continue
            parts.append(own)
            if image.is_last:
                yield image.whole(), [torch.stack(windows) for windows in zip(*parts, strict=True)]
                parts = []


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy, by numpy: for each of many short ones PyTorch's threads would wait for cores that decode."""
    values = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which numpy does not know
    return torch.from_numpy(values.numpy().copy()).view(tensor.dtype)
