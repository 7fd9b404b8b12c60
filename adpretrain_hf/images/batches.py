"""Any number of images -> batches of prepared ones, decoded ahead in threads, in order and in bounded memory."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np

from adpretrain_hf.errors import InputError
from adpretrain_hf.images.ahead import OnError, prepare_ahead
from adpretrain_hf.images.preprocessing import PreparedImage, Preprocessor, check_prepared, is_prepared
from adpretrain_hf.images.sources import named_sources


class PreparedBatches:
    """Prepared images in groups of equal shape, consecutive, at most ``batch_size`` of them; iterated once.

    Args:
        images: what ``named_sources`` takes, or a float tensor (B, 3, H, W) or a list of images that are prepared.
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
        if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected an integer >= 1")
        self.total: int | None
        if is_prepared(images):
            check_prepared(images, preprocessor.config)
            size = (images.shape[2], images.shape[3])
            named = ((tensor, f"image {number}") for number, tensor in enumerate(images))
            prepared: Iterable[PreparedImage] = (PreparedImage(*one, size, (0, 0, *size)) for one in named)
            self.total = len(images)
        elif isinstance(images, list) and images and isinstance(images[0], PreparedImage):
            prepared, self.total = images, len(images)
        else:
            sources, self.total = named_sources(images)
            prepared = prepare_ahead(preprocessor.prepare, sources, 2 * batch_size, on_error)
        self._batches = _group(prepared, batch_size)

    def __iter__(self) -> Iterator[list[PreparedImage]]:
        return self._batches


def _group(images: Iterable[PreparedImage], batch_size: int) -> Iterator[list[PreparedImage]]:
    for _, alike in groupby(images, key=lambda image: image.pixels.shape):
        while batch := list(islice(alike, batch_size)):
            yield batch
