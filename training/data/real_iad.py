"""RealIAD and Real-IAD Variety as a table: from the unpacked folder, from the class zips as they are, or from the Hub.

A folder, or the gated repository ``Real-IAD/Real-IAD``, holds ``realiad_512/<class>.zip`` (or ``realiad_512/<class>/``,
or some so and some so; other resolutions alike) and ``realiad_jsons.zip`` (or ``realiad_jsons/``). Real-IAD Variety is
called ``realiadvariety_512`` and ``realiadvariety_jsons.zip``, and has PNG images. The jsons' split into training and
test images is passed over, as in the released pretraining. No image is opened before it is needed.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.hub import RepositoryFiles
from training.data.table import Row, Source, make_table, read_encoded, refuse, refuse_shared, zip_members

Layout = dict[str, set[str]]  # resolution -> classes

_NAMED_PLACE = re.compile(r"(?:^|/)(S\d+)/[^/]*_(C[1-5])_[^/]*$")
_ENDING = re.compile(r"(?:_[A-Za-z]+)?\.\w+$")  # of a mask's name: its suffix, and a word before it
_LOG = logging.getLogger(__name__)


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
RELEASES = {release.prefix: release for release in (REAL_IAD, Release("realiadvariety", _VARIETY_JSONS))}
_FOLDER = rf"({'|'.join(RELEASES)})_(\d+|raw)"  # not realiad_d3_raw, which is another data set
_CLASS = rf"{_FOLDER}/(?!\.|__MACOSX)([^/]+?)(?:\.zip|/)"  # not what is hidden, or a Mac left


def resolution_of(folder: str) -> str | None:
    """The resolution that a folder's name tells, or None."""
    match = re.fullmatch(_FOLDER, folder)
    return match[2] if match else None


def layout_of_folder(root: Path) -> tuple[Release, Layout]:
    """The release that lies in a folder, and its classes at each resolution.

    Raises:
        InputError: both releases lie there.
    """
    folders = [folder for folder in sorted(root.iterdir()) if resolution_of(folder.name) and folder.is_dir()]
    entries = (entry for folder in folders for entry in folder.iterdir())
    return _layout_of((f"{entry.parent.name}/{entry.name}{'/' * entry.is_dir()}" for entry in entries), root)


def _layout_of(names: Iterable[str], where: object) -> tuple[Release, Layout]:
    """The same of the names of zips, and of folders with a slash at the end, below the folders of resolutions."""
    found: dict[str, Layout] = {}
    for match in filter(None, (re.fullmatch(_CLASS, name) for name in names)):
        prefix, resolution, category = match.groups()
        found.setdefault(prefix, {}).setdefault(resolution, set()).add(category)
    if len(found) > 1:
        raise InputError(f"{where} holds both RealIAD and Real-IAD Variety: give each a folder of its own")
    prefix, layout = next(iter(found.items()), (REAL_IAD.prefix, {}))
    return RELEASES[prefix], layout


def _class_files(folder: Path, category: str, prefix: str) -> tuple[Path, dict[str, str]]:
    """Lists the files of a class: of its folder if there is one, else of its zip.

    A zip is often unpacked into a folder of its own name, which doubles that: ``<class>/<class>/OK``; some zips lack
    the class's folder. All are found.

    Returns:
        The folder or the zip, for errors; and by the files' names in the class's json, relative to its prefix, their
        paths, or ``zip://<member>::<zip>`` as the datasets library writes it.
    """
    place = folder / category
    if place.is_dir():
        found = os.walk(place, followlinks=True)
        names = [f"{at[len(str(folder)) + 1 :]}/{name}" for at, _, files in found for name in files]
        start, end = f"{folder}{os.sep}", ""
    else:
        place = folder / f"{category}.zip"
        names, start, end = list(zip_members(place)), "zip://", f"::{place}"
    doubled = f"{category}/{prefix}"
    there = (base for base in (doubled, prefix) if any(name.startswith(base) for name in names))
    base = next(there, "" if any(name.startswith(("OK/", "NG/")) for name in names) else prefix)
    return place, {name.removeprefix(base): f"{start}{name}{end}" for name in names if name.startswith(base)}


