"""Work that is done ahead in threads, such as decoding: in order, in bounded memory, on all cores of the process."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from adpretrain_hf.errors import ImageError
from adpretrain_hf.images.decode import ImageSource, encoded, read_image

Key = TypeVar("Key")
Result = TypeVar("Result")
OnError = Callable[[str, ImageError], None]
Source = tuple[Any, ...]  # an image, its name, and what else is to be told of it

_RECENT = 64  # images that a source's pace is judged by
_UNNOTICED = 0.005  # seconds that a source may be slower

# The cores that this process may use; not all systems tell them from those that there are.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_ahead(
    prepare: Callable[..., Result], sources: Iterable[Source], ahead: int, on_error: OnError | None = None
) -> Iterator[Result]:
    """Prepares images, with their names and what else is told of them, in threads; see ``read_ahead``.

    So many are asked for ahead only while they come faster than they are used: those of a live camera are asked for
    one at a time, and each is yielded before the next is waited for.
    """
    pace = _Pace(sources, ahead)
    calls = ((name, pace.timed(_call(prepare, source, name, *more))) for source, name, *more in pace)
    for _, image in read_ahead(calls, pace.allowed, on_error):
        began = time.monotonic()
        yield image
        pace.used.append(time.monotonic() - began)


class _Pace:
    """Iterates images, and knows how many may be asked for ahead."""

    def __init__(self, sources: Iterable[Source], ahead: int) -> None:
        self._sources, self._ahead = sources, ahead
        recent = max(_RECENT, 4 * ahead)
        self.waited, self.decoded, self.used = (deque[float](maxlen=recent) for _ in range(3))  # seconds

    def __iter__(self) -> Iterator[Source]:
        sources = iter(self._sources)
        while True:
            began = time.monotonic()
            source = next(sources, None)
            self.waited.append(time.monotonic() - began)
            if source is None:
                return
            yield source

    def allowed(self) -> int:
        """One, until two were asked for and used, and whenever they come more slowly than they are used.

        The last two tell that a source is live now, whatever it had in store before; a single pause does not.
        """
        if min(len(self.waited), len(self.used)) < 2:
            return 1
        slowest = max(fmean(self.waited), min(self.waited[-1], self.waited[-2]))
        return self._ahead if slowest <= fmean(self.used) + fmean(self.decoded) + _UNNOTICED else 1

    def timed(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """A call that notes how long it takes, in whatever thread."""

        def timed() -> Result:
            began = time.monotonic()
            try:
                return call()
            finally:
                self.decoded.append(time.monotonic() - began)

        return timed


def read_ahead(
    calls: Iterable[tuple[Key, Callable[[], Result]]],
    ahead: Callable[[], int],
    on_error: Callable[[Key, ImageError], None] | None = None,
) -> Iterator[tuple[Key, Result]]:
    """Makes calls in threads and yields their results in order, each with its key.

    Args:
        calls: keys and what to call; taken from the iterable, in the caller's thread, only as far as they are needed.
        ahead: how many may be under way or wait to be yielded just now.
        on_error: called with the key and the error of a call that raises ImageError, which is then left out; by default
            the error is raised.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="adpretrain-decode")
    try:
        remaining = iter(calls)
        pending: deque[tuple[Key, Future[Result]]] = deque()
        failure: Exception | None = None
        while True:
            try:
                while failure is None and len(pending) < ahead() and (following := next(remaining, None)) is not None:
                    pending.append((following[0], pool.submit(following[1])))
            except Exception as error:
                failure = error  # of the source: what came before it is yielded first
            if not pending:
                if failure is not None:
                    raise failure
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


def _call(prepare: Callable[..., Result], source: ImageSource, name: str, *more: Any) -> Callable[[], Result]:
    # A camera's buffer or the frame of a film may hold another picture as soon as the next one is asked for.
    try:
        source = encoded(source, name)
        if callable(source) or isinstance(source, (str, Path, bytes)):
            return partial(prepare, source, name, *more)
        return partial(prepare, read_image(source, name), name, *more)
    except ImageError as error:
        return partial(_raise, error)


def _raise(error: ImageError) -> Any:
    raise error
