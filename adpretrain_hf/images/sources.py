"""Whatever a caller calls images, as single ones with names: folders, paths, pictures, arrays, data sets."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.images.decode import ImageSource, encoded

if TYPE_CHECKING:
    from datasets import Dataset

ImageState = tuple[int, int]  # a file's size in bytes, and when it was changed, in nanoseconds
_SECOND = 1_000_000_000  # nanoseconds
_TIME_STEPS = (1_000_000, _SECOND, 2 * _SECOND)  # of file systems and archives
_LOG = logging.getLogger(__name__)
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"))


def list_images(folder: str | Path) -> list[Path]:
    """All images below a folder in order of their paths, by their suffixes; there is at least one.

    Links to files and folders are followed, each folder once. Hidden files and what a NAS, a Mac or Windows leaves
    beside images is passed over; a warning names images among it, links that lead nowhere, and files of other suffixes.

    Raises:
        MissingPathError: no such folder.
        InputError: no image in it, or a folder in it cannot be read.
    """
    paths = find_images(folder)
    if not paths and _is_dataset(Path(folder)):
        raise InputError(f"{folder} is a saved data set: expected a folder of images, or image files")
    if not paths:
        raise InputError(f"no images in {folder}: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return paths


def _is_dataset(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or DatasetDict's wrote it."""
    saved = [("state.json", "dataset_info.json"), ("dataset_dict.json",)]
    return any(all((folder / name).is_file() for name in names) for names in saved)


def images_outside(folder: Path, output: Path) -> list[Path]:
    """What ``list_images`` lists, without what lies in ``output``: results of an earlier run are no input.

    Raises:
        InputError: there is nothing else, or see ``list_images``.
    """
    paths = list_images(folder)
    if output.resolve().is_relative_to(folder.resolve()):
        paths = [path for path in paths if not path.resolve().is_relative_to(output.resolve())]
    if not paths:
        raise InputError(f"no images in {folder} besides the results in {output}")
    return paths


