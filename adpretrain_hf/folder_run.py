"""Work over a folder of images that may be stopped and started again: one output file for each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adpretrain_hf.errors import ImageError
from adpretrain_hf.run_images import FileImages
from adpretrain_hf.run_settings import keep_settings

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

    Attributes:
        files: the images, with their names.

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
        self.files = FileImages(self.images, self.output)
        keep_settings(self.output, self.settings)

    @property
    def names(self) -> dict[str, str]:
        """The path of every image, and its name in the results: the path relative to the folder."""
        return self.files.names

    def result_path(self, image: str) -> Path:
        """Where an image's result goes."""
        return self.output / self.subfolder / f"{self.names[image]}{self.suffix}"

    def results(self) -> dict[str, Path]:
        """The results that are there, by the names of their images."""
        paths = {name: self.result_path(image) for image, name in self.names.items()}
        return {name: path for name, path in paths.items() if path.is_file()}

    def pending(self) -> list[Path]:
        """The images without a result, or that are no longer those that it was made of."""
        return [Path(image) for image in self.names if not self._is_done(image)]

    def note_done(self, image: str) -> None:
        """Notes that an image's result is written, by giving it the image's time: a replaced image has another."""
        time = self.files.times[image]
        os.utime(self.result_path(image), ns=(time, time))

    def note_failure(self, image: str, error: ImageError) -> None:
        """Notes an image that cannot be used; the run goes on."""
        self.failures.append((self.names[image], error))
        self.result_path(image).unlink(missing_ok=True)  # that of an earlier state of the image

    def _is_done(self, image: str) -> bool:
        result = self.result_path(image)
        return result.is_file() and abs(_time_of(result) - _time_of(Path(image))) < _TIME_ACCURACY


def _time_of(path: Path) -> int:
    return path.stat().st_mtime_ns
