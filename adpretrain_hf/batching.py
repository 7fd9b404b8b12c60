"""Any number of images -> batches of prepared ones, decoded ahead in threads, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import ImageSource, named_sources, read_image
from adpretrain_hf.preprocessing import PreparedImage, Preprocessor, check_prepared, is_prepared
from adpretrain_hf.read_ahead import read_ahead

OnError = Callable[[str, ImageError], None]


class PreparedBatches:
    """Prepared images in groups of equal shape, consecutive, at most ``batch_size`` of them; iterated once.

    Args:
        images: what ``named_sources`` takes, or a float tensor (B, 3, H, W) that is already prepared.
        preprocessor: prepares one image.
        batch_size: images at a time.
        on_error: called with the name and the error of an image that cannot be used, which is then left out; by default
            the error is raised.

    Attributes:
        total: the number of images, or None where it is not known before the end.

    Raises:
        InputError: ``batch_size`` is not a positive integer, or there is no image.
        ImageError: an image cannot be used.
    """

    def __init__(
        self, images: Any, preprocessor: Preprocessor, batch_size: int, on_error: OnError | None = None
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected an integer >= 1")
        self.total: int | None
        if is_prepared(images):
            check_prepared(images, preprocessor.config.patch_size)
            prepared: Iterable[PreparedImage] = map(_as_prepared, images, range(len(images)))
            self.total = len(images)
        else:
            sources, self.total = named_sources(images)
            prepared = _prepare_ahead(sources, preprocessor, 2 * batch_size, on_error)
        self._batches = _group(prepared, batch_size)

    def __iter__(self) -> Iterator[list[PreparedImage]]:
        return self._batches


def stack(batch: list[PreparedImage]) -> Tensor:
    """The tensors of a batch as one (B, 3, H', W')."""
    return torch.stack([image.tensor for image in batch])


def _as_prepared(tensor: Tensor, number: int) -> PreparedImage:
    height, width = tensor.shape[-2:]
    return PreparedImage(tensor, f"image {number}", (height, width), (0, 0, height, width))


def _prepare_ahead(
    sources: Iterable[tuple[ImageSource, str]], preprocessor: Preprocessor, ahead: int, on_error: OnError | None
) -> Iterator[PreparedImage]:
    calls = ((name, _call(preprocessor, source, name)) for source, name in sources)
    return (image for _, image in read_ahead(calls, ahead, on_error))


def _call(preprocessor: Preprocessor, source: ImageSource, name: str) -> Callable[[], PreparedImage]:
    if isinstance(source, (str, Path)):
        return partial(preprocessor.prepare, source, name)
    # A camera's buffer or the frame of a film may hold another picture as soon as the next one is asked for.
    try:
        return partial(preprocessor.prepare, read_image(source, name), name)
    except ImageError as error:
        return partial(_raise, error)


def _raise(error: ImageError) -> PreparedImage:
    raise error


def _group(images: Iterable[PreparedImage], batch_size: int) -> Iterator[list[PreparedImage]]:
    batch: list[PreparedImage] = []
    for image in images:
        if batch and (len(batch) == batch_size or image.tensor.shape != batch[0].tensor.shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
