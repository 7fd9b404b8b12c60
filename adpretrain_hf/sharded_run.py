"""A run whose results go to shards: which images go to which file, which files are done, and the index of all.

The division depends on the list of images and the size of a shard alone. So any number of processes, each of which
takes its part of the shards, leaves the same files, and what one of them left undone any other can do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adpretrain_hf.digest import combined_digest
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import write_text
from adpretrain_hf.results import Failure, Result
from adpretrain_hf.run_images import RunImages
from adpretrain_hf.run_settings import keep_settings
from adpretrain_hf.shards import INDEX_FILE, save_shard, shard_failures

_FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """A block of images and the file of their results.

    Attributes:
        path: the file.
        images: their names in the results, by what errors call them.
        digest: of what the results are made of.
    """

    path: Path
    images: dict[str, str]
    digest: str

    def save(self, results: Mapping[str, Result], failures: list[Failure]) -> None:
        """Writes the results, by the names of the images, and the images that have none."""
        save_shard(self.path, self.digest, results, failures)

    def failures(self) -> list[Failure] | None:
        """The images that could not be used, or None if the shard is still to be done."""
        return shard_failures(self.path, self.digest)


@dataclass(frozen=True)
class Outcome:
    """How far a run has come.

    Attributes:
        open_shards: how many are still to be done, by other processes.
        failures: the images that could not be used: of all shards, or of this process's part while others are open.
    """

    open_shards: int
    failures: list[Failure]


class ShardedRun:
    """One run, as each of its processes sees it.

    Args:
        images: what to work through.
        output: where the results go.
        settings: all that the results depend on besides the images; kept in ``run.json`` with the size of a shard.
        shard_size: images in one file.

    Raises:
        InputError: a size that is not positive, or an output folder with results of other settings.
    """

    def __init__(self, images: RunImages, output: Path, settings: Mapping[str, Any], shard_size: int) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}, expected an integer >= 1")
        keep_settings(output, {**settings, "shard_size": shard_size})
        self._images, self._output, self._shard_size = images, output, shard_size

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards, in order."""
        images = list(self._images.names.items())
        blocks = (images[start : start + self._shard_size] for start in range(0, len(images), self._shard_size))
        return [self._shard(number, dict(block)) for number, block in enumerate(blocks)]

    def part(self, rank: int, world_size: int) -> list[Shard]:
        """The shards of one process of several, done or not, so that no two ever work at the same one.

        Raises:
            InputError: no such process.
        """
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} of {world_size} processes: expected 0 <= rank < world size")
        return self.shards[rank::world_size]

    def forget_index(self) -> None:
        """Removes the index, which holds no longer once a shard is to be written."""
        (self._output / INDEX_FILE).unlink(missing_ok=True)

    def finish(self, part: Sequence[Shard]) -> Outcome:
        """Writes the index if all shards are done, and removes those that a longer list of images has left.

        Every process calls it after the last shard of its part. Several that come here together write the same bytes.
        """
        contents = {shard.path: shard.failures() for shard in self.shards}
        still_open = sum(content is None for content in contents.values())
        told = part if still_open else self.shards
        failures = [failure for shard in told for failure in contents[shard.path] or []]
        if not still_open:
            self._write_index(failures)
            for path in set((self._output / _FOLDER).glob("*.safetensors")) - set(contents):
                path.unlink(missing_ok=True)
        return Outcome(still_open, failures)

    def _shard(self, number: int, images: dict[str, str]) -> Shard:
        identities = [[name, self._images.identity(image)] for image, name in images.items()]
        path = self._output / _FOLDER / f"{number:05}.safetensors"
        return Shard(path, images, combined_digest([json.dumps(identities).encode()]))

    def _write_index(self, failures: list[Failure]) -> None:
        failed = {failure["image"] for failure in failures}
        files = {
            name: shard.path.relative_to(self._output).as_posix()
            for shard in self.shards
            for name in shard.images.values()
            if name not in failed
        }
        write_text(self._output / INDEX_FILE, json.dumps({"images": files, "failures": failures}, indent=2) + "\n")