def rows_of_class(
    root: Path, release: Release, resolution: str, category: str, *, strict: bool = True
) -> list[tuple[str, Row]]:
    """The images of a class in order of their names, each with its split, train or test.

    Args:
        root: the folder of the data set.
        release, resolution, category: of the class.
        strict: an image or a mask that is absent, and a mask that belongs to none of the images, is an error; otherwise
            such images are left out, and counted in a warning.

    Raises:
        InputError: see there; the json or the zip is missing or damaged; the json names an image twice or outside its
            class, gives one below ``OK`` a mask, or names no normal image.
    """
    place, prefix, items = _read_json(root, category, release)
    below, files = _class_files(root / release.folder(resolution), category, prefix)
    unusable = _unusable([row for _, row in items], place, files.keys(), below, strict=strict)
    items = [(split, row) for split, row in items if row.image not in unusable]
    if all(row.is_anomalous for _, row in items):
        raise InputError(f"{place} names no normal image: expected some without a mask, to be references of the class")
    return [(split, row._replace(image=files[row.image], mask=row.mask and files[row.mask])) for split, row in items]


def _read_json(root: Path, category: str, release: Release) -> tuple[str, str, list[tuple[str, Row]]]:
    """Where a class's json lies, its prefix, and its images with their splits; paths are relative to the prefix."""
    data, place = _find(root, category, release)
    try:
        content = json.loads(data)
        prefix = f"{content['meta']['prefix'].rstrip('/')}/" if content["meta"]["prefix"] else ""
        items = [(split, _row(entry, category)) for split in ("train", "test") for entry in content[split]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place} is not a json as RealIAD comes with ({error!r}): get it again") from error
    names = [prefix, *(name for _, row in items for name in (row.image, row.mask or ""))]
    escapes = [name for name in names if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)]
    refuse(escapes, f"names in {place} lead out of the folder of the class", "expected paths below it, without '..'")
    twice = [name for name, count in Counter(row.image for _, row in items).items() if count > 1]
    refuse(twice, f"images are named more than once in {place}", "remove all but one of each")
    return place, prefix, sorted(items, key=lambda item: item[1].image)


def _row(entry: dict[str, Any], category: str) -> Row:
    image, mask = entry["image_path"], entry["mask_path"] or None
    if (named := _NAMED_PLACE.search(image)) is None:
        raise ValueError(f"the image is called {image!r}, expected .../S0001/..._C1_... (its sample and view)")
    sample, view = named.groups()
    return Row(image, mask, category, view, entry["anomaly_class"], mask is not None, image.startswith("OK/"), sample)


def _unusable(rows: Sequence[Row], place: str, names: Set[str], below: Path, *, strict: bool) -> set[str]:
    """Images of the json at ``place`` that are absent from the ``names`` in ``below`` or contradicted by them.

    Where it is strict, they are an error, see ``rows_of_class``.
    """
    marked = [row.image for row in rows if row.is_anomalous and row.is_good]
    refuse(marked, f"images are normal (below OK) but have a mask in {place}", "get it again")
    refuse_shared(rows, place)
    images, masks = {row.image for row in rows}, {row.mask for row in rows if row.mask is not None}
    ending = _mask_ending(rows)
    contradicted, orphans = _stray_masks(rows, names - images - masks, ending) if ending else ([], [])
    again = "unpack or download it again"
    for named, what, remedy in (
        (sorted(images - names), f"images that {place} names are absent from {below}", again),
        (sorted(masks - names), f"masks that {place} names are absent from {below}", again),
        (
            contradicted,
            f"masks in {below} belong to images that {place} gives no mask",
            "get it again, or remove those masks",
        ),
        (orphans, f"masks in {below} have no image", f"{again}, or remove them"),
    ):
        if strict:
            refuse(named, what, f"{remedy}, or go on without them by --no-strict")
        elif named:
            _LOG.warning("%d %s: left out, such as %s", len(named), what, named[0])
    unclear = {name.removesuffix(ending) for name in contradicted}
    return {
        row.image
        for row in rows
        if not {row.image, row.mask or row.image} <= names or (row.mask is None and _stem(row.image) in unclear)
    }


