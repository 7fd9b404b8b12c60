"""Where the images of RealIAD, or of Real-IAD Variety, lie: a folder or a zip for each class, none of them opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adpretrain_hf.errors import InputError
from training.encoded import member_names

Layout = dict[str, set[str]]  # resolution -> classes


class Release(NamedTuple):
    """One of the two data sets.

    Attributes:
        prefix: of the folders, ``<prefix>_<resolution>``.
        jsons: the folders that the jsons may lie in, inside of ``<prefix>_jsons.zip`` and unpacked.
    """

    prefix: str
    jsons: tuple[str, ...]

    def folder(self, resolution: str) -> str:
        """The name of a resolution's folder."""
        return f"{self.prefix}_{resolution}"

    @property
    def archive(self) -> str:
        """The name of the zip of the jsons."""
        return f"{self.prefix}_jsons.zip"


REAL_IAD = Release("realiad", ("realiad_jsons", "realiad_jsons/realiad_jsons"))
_VARIETY_JSONS = ("Real-IAD_Variety_jsons", "realiadvariety_jsons", "realiadvariety_jsons/Real-IAD_Variety_jsons")
RELEASES = (REAL_IAD, Release("realiadvariety", _VARIETY_JSONS))
_RESOLUTION = r"\d+|raw"  # not realiad_d3_raw, which is another data set


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

    A zip is often unpacked into a folder of its own name, which doubles that: ``<class>/<class>/OK``; some zips lack
    the class's folder. All are found.

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
    there = (base for base in (doubled, prefix) if any(name.startswith(base) for name in names))
    base = next(there, "" if any(name.startswith(("OK/", "NG/")) for name in names) else prefix)
    inside = frozenset(name.removeprefix(base) for name in names if name.startswith(base))
    return ClassTree(place, start + base, end, inside)


def layout_of_folder(root: Path) -> tuple[Release, Layout]:
    """The release and its classes at each resolution below a folder; what is hidden, or a Mac left, is passed over.

    Raises:
        InputError: both releases lie there.
    """
    found: dict[Release, Layout] = {}
    for folder in sorted(root.iterdir()):
        release, resolution = _parse(folder.name)
        if release is not None and folder.is_dir():
            entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
            zips = {entry.stem for entry in entries if entry.suffix == ".zip"}
            classes = zips | {entry.name for entry in entries if entry.is_dir()}
            found.setdefault(release, {})[resolution] = classes
    if len(found) > 1:
        raise InputError(f"{root} holds both RealIAD and Real-IAD Variety: give each a folder of its own")
    return next(iter(found.items()), (REAL_IAD, {}))


def layout_of_repository(names: Iterable[str]) -> tuple[Release, Layout]:
    """The same among the files of a repository, where each class is a zip."""
    found: dict[Release, Layout] = {}
    for name in names:
        folder, _, file = name.partition("/")
        release, resolution = _parse(folder)
        if release is not None and re.fullmatch(r"[^/]+\.zip", file):
            found.setdefault(release, {}).setdefault(resolution, set()).add(file.removesuffix(".zip"))
    return next(iter(found.items()), (REAL_IAD, {}))


def resolution_of(folder: str) -> str | None:
    """The resolution that a folder's name tells, or None."""
    return _parse(folder)[1] or None


def _parse(folder: str) -> tuple[Release | None, str]:
    """The release and the resolution that a folder's name tells."""
    for release in RELEASES:
        if match := re.fullmatch(f"{release.prefix}_({_RESOLUTION})", folder):
            return release, match[1]
    return None, ""


def choose(
    release: Release, layout: Layout, source: object, resolution: str, categories: Sequence[str] | None
) -> list[str]:
    """The classes that are asked for, all by default, in alphabetical order.

    Raises:
        InputError: nothing there, or not this resolution, or not these classes; the message says what is there.
    """
    if not layout:
        raise InputError(
            f"no RealIAD in {source}: expected folders such as realiad_512 with a folder or a zip for each class, and "
            "realiad_jsons beside them"
        )
    if resolution not in layout:
        raise InputError(f"{source} has no resolution {resolution!r}: expected one of {sorted(layout)}")
    there = layout[resolution]
    if not there:
        folder = release.folder(resolution)
        raise InputError(f"{folder} in {source} is empty: expected a folder or a zip for each class")
    wanted = there if categories is None else {categories} if isinstance(categories, str) else set(categories)
    if not wanted:
        raise InputError(f"no category is asked for: expected some of {sorted(there)}, or None for all")
    if unknown := sorted(wanted - there):
        raise InputError(
            f"{source} has no category {', '.join(unknown)} in {release.folder(resolution)}: expected some of "
            f"{sorted(there)}"
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
