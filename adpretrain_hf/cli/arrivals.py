"""Which images of a folder have arrived: they are whole, and no result was made of them as they are now."""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from adpretrain_hf.images import ImageState, is_same_state, walk_images


@dataclass
class Arrival:
    """An image that no result was made of yet.

    Attributes:
        name: the path relative to the folder.
        path: of the file.
        state: its size and time.
        since: when it was first seen in this state, in seconds of ``time.monotonic``.
        noticed: when it was found whole; infinity before.
        tries: how often it could not be used, and may be later.
    """

    name: str
    path: Path
    state: ImageState
    since: float
    noticed: float = math.inf
    tries: int = 0


class Arrivals:
    """Looks at a folder again and again, which works on every mount.

    A file is whole when the kernel says that nobody has it open for writing, as Linux can for files of the user's own
    on a local disk, or when its size and time have not changed for a while. What is known of files that are no longer
    there is forgotten.

    Args:
        folder: with the images, and with folders of images.
        settle: for how many seconds a file has not changed.
        before: names and states of images that results were made of, the last of an image last; read when first needed.
    """

    def __init__(self, folder: Path, settle: float, before: Iterable[tuple[str, ImageState]] = ()) -> None:
        self._folder, self._settle, self._before = folder, settle, iter(before)
        self._done: dict[str, ImageState] = {}
        self._waiting: dict[str, Arrival] = {}

    def __len__(self) -> int:
        """How many images wait, whole or not."""
        return len(self._waiting)

    def look(self) -> list[Arrival]:
        """The images that are whole, the oldest first, but those that were tried already last.

        Raises:
            InputError: the folder cannot be read, as when it lies on a share that is away.
        """
        found = self._states()
        if found:  # an empty folder may be where nothing is mounted just now
            folders, known = {os.path.dirname(name) for name in found}, chain(self._done.items(), self._before)

            @cache
            def is_away(folder: str) -> bool:
                return folder not in folders and (self._folder / folder).is_dir()

            self._done = {name: state for name, state in known if name in found or is_away(os.path.dirname(name))}
        now, waiting = time.monotonic(), self._waiting
        self._waiting = {
            name: waiting[name]
            if name in waiting and waiting[name].state == state
            else Arrival(name, self._folder / name, state, now)
            for name, state in found.items()
            if (done := self._done.get(name)) != state and not (done and is_same_state(done, state))
        }
        for one in self._waiting.values():
            if one.noticed > now and (now - one.since >= self._settle or _is_closed(one.path)):
                one.noticed = now
        whole = (one for one in self._waiting.values() if one.noticed <= now)
        return sorted(whole, key=lambda one: (one.tries, one.state[1]))

    def done(self, one: Arrival) -> None:
        """Notes that a result was made of an image."""
        self._done[one.name] = one.state
        self._waiting.pop(one.name, None)

    def _states(self) -> dict[str, ImageState]:
        found, start = {}, len(str(self._folder / "_")) - 1
        for path in map(str, walk_images(self._folder, {})):  # texts, for there may be very many
            try:
                status = os.stat(path)
            except OSError:  # gone since it was listed
                continue
            found[path[start:].replace(os.sep, "/")] = status.st_size, status.st_mtime_ns
        return found


def _is_closed(path: Path) -> bool:
    """Whether the kernel says that nobody has a file open for writing; it grants no lease where somebody has."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (ImportError, AttributeError, OSError):  # another system, another's file, a network share
        return False
    return True