def _mask_ending(rows: Sequence[Row]) -> str:
    """How masks' names end and images' do not: ``".png"``, or ``"_mask.png"``; empty where nothing tells them apart."""
    endings = {_ENDING.findall(row.mask)[-1] for row in rows if row.mask} or {".png"}
    ending = endings.pop()
    return "" if endings or any(row.image.endswith(ending) for row in rows) else ending


def _stray_masks(rows: Sequence[Row], others: Set[str], ending: str) -> tuple[list[str], list[str]]:
    """Among other files, masks that belong to images without one in the json, and those that belong to no image."""
    others = {name for name in others if name.startswith("NG/") and "/." not in name}
    stray = {name: name.removesuffix(ending) for name in sorted(others) if name.endswith(ending)}
    maskless = {_stem(row.image) for row in rows if row.mask is None}
    # Images that the json leaves out may keep their masks.
    known = maskless | {_stem(name) for name in others - stray.keys()}
    contradicted = [name for name, of in stray.items() if of in maskless]
    return contradicted, [name for name, of in stray.items() if of not in known]


def _find(root: Path, category: str, release: Release) -> tuple[bytes, str]:
    names = [f"{folder}/{category}.json" for folder in release.jsons]
    for name in names:
        if (root / name).is_file():
            return (root / name).read_bytes(), str(root / name)
    archive = root / release.archive
    members = zip_members(archive) if archive.is_file() else {}
    for name in names:
        if name in members:
            return read_encoded({"bytes": None, "path": f"zip://{name}::{archive}"}), f"{name} in {archive}"
    raise InputError(f"no json for the class {category!r}: looked for {' and '.join(names)} in {root} and {archive}")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def open_real_iad(source: str | Path, *, resolution: str = "512", strict: bool = True) -> Source:
    """Opens RealIAD or Real-IAD Variety: its classes in order, and the table of some, by class and then by name.

    Columns: see ``Row``. The ``view`` is ``"C1"`` to ``"C5"``, the ``anomaly_class`` that of the json (``"OK"`` or such
    as ``"AK"``); ``is_good`` is what lies below ``OK``, and a ``sample`` is such as ``"S0001"``, counted anew in ``OK``
    and each ``NG/<code>``. An image is anomalous only if it has a mask: not every view of a damaged sample shows the
    damage. Of a repository only the zips of classes that are loaded are downloaded.

    Args:
        source: a folder, or the id of a dataset repository on the Hub, which gets the token that is logged in.
        resolution: ``"256"``, ``"512"``, ``"1024"`` or ``"raw"``.
        strict: see ``rows_of_class``.

    Raises:
        MissingPathError: no such folder or repository.
        InputError: what is there is incomplete, damaged or contradicts itself; or the Hub does not give it.
    """
    root, files = Path(os.path.abspath(source)), None
    if not root.is_dir():
        files, root = _repository(str(source))
    if files is None or files.names is None:
        release, layout = layout_of_folder(root)
    else:
        release, layout = _layout_of(files.names, source)
    if not layout:
        raise InputError(
            f"no RealIAD in {source}: expected folders such as realiad_512 with a folder or a zip for each class, and "
            "realiad_jsons beside them"
        )
    if resolution not in layout:
        raise InputError(f"{source} has no resolution {resolution!r}: expected one of {sorted(layout)}")

    def load(categories: list[str]) -> Dataset:
        for category in categories:
            if files is not None:  # each member of a zip has a checksum, which is looked at when it is read
                files.file(f"{release.folder(resolution)}/{category}.zip")
        classes = (rows_of_class(root, release, resolution, category, strict=strict) for category in categories)
        return make_table(row for rows in classes for _, row in rows)

    return Source(sorted(layout[resolution]), load)


def _repository(repo_id: str) -> tuple[RepositoryFiles, Path]:
    """A repository's files, and the folder that its jsons, of whichever release, were downloaded to."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MissingPathError(f"no RealIAD at {repo_id}: neither a folder nor the id of a repository") from error
    errors = []
    for release in RELEASES.values():
        try:
            files = RepositoryFiles(repo_id, probe=release.archive, repo_type="dataset", contents="RealIAD")
            root = files.file(release.archive).parent
        except BundleError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            errors.append(error)
        else:
            if files.names is None:
                _LOG.warning("the Hub cannot be asked what %s holds: its cached classes are taken as all", repo_id)
            return files, root
    raise errors[0]
