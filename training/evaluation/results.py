"""The store of a run: cells' numbers as JSON, their pictures beside them, and samples of patch features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np

from adpretrain_hf.errors import BundleError
from adpretrain_hf.files import atomic_path, write_text
from training.evaluation.cells import Cell
from training.evaluation.records import METRICS, PatchSample, Result, Shown

__all__ = [
    "METRICS",
    "PatchSample",
    "Result",
    "Shown",
    "copy_result",
    "is_done",
    "load_failures",
    "load_patches",
    "load_results",
    "load_shown",
    "patches_done",
    "save_failure",
    "save_patches",
    "save_result",
]

_Record = TypeVar("_Record")


def save_result(folder: str | Path, result: Result, shown: Shown) -> None:
    """Writes a cell: the pictures first, so that it is done when its JSON is there.

    Args:
        folder: of the run.
        result, shown: of the cell.
    """
    numbers, pictures = _paths(folder, result.cell)
    with atomic_path(pictures) as temporary:
        np.savez_compressed(temporary, **{one.name: getattr(shown, one.name) for one in fields(shown)})
    write_text(numbers, json.dumps(asdict(result), indent=1, allow_nan=False))
    _failure_path(folder, result.cell).unlink(missing_ok=True)  # of an earlier run


def copy_result(folder: str | Path, source: Cell, cell: Cell) -> None:
    """Writes a cell whose numbers and pictures are those of another one that is done."""
    result = _read_result(_paths(folder, source)[0])
    save_result(folder, replace(result, cell=cell, seconds=0.0), load_shown(folder, source))


def save_failure(folder: str | Path, cell: Cell, error: str) -> None:
    """Notes why a cell has no result; the next run tries it again."""
    write_text(_failure_path(folder, cell), json.dumps({"cell": asdict(cell), "error": error}, indent=1))


def load_failures(folder: str | Path) -> dict[Cell, str]:
    """Why cells have no result, in the cells' order.

    Raises:
        BundleError: a file is damaged.
    """
    failures = {}
    for path in Path(folder, "failed").glob("[!.]*.json"):
        with _damage_named(path):
            values = json.loads(path.read_text(encoding="utf-8"))
            failures[Cell.from_dict(values["cell"])] = str(values["error"])
    return dict(sorted(failures.items()))


def is_done(folder: str | Path, cell: Cell) -> bool:
    """Whether a cell need not be run again.

    Raises:
        BundleError: its file is damaged, or another cell's.
    """
    numbers, pictures = _paths(folder, cell)
    if not (numbers.is_file() and pictures.is_file()):
        return False
    if (found := _read_result(numbers).cell) != cell:
        raise BundleError(f"{numbers} holds {found}, expected {cell}: delete it to run the cell again")
    return True


def load_results(folder: str | Path) -> list[Result]:
    """All finished cells of a run, in the cells' order.

    Raises:
        BundleError: a file is damaged.
    """
    paths = Path(folder, "cells").glob("*.json")
    results = [_read_result(path) for path in paths if not path.name.startswith(".")]  # unfinished ones are hidden
    return sorted(results, key=lambda result: result.cell)


def load_shown(folder: str | Path, cell: Cell) -> Shown:
    """The pictures of a finished cell.

    Raises:
        BundleError: the file is missing or damaged.
    """
    return _read_arrays(_paths(folder, cell)[1], Shown)


def save_patches(folder: str | Path, sample: PatchSample) -> None:
    """Writes a sample of patch features into the folder of a run."""
    path = _patches_path(folder, sample.data_set, sample.category, sample.features, sample.variant)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **{one.name: getattr(sample, one.name) for one in fields(sample)})


def patches_done(folder: str | Path, data_set: str, category: str, features: str, variant: str) -> bool:
    """Whether ``save_patches`` has written these patches."""
    return _patches_path(folder, data_set, category, features, variant).is_file()


def load_patches(folder: str | Path) -> list[PatchSample]:
    """All samples of patch features of a run, in the order of their files' names.

    Raises:
        BundleError: a file is damaged.
    """
    paths = sorted(Path(folder, "patches").glob("*.npz"))
    return [_read_arrays(path, PatchSample) for path in paths if not path.name.startswith(".")]


def _paths(folder: str | Path, cell: Cell) -> tuple[Path, Path]:
    # Not with_suffix(): a name ends in numbers with a dot.
    return Path(folder, "cells", f"{cell.name}.json"), Path(folder, "cells", f"{cell.name}.npz")


def _failure_path(folder: str | Path, cell: Cell) -> Path:
    return Path(folder, "failed", f"{cell.name}.json")


def _patches_path(folder: str | Path, *names: str) -> Path:
    return Path(folder, "patches", "__".join(name or "-" for name in names).replace("/", "_") + ".npz")


def _read_result(path: Path) -> Result:
    with _damage_named(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        return Result(**values | {"cell": Cell.from_dict(values["cell"])})


def _read_arrays(path: Path, kind: type[_Record]) -> _Record:
    """Reads the dataclass ``kind`` from an npz; texts are arrays without axes there."""
    with _damage_named(path), np.load(path, allow_pickle=False) as arrays:
        names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
        values: dict[str, Any] = {name: arrays[name] for name in names}
        return kind(**{name: value.item() if value.dtype.kind == "U" else value for name, value in values.items()})


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    # ValueError: JSON, text encoding, a header of numpy's, and what the dataclasses refuse.
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, BadZipFile, ZlibError) as error:
        raise BundleError(
            f"{path} is damaged or missing ({error}): delete it, and the file of the same name beside it, and start "
            "the run again"
        ) from error
