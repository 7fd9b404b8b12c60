"""Any number of images -> batches of prepared ones, decoded ahead in threads, in order and in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images.decode import ImageSource, encoded, read_image
from adpretrain_hf.images.preprocessing import PreparedImage, Preprocessor, check_prepared, is_prepared
from adpretrain_hf.images.sources import named_sources

Key = TypeVar("Key")
Result = TypeVar("Result")
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
        if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected an integer >= 1")
        self.total: int | None
        if is_prepared(images):
            check_prepared(images, preprocessor.config)
            size = (images.shape[2], images.shape[3])
            named = ((tensor, f"image {number}") for number, tensor in enumerate(images))
            prepared: Iterable[PreparedImage] = (PreparedImage(*one, size, (0, 0, *size)) for one in named)
            self.total = len(images)
        else:
            sources, self.total = named_sources(images)
            calls = ((name, _call(preprocessor, source, name)) for source, name in sources)
            prepared = (image for _, image in read_ahead(calls, 2 * batch_size, on_error))
        self._batches = _group(prepared, batch_size)

    def __iter__(self) -> Iterator[list[PreparedImage]]:
        return self._batches


def stack(batch: list[PreparedImage]) -> Tensor:
    """The tensors of a batch as one (B, 3, H', W')."""
    return torch.stack([image.tensor for image in batch])


def _call(preprocessor: Preprocessor, source: ImageSource, name: str) -> Callable[[], PreparedImage]:
    # A camera's buffer or the frame of a film may hold another picture as soon as the next one is asked for.
    try:
        source = encoded(source, name)
        if callable(source) or isinstance(source, (str, Path, bytes)):
            return partial(preprocessor.prepare, source, name)
        return partial(preprocessor.prepare, read_image(source, name), name)
    except ImageError as error:
        return partial(_raise, error)


def _raise(error: ImageError) -> PreparedImage:
    raise error


def _group(images: Iterable[PreparedImage], batch_size: int) -> Iterator[list[PreparedImage]]:
    for _, alike in groupby(images, key=lambda image: image.tensor.shape):
        while batch := list(islice(alike, batch_size)):
            yield batch


def read_ahead(
    calls: Iterable[tuple[Key, Callable[[], Result]]],
    ahead: int,
    on_error: Callable[[Key, ImageError], None] | None = None,
) -> Iterator[tuple[Key, Result]]:
    """Makes calls in threads and yields their results in order, each with its key.

    Args:
        calls: keys and what to call; taken from the iterable, in the caller's thread, only as far as they are needed.
        ahead: how many may be under way or wait to be yielded.
        on_error: called with the key and the error of a call that raises ImageError, which is then left out; by default
            the error is raised.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="adpretrain-decode")
    try:
        remaining = iter(calls)
        pending: deque[tuple[Key, Future[Result]]] = deque()
        while True:
            pending.extend((key, pool.submit(call)) for key, call in islice(remaining, ahead - len(pending)))
            if not pending:
                return
            key, future = pending.popleft()
            try:
                result = future.result()
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(key, error)
            else:
                yield key, result
    finally:
        pool.shutdown(cancel_futures=True)
