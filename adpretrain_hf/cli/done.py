"""The list of what a run has done: which results are there, and which state of its image each was made of."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adpretrain_hf.files import sha256_of
from adpretrain_hf.images import ImageState, is_removed, is_same_state


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
    """JSON lines, each with an image's name in the results, its path, its state and its category.

    What lies in the results' own time stamps does not survive every mount, copy and file system; this does.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self._entries: dict[str, tuple[str, ImageState, str]] = {}
        for line in self._lines:
            match line:
                case [str(name), str(image), int(size), int(time), *rest]:
                    self._entries[name] = image, (size, time), "".join(map(str, rest))

    def holds(self, name: str, image: str, state: ImageState, category: str) -> bool:
        """Whether a result was made of an image in this state, as one of this category.

        A name, a size and a time may be those of another image: one that lay elsewhere and still does is compared.
        """
        if name not in self._entries:
            return False
        made_of, before, as_category = self._entries[name]
        if as_category != category or not is_same_state(before, state):
            return False
        if made_of == os.path.abspath(image) or not os.path.exists(made_of):
            return True
        try:
            return sha256_of(Path(made_of)) == sha256_of(Path(image))
        except OSError:
            return False

    def add(self, name: str, image: str, state: ImageState, category: str) -> None:
        """Notes that a result is written."""
        path = os.path.abspath(image)
        self._lines.append((name, path, *state, category))
        self._entries[name] = path, state, category

    def gone(self, names: Iterable[str]) -> list[str]:
        """Other images than these that were removed since."""
        others = self._entries.keys() - set(names)
        return [name for name in others if is_removed(self._entries[name][0])]
