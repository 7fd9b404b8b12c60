"""The list of what a run has done: which results are there, and which state of its image each was made of."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from adpretrain_hf.images import ImageState, is_same_state


class DoneList:
    """JSON lines, each with an image's name in the results, its path and its state; appended to, never edited.

    What lies in the results' own time stamps does not survive every mount, copy and file system; this does.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._entries = path, dict[str, tuple[str, ImageState]]()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A process that was killed while it wrote leaves half a line, which the next one must not go on with.
        self._separator = "" if not text or text.endswith("\n") else "\n"
        for line in text.splitlines():
            try:
                name, image, size, time = json.loads(line)
            except ValueError:
                continue
            self._entries[name] = image, (size, time)

    def holds(self, name: str, state: ImageState) -> bool:
        """Whether a result was made of an image in this state."""
        return name in self._entries and is_same_state(self._entries[name][1], state)

    def add(self, name: str, image: str, state: ImageState) -> None:
        """Notes that a result is written."""
        entry = name, os.path.abspath(image), *state
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{self._separator}{json.dumps(entry)}\n")
        self._separator, self._entries[name] = "", (entry[1], state)

    def gone(self, names: Iterable[str]) -> list[str]:
        """Other images than these that were removed since: their folder is there, and they are not."""
        others = self._entries.keys() - set(names)
        paths = {name: self._entries[name][0] for name in others}
        return [
            name
            for name, image in paths.items()
            if not os.path.lexists(image) and os.path.isdir(os.path.dirname(image))
        ]
