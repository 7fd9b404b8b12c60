"""Files of one result each: features as ``.safetensors`` or ``.npz``, scores as ``.npz``."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.results import Result


def save_score(result: Result, path: Path) -> None:
    """Writes a map, its score, and where it belongs in the image."""
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in result.items()})  # type: ignore[arg-type]


class SavedScores(Mapping[str, Result]):
    """What ``save_score`` wrote, by the names of the images, in order; each file is read when it is asked for.

    Args:
        paths: the files, by the names of the images.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> Result:
        path = self._paths[name]
        try:
            with np.load(path, allow_pickle=False) as result:
                return {key: torch.from_numpy(result[key]) for key in ("map", "score", "size", "box")}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}): remove it, and run the command again"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _save_npz(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.float().numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


FEATURE_FORMATS: dict[str, Callable[[Result, Path], None]] = {"safetensors": save_file, "npz": _save_npz}
"""Writers of features, by the name of the format."""
