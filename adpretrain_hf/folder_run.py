"""Work over a folder of images that may be stopped and started again: one output file for each image."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from adpretrain_hf.files import write_text
from adpretrain_hf.images import list_images

_SETTINGS_FILE = "run.json"
_TIME_ACCURACY = 1_000_000  # nanoseconds; file systems round them differently


@dataclass
class FolderRun:
    """One run: which image goes to which file, which are done, and which failed.

    Args:
        images: a folder, or image files.
        output: where the results go.
        settings: all that the results depend on besides the images; kept in ``run.json``. A run goes on only under the
            same settings.
        suffix: appended to an image's path to name its result.
        subfolder: of ``output``, for the results.

    Raises:
        InputError: no images, two of the same name, or an output folder with results of other settings.
    """

    images: Sequence[Path]
    output: Path
    settings: dict[str, Any]
    suffix: str
    subfolder: str = "."
    failures: list[tuple[str, ImageError]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = _relative_names(self.images, self.output)
        # Before any is read: one that is replaced meanwhile is found changed the next time.
        self._times = {image: _time_of(Path(image)) for image in self._names}
        path = self.output / _SETTINGS_FILE
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{self.output} holds results of other settings (see {path}): give another --output, or remove it"
            )
        write_text(path, text)

    @property
    def names(self) -> dict[str, str]:
        """The path of every image, and its name in the results: the path relative to the folder."""
        return self._names

    def result_path(self, image: str) -> Path:
        """Where an image's result goes."""
        return self.output / self.subfolder / f"{self._names[image]}{self.suffix}"

    def pending(self) -> list[Path]:
        """The images without a result, or that are no longer those that it was made of."""
        return [Path(image) for image in self._names if not self._is_done(image)]

    def note_done(self, image: str) -> None:
        """Notes that an image's result is written, by giving it the image's time: a replaced image has another."""
        os.utime(self.result_path(image), ns=(self._times[image], self._times[image]))

    def note_failure(self, image: str, error: ImageError) -> None:
        """Notes an image that cannot be used; the run goes on."""
        self.failures.append((self._names[image], error))
        self.result_path(image).unlink(missing_ok=True)  # that of an earlier state of the image

    def _is_done(self, image: str) -> bool:
        result = self.result_path(image)
        return result.is_file() and abs(_time_of(result) - _time_of(Path(image))) < _TIME_ACCURACY


def _time_of(path: Path) -> int:
    return path.stat().st_mtime_ns


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
