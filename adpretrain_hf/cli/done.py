"""The list of what a run has done: which results are there, and which state of its image each was made of."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adpretrain_hf.images import ImageState, is_same_state


class JsonLines:
    """A file of JSON values, one a line; appended to, never edited.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Any]:
        """The values, without the half line that is left where a machine went down."""
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                yield value

    def append(self, value: Any) -> None:
        """Writes a line at once.

        Raises:
            OSError: it cannot be written, as on a full disk; then nothing of it is there.
        """
        line = json.dumps(value).encode() + b"\n"
        with self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # half a line, which the next one must not go on with
                line = b"\n" + line
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)
                raise


class DoneList:
    """JSON lines, each with an image's name in the results, its path and its state.

    What lies in the results' own time stamps does not survive every mount, copy and file system; this does.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self._entries: dict[str, tuple[str, ImageState]] = {
            name: (image, (size, time)) for name, image, size, time in self._lines
        }

    def holds(self, name: str, state: ImageState) -> bool:
        """Whether a result was made of an image in this state."""
        return name in self._entries and is_same_state(self._entries[name][1], state)

    def add(self, name: str, image: str, state: ImageState) -> None:
        """Notes that a result is written."""
        path = os.path.abspath(image)
        self._lines.append((name, path, *state))
        self._entries[name] = path, state

    def gone(self, names: Iterable[str]) -> list[str]:
        """Other images than these that were removed since: their folder is there, and they are not."""
        others = self._entries.keys() - set(names)
        paths = {name: self._entries[name][0] for name in others}
        return [
            name
            for name, image in paths.items()
            if not os.path.lexists(image) and os.path.isdir(os.path.dirname(image))
        ]
