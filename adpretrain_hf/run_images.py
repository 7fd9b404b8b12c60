"""The images of a long run: a folder, image files or a data set, each with the name that its result goes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from adpretrain_hf.dataset_images import DatasetImages, is_dataset, is_saved_dataset, load_dataset
from adpretrain_hf.errors import InputError, MissingPathError
from adpretrain_hf.images import ImageSource, list_images


class FileImages:
    """The images of a folder, or some image files.

    Args:
        images: a folder, or image files.
        output: where the results go; what lies in it is no image.

    Attributes:
        names: the path of every image, and its name in the results: the path relative to the folder.
        times: when each was changed, in nanoseconds.

    Raises:
        MissingPathError: no such image or folder.
        InputError: no images, or two of the same name.
    """

    def __init__(self, images: Sequence[Path], output: Path) -> None:
        self.names = _relative_names(images, output)
        # Before any is read: one that is replaced meanwhile is found changed the next time.
        self.times = {image: Path(image).stat().st_mtime_ns for image in self.names}

    def source(self, image: str) -> ImageSource:
        """What is read: the path."""
        return image

    def identity(self, image: str) -> str:
        """What changes when an image is replaced: its time."""
        return str(self.times[image])


RunImages = Union[FileImages, DatasetImages]


def open_images(images: Any, output: Path, column: str | None = None) -> RunImages:
    """Opens what a run is to work through.

    Args:
        images: a folder, image files, a folder that ``Dataset.save_to_disk`` wrote, a ``datasets.Dataset``, or what
            this function returned.
        output: where the results go.
        column: the column of a data set's images.

    Raises:
        InputError: none of these, or there is no image.
    """
    if isinstance(images, (FileImages, DatasetImages)):
        return images
    if is_dataset(images):
        return DatasetImages(images, column)
    given = [images] if isinstance(images, (str, Path)) else images
    if not isinstance(given, Sequence) or not all(isinstance(path, (str, Path)) for path in given):
        raise InputError(f"got {type(images).__name__} as images, expected a folder, paths or a datasets.Dataset")
    paths = [Path(path) for path in given]
    if len(paths) == 1 and is_saved_dataset(paths[0]):
        return DatasetImages(load_dataset(paths[0]), column)
    if column is not None:
        raise InputError(f"an image column ({column!r}) was given, but the images are files: expected a data set")
    return FileImages(paths, output)


def _relative_names(images: Sequence[Path], output: Path) -> dict[str, str]:
    for path in images:
        if not path.exists():
            raise MissingPathError(f"no such image or folder: {path}")
    if not images:
        raise InputError("no images were given: expected a folder or image files")
    if len(images) == 1 and images[0].is_dir():
        paths = list_images(images[0])
        if output.resolve().is_relative_to(images[0].resolve()):  # results of an earlier run are no input
            paths = [path for path in paths if not path.resolve().is_relative_to(output.resolve())]
        names = {str(path): path.relative_to(images[0]).as_posix() for path in paths}
    else:
        names = {str(path): path.name for path in images}
    if not names:
        raise InputError(f"no images in {images[0]} besides the results in {output}")
    twice = sorted(name for name, number in Counter(names.values()).items() if number > 1)
    if twice:
        raise InputError(
            f"several images have the same file name {twice}: give their common folder instead of the files"
        )
    return names
