"""Calls made in threads ahead of whoever needs their results, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from adpretrain_hf.errors import ImageError

Key = TypeVar("Key")
Result = TypeVar("Result")


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
            for key, call in islice(remaining, ahead - len(pending)):
                pending.append((key, pool.submit(call)))
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
