"""Where the images of RealIAD lie: a folder or a zip for each class, listed without opening one image."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adpretrain_hf.errors import InputError
from training.encoded import member_names

JSONS = "realiad_jsons"
Layout = dict[str, set[str]]  # resolution -> classes


@dataclass(frozen=True)
class ClassTree:
    """The files of one class.

    Attributes:
        place: the folder or the zip, for errors.
        start: what precedes a file's name in its address.
        end: what follows it.
        names: of all files, as the class's json names them: relative to its prefix.
    """

    place: Path
    start: str
    end: str
    names: frozenset[str]

    def address(self, name: str) -> str:
        """A file's path, or ``zip://<member>::<zip>`` as the datasets library writes it."""
        return f"{self.start}{name}{self.end}"


def class_tree(folder: Path, category: str, prefix: str) -> ClassTree:
    """Lists the files of a class: of its folder if there is one, else of its zip.

    A zip is often unpacked into a folder of its own name, which doubles that: ``<class>/<class>/OK``. Both are found.

    Args:
        folder: of a resolution.
        category: the class.
        prefix: from the class's json, ``<class>/``.

    Raises:
        InputError: the zip is damaged.
    """
    place = folder / category
    if place.is_dir():
        names, start, end = list(_files_below(str(folder), category)), f"{folder}{os.sep}", ""
    else:
        place = folder / f"{category}.zip"
        names, start, end = member_names(place), "zip://", f"::{place}"
    doubled = f"{category}/{prefix}"
    base = doubled if any(name.startswith(doubled) for name in names) else prefix
    inside = frozenset(name.removeprefix(base) for name in names if name.startswith(base))
    return ClassTree(place, start + base, end, inside)


def layout_of_folder(root: Path) -> Layout:
    """The classes at each resolution below a folder; what is hidden, or a Mac left there, is passed over."""
    layout: Layout = {}
    for folder in root.glob("realiad_*"):
        if folder.is_dir() and not folder.name.startswith(JSONS):
            entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
            zips = {entry.stem for entry in entries if entry.suffix == ".zip"}
            layout[folder.name.removeprefix("realiad_")] = zips | {entry.name for entry in entries if entry.is_dir()}
    return layout


def layout_of_repository(names: Iterable[str]) -> Layout:
    """The classes at each resolution among the files of a repository, where each class is a zip."""
    layout: Layout = {}
    for name in names:
        if match := re.fullmatch(r"realiad_([^/]+)/([^/]+)\.zip", name):
            layout.setdefault(match[1], set()).add(match[2])
    return layout


def choose(layout: Layout, source: object, resolution: str, categories: Sequence[str] | None) -> list[str]:
    """The classes that are asked for, all by default, in alphabetical order.

    Raises:
        InputError: nothing there, or not this resolution, or not these classes; the message says what is there.
    """
    if not layout:
        raise InputError(
            f"no RealIAD in {source}: expected folders such as realiad_512 with a folder or a zip for each class, and "
            f"{JSONS} beside them"
        )
    if resolution not in layout:
        raise InputError(f"{source} has no resolution {resolution!r}: expected one of {sorted(layout)}")
    there = layout[resolution]
    if not there:
        raise InputError(f"realiad_{resolution} in {source} is empty: expected a folder or a zip for each class")
    wanted = there if categories is None else {categories} if isinstance(categories, str) else set(categories)
    if not wanted:
        raise InputError(f"no category is asked for: expected some of {sorted(there)}, or None for all")
    if unknown := sorted(wanted - there):
        raise InputError(
            f"{source} has no category {', '.join(unknown)} in realiad_{resolution}: expected some of {sorted(there)}"
        )
    return sorted(wanted)


def _files_below(root: str, folder: str) -> Iterator[str]:
    pending = [folder]
    while pending:
        at = pending.pop()
        with os.scandir(os.path.join(root, at)) as entries:  # tells folders from files without asking for each
            for entry in entries:
                name = f"{at}/{entry.name}"
                if entry.is_dir():
                    pending.append(name)
                else:
                    yield name
