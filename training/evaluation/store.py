"""What a run keeps on disk: a cell's numbers as JSON, its pictures beside them, and samples of patch features.

A file that is read and is missing or damaged is a BundleError, which names it and says what to do.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np

from adpretrain_hf.errors import BundleError
from adpretrain_hf.files import atomic_path, fitting_name, write_text
from training.evaluation.plan import Cell

METRICS = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro")


@dataclass(frozen=True)
class Result:
    """The numbers of a finished cell.

    Attributes:
        cell: what was run.
        metrics: by name, in [0, 1]; those that cannot be measured (of pixels, where there are no masks) are None or
            left out.
        scores: of the test images, larger for more anomalous.
        is_anomalous: of each test image.
        names: of the test images, as people know them.
        seconds: that the cell took.
        defects: the kinds of the test images' anomalies, as the data set calls them; empty where they are not known.
        made_by: what people want to know beside the numbers: bundle, protocol, command, date and versions.
    """

    cell: Cell
    metrics: Mapping[str, float | None]
    scores: list[float]
    is_anomalous: list[bool]
    names: list[str]
    seconds: float
    defects: list[str] = field(default_factory=list)
    made_by: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """The images of a cell that are chosen to be looked at, those first whose anomalies are found best.

    Attributes:
        indices: (k,), int, their places among the test images.
        images: (k, S, S, 3), uint8.
        masks: (k, S, S), bool.
        maps: (k, S, S), float16, larger for more anomalous.
    """

    indices: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    maps: np.ndarray


@dataclass(frozen=True)
class PatchSample:
    """Some patch features of the test images of a category.

    Attributes:
        data_set, category, features, variant: as in ``Cell``.
        values: (n, C), float32.
        is_anomalous: (n,), bool.
    """

    data_set: str
    category: str
    features: str
    variant: str
    values: np.ndarray
    is_anomalous: np.ndarray


_Record = TypeVar("_Record", Shown, PatchSample)


def save_result(folder: str | Path, result: Result, shown: Shown) -> None:
    """Writes a cell into the folder of a run: the pictures first, so that it is done when its JSON is there."""
    _write_arrays(_file(folder, "cells", result.cell, ".npz"), shown)
    numbers = json.dumps(asdict(result), indent=1, allow_nan=False)
    write_text(_file(folder, "cells", result.cell, ".json"), numbers)
    _file(folder, "failed", result.cell, ".json").unlink(missing_ok=True)  # of an earlier run


def copy_result(folder: str | Path, source: Cell, cell: Cell) -> None:
    """Writes a cell whose numbers and pictures are those of another one that is done."""
    result = _read_result(_file(folder, "cells", source, ".json"))
    save_result(folder, replace(result, cell=cell, seconds=0.0), load_shown(folder, source))


def is_done(folder: str | Path, cell: Cell) -> bool:
    """Whether a cell need not be run again."""
    return all(_file(folder, "cells", cell, suffix).is_file() for suffix in (".json", ".npz"))


def load_results(folder: str | Path) -> list[Result]:
    """All finished cells of a run, in the cells' order."""
    return sorted(map(_read_result, _finished(folder, "cells", ".json")), key=lambda result: result.cell)


def load_shown(folder: str | Path, cell: Cell) -> Shown:
    """The pictures of a finished cell."""
    return _read_arrays(_file(folder, "cells", cell, ".npz"), Shown)


def save_failure(folder: str | Path, cell: Cell, error: str) -> None:
    """Notes why a cell has no result; the next run tries it again."""
    write_text(_file(folder, "failed", cell, ".json"), json.dumps({"cell": asdict(cell), "error": error}, indent=1))


def load_failures(folder: str | Path) -> dict[Cell, str]:
    """Why cells have no result, in the cells' order."""
    failures = {}
    for path in _finished(folder, "failed", ".json"):
        with _damage_named(path):
            values = json.loads(path.read_text(encoding="utf-8"))
            failures[Cell.from_dict(values["cell"])] = str(values["error"])
    return dict(sorted(failures.items()))


def save_patches(folder: str | Path, sample: PatchSample) -> None:
    """Writes a sample of patch features into the folder of a run."""
    _write_arrays(patches_file(folder, sample), sample)


def patches_file(folder: str | Path, of: Cell | PatchSample) -> Path:
    """Where ``save_patches`` writes the patches of a category, features and variant."""
    names = (of.data_set, of.category, of.features, of.variant)
    return Path(folder, "patches", fitting_name("__".join(name or "-" for name in names).replace("/", "_"), ".npz"))


def load_patches(folder: str | Path) -> list[PatchSample]:
    """All samples of patch features of a run, in the order of their files' names."""
    return [_read_arrays(path, PatchSample) for path in _finished(folder, "patches", ".npz")]


def _file(folder: str | Path, kind: str, cell: Cell, suffix: str) -> Path:
    return Path(folder, kind, fitting_name(cell.name, suffix))


def _finished(folder: str | Path, kind: str, suffix: str) -> list[Path]:
    return sorted(Path(folder, kind).glob(f"[!.]*{suffix}"))  # what is still being written is hidden


def _read_result(path: Path) -> Result:
    with _damage_named(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        return Result(**values | {"cell": Cell.from_dict(values["cell"])})


def _write_arrays(path: Path, record: Shown | PatchSample) -> None:
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **vars(record))


def _read_arrays(path: Path, kind: type[_Record]) -> _Record:
    """Reads a record from an npz; texts are arrays without axes there."""
    with _damage_named(path), np.load(path, allow_pickle=False) as arrays:
        values = {one.name: arrays[one.name] for one in fields(kind)}
        return kind(**{name: value if value.ndim else value.item() for name, value in values.items()})


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    # ValueError: JSON, text encoding, a header of numpy's, and what a cell refuses.
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, BadZipFile, ZlibError) as error:
        raise BundleError(
            f"{path} is damaged or missing ({error}): delete it, and the file of the same name beside it, and start "
            "the run again"
        ) from error
