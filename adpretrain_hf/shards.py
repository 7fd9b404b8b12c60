"""Results of many images in few files: one safetensors file for a block of images, and one index of all files.

<folder>/index.json                  {"images": {"<name>": "shards/00003.safetensors", ...}, "failures": [...]}
<folder>/shards/00003.safetensors    "<name>/<key>": a tensor of the image's result
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.errors import InputError, MissingPathError
from adpretrain_hf.files import atomic_path
from adpretrain_hf.results import Failure, Result

INDEX_FILE = "index.json"
_FORMAT = "adpretrain_shard_1"


def save_shard(path: Path, digest: str, results: Mapping[str, Result], failures: Sequence[Failure]) -> None:
    """Writes the results of some images.

    Args:
        path: the file.
        digest: of what the results were made of.
        results: by the names of the images.
        failures: the images that have no result.
    """
    tensors = {_tensor_name(name, key): tensor for name, result in results.items() for key, tensor in result.items()}
    about = {"digest": digest, "failures": list(failures)}
    with atomic_path(path) as temporary:
        # One entry only: safetensors writes several in any order, and the same results should give the same bytes.
        save_file(tensors, temporary, metadata={_FORMAT: json.dumps(about)})


def shard_failures(path: Path, digest: str) -> list[Failure] | None:
    """The failures that a shard tells of, or None if it is not there, not whole, or was made of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_FORMAT])
        return about["failures"] if about["digest"] == digest else None
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


class ShardedResults(Mapping[str, Result]):
    """The results that ``adpretrain extract`` or ``score`` wrote as shards, by the names of the images, in their order.

    A result is read when it is asked for; of the files, the one that was asked for last is kept open.

    Args:
        folder: the output of the run.

    Attributes:
        failures: the images that could not be used, ``{"image": name, "error": message}``.

    Raises:
        MissingPathError: there is no index, as before all of a run's shards are written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        path = self._folder / INDEX_FILE
        if not path.is_file():
            raise MissingPathError(f"no {path}: it is written when all shards are; start the run again to finish it")
        index = json.loads(path.read_text(encoding="utf-8"))
        self.failures: list[Failure] = index["failures"]
        self._shards: dict[str, str] = index["images"]
        self._open: tuple[str, Any, dict[str, list[str]]] | None = None

    def __getitem__(self, name: str) -> Result:
        file, keys = self._shard_of(name)
        return {key: file.get_tensor(_tensor_name(name, key)) for key in keys[_escaped(name)]}

    def tensor(self, name: str, key: str) -> Tensor:
        """One tensor of an image's result, without reading the others.

        Raises:
            KeyError: no such image, or nothing of that key.
        """
        file, keys = self._shard_of(name)
        if key not in keys[_escaped(name)]:
            raise KeyError(f"the result of {name} has no {key!r}, only {keys[_escaped(name)]}")
        return file.get_tensor(_tensor_name(name, key))

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def _shard_of(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        """The open shard that holds an image, and the keys of every image in it."""
        if name not in self._shards:
            reason = next((failure["error"] for failure in self.failures if failure["image"] == name), None)
            raise KeyError(f"no result of {name!r} in {self._folder}" + (f": {reason}" if reason else ""))
        shard = self._shards[name]
        if self._open is None or self._open[0] != shard:
            self._open = (shard, *_open_shard(self._folder / shard))
        return self._open[1:]


def _open_shard(path: Path) -> tuple[Any, dict[str, list[str]]]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is missing or damaged ({error}): start the run again to make it anew") from error
    keys: dict[str, list[str]] = defaultdict(list)
    for tensor_name in file.keys():  # noqa: SIM118 (not a dict)
        name, _, key = tensor_name.rpartition("/")
        keys[name].append(key)
    return file, dict(keys)


def _tensor_name(name: str, key: str) -> str:
    return f"{_escaped(name)}/{key}"


def _escaped(name: str) -> str:
    """A name as UTF-8 allows it: that of a file may be any bytes."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")