def find_images(folder: str | Path) -> list[Path]:
    """What ``list_images`` lists, where there need not be any."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingPathError(f"no such folder: {folder}")
    passed_over: dict[str, list[str]] = {}
    images = sorted(walk_images(folder, passed_over))
    for why, names in passed_over.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _LOG.warning("%s: passed over %s: %s%s", folder, why, ", ".join(sorted(names)[:5]), more)
    return images


def walk_images(folder: Path, passed_over: dict[str, list[str]]) -> Iterator[Path]:
    """What ``find_images`` finds, folder by folder; what it passes over is noted, by the reason.

    Raises:
        InputError: a folder cannot be read.
    """
    folders, links, seen = [folder], list[Path](), set[tuple[int, int]]()
    while folders or links:
        at = folders.pop() if folders else links.pop()  # a folder goes by its own name before that of a link to it
        try:
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(at) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path, is_image = at / entry.name, os.path.splitext(entry.name)[1].lower() in SUFFIXES
                    if _is_left_behind(entry.name):
                        if is_image:
                            passed_over.setdefault("hidden images", []).append(str(path.relative_to(folder)))
                    elif entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    elif is_image and entry.is_file():
                        yield path
                    else:
                        why = "files of other suffixes" if entry.is_file() else "links that lead nowhere"
                        passed_over.setdefault(why, []).append(str(path.relative_to(folder)))
        except OSError as error:
            raise InputError(
                f"{at} cannot be read ({error.strerror}): give the right to read it, or choose another folder"
            ) from error


def _is_left_behind(name: str) -> bool:
    return name.startswith((".", "@eaDir", "#recycle", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def named_sources(images: Any) -> tuple[Iterable[tuple[ImageSource, str]], int | None]:
    """Splits what a caller gives as images into single ones, each with the name that errors use for it.

    Returns them and their number, or None where it is not known before the end.

    Args:
        images: a path, a folder, a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a uint8 tensor (C, H, W) or
            (B, C, H, W), the bytes of a file or a buffer or open file that holds them, or any iterable of single images
            or of pairs of a name and an image, or a name and a function that returns it; the iterable is read only as
            far as it is asked. Also an array or a pandas column of paths. Arrays and tensors are RGB.

    Raises:
        InputError: there is none.
        ImageError: an open file cannot be read.
    """
    if hasattr(images, "to_numpy"):  # a column of pandas, or a table of one column
        images = images.to_numpy()
    images = encoded(images, "the image")
    if isinstance(images, (str, Path)):
        images = list_images(images) if os.path.isdir(images) else [Path(images)]
    elif isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # paths
        if images.size != len(images):
            raise InputError(f"got a table of shape {images.shape} as images, expected one column of paths")
        images = images.ravel().tolist()
    elif isinstance(images, (bytes, Image.Image)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim != 4):
        return [(images, name_of(images))], 1
    if not isinstance(images, Iterable):
        raise InputError(f"got {type(images).__name__} as images, expected paths, a folder, PIL images or arrays")
    total = len(images) if isinstance(images, Sized) else None
    if total == 0:
        raise InputError("no images were given: expected at least one")
    return (_named(image, number) for number, image in enumerate(images)), total


def _named(image: Any, number: int) -> tuple[ImageSource, str]:
    if isinstance(image, tuple) and len(image) == 2 and isinstance(image[0], str):
        return image[1], image[0]
    return image, name_of(image, number)


def name_of(image: Any, number: int | None = None) -> str:
    """How errors call an image: its path, or its place in the list."""
    if isinstance(image, (str, Path)):
        return str(image)
    return "the image" if number is None else f"image {number}"


def is_same_state(state: ImageState, other: ImageState) -> bool:
    """Whether an image is as it was: of one size, and its times equal, or one the other as a coarser clock keeps it.

    Two times of whole seconds are of one clock: an image that is replaced a second later is another one.
    """
    (size, time), (other_size, other_time) = state, other
    apart = abs(time - other_time)
    is_rounded = (
        apart < step and coarse % step == 0 and fine % min(step, _SECOND) > 0
        for step in _TIME_STEPS
        for coarse, fine in ((time, other_time), (other_time, time))
    )
    return size == other_size and (apart < 1_000 or any(is_rounded))  # a float of seconds has no more


def is_removed(path: str | Path) -> bool:
    """Whether an image was taken out of its folder; an empty or missing one may be where nothing is mounted now."""
    if os.path.lexists(path):
        return False
    try:
        return bool(os.listdir(os.path.dirname(path) or "."))
    except OSError:
        return False


@dataclass(frozen=True)
class RunImages:
    """The images of a long run, each with the name that its result goes by.

    Attributes:
        names: what errors call every image, its path or ``"row 7"``, and its name in the results: the path relative to
            the folder, or the zero-padded number of the row.
        source: an image by what errors call it: its path, or its bytes; ImageError where there is none.
        states: of the files; none for a data set.
        settings: the identity of a data set, for a run that goes on only with the same.
        categories: of the products that the images show, where there are several.
    """

    names: dict[str, str]
    source: Callable[[str], ImageSource]
    states: dict[str, ImageState] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)


def open_images(images: str | Path | Sequence[str | Path], output: Path, column: str | None = None) -> RunImages:
    """Opens what a run is to work through.

    Args:
        images: a folder, image files, or a folder that ``Dataset.save_to_disk`` wrote.
        output: where the results go; what lies in it is no image.
        column: the column of a data set's images.

    Raises:
        MissingPathError: no such image or folder.
        InputError: no images, two of the same name, ``datasets`` is not installed, or the data set is damaged.
    """
    paths = [Path(path) for path in ([images] if isinstance(images, (str, Path)) else images)]
    if len(paths) == 1 and _is_dataset(paths[0]):
        return dataset_images(_load_dataset(paths[0]), column)
    if column is not None:
        raise InputError(f"an image column ({column!r}) was given, but the images are files: expected a data set")
    names = _relative_names(paths, output)
    # Before any is read: one that is replaced meanwhile is found changed the next time.
    states = {}
    for image in names:
        with contextlib.suppress(OSError):  # gone since it was listed: reading it will tell
            status = os.stat(image)
            states[image] = status.st_size, status.st_mtime_ns
    return RunImages(names, str, states)


def dataset_images(dataset: "Dataset", column: str | None = None) -> RunImages:
    """The images of a data set, in the order of its rows.

    Args:
        dataset: the data set; its formats and transforms are left aside.
        column: the column of the images; by default the only one of the kind ``Image``.

    Raises:
        InputError: no rows, no such column, or several to choose from.
    """
    from datasets import Image

    column = _image_column(dataset, column)
    if not len(dataset):
        raise InputError("the data set has no rows: expected at least one image")
    rows = dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))

    def source(image: str) -> ImageSource:
        encoded = rows[int(image.removeprefix("row "))][column] or {}
        if encoded.get("bytes") is not None:
            return encoded["bytes"]
        if encoded.get("path") is not None:
            return Path(encoded["path"])
        raise ImageError(f"{image} of the data set holds no image")

    digits = len(str(len(dataset) - 1))
    names = {f"row {number}": f"{number:0{digits}}" for number in range(len(dataset))}
    # Of the whole data set, for that of the selected column depends on how datasets hashes its own functions.
    return RunImages(names, source, settings={"dataset": f"{dataset._fingerprint} {column}"})


def _relative_names(images: Sequence[Path], output: Path) -> dict[str, str]:
    for path in images:
        if not path.exists():
            raise MissingPathError(f"no such image or folder: {path}")
        if len(images) > 1 and path.is_dir():
            raise InputError(f"{path} is one of several paths, and a folder: give one common folder, or image files")
    if not images:
        raise InputError("no images were given: expected a folder or image files")
    if len(images) == 1 and images[0].is_dir():
        names = {str(path): path.relative_to(images[0]).as_posix() for path in images_outside(images[0], output)}
    else:
        names = {str(path): path.name for path in images}
    twice = sorted(name for name, number in Counter(names.values()).items() if number > 1)
    if twice:
        advice = "give their common folder instead of the files"
        raise InputError(f"several images have the same file name {twice}: {advice}")
    return names


def _load_dataset(folder: Path) -> "Dataset":
    """Opens what ``Dataset.save_to_disk`` wrote; the rows stay on the disk."""
    try:
        from datasets import Dataset
    except ImportError as error:
        missing = "datasets is not installed: pip install 'datasets>=4.0'"
        raise InputError(f"{folder} is a data set, and {missing}") from error
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise InputError(f"{folder} holds several data sets: give one of them, {folder.name}/{{{','.join(parts)}}}")
    try:
        return Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not a readable data set: {error}") from error


def _image_column(dataset: "Dataset", column: str | None) -> str:
    from datasets import Image

    features = dataset.features
    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if column is not None and column not in columns:
        raise InputError(f"the data set has no column of images called {column!r}, only {columns}")
    if not columns:
        found = f"its columns are {list(features)}; cast one to datasets.Image"
        raise InputError(f"the data set has no column of images: {found}")
    if column is None and len(columns) > 1:
        raise InputError(f"the data set has several columns of images, {columns}: name one (--image-column)")
    return column or columns[0]
