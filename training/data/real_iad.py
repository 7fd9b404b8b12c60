"""RealIAD and Real-IAD Variety as a table: from the unpacked folder, from the class zips as they are, or from the Hub.

A folder, or the gated repository ``Real-IAD/Real-IAD``, holds ``realiad_512/<class>.zip`` (or ``realiad_512/<class>/``,
or some so and some so; other resolutions alike) and ``realiad_jsons.zip`` (or ``realiad_jsons/``). Real-IAD Variety is
called ``realiadvariety_512`` and ``realiadvariety_jsons.zip``, and has PNG images. The jsons' split into training and
test images is passed over, as in the released pretraining. No image is opened before it is needed.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from adpretrain_hf.errors import BundleError, MissingPathError
from adpretrain_hf.hub import RepositoryFiles
from training.data.real_iad_files import (
    RELEASES,
    Layout,
    Release,
    choose,
    layout_of_folder,
    layout_of_repository,
    rows_of_class,
)
from training.data.table import make_table

_LOG = logging.getLogger(__name__)


def load_real_iad(
    source: str | Path,
    *,
    resolution: str = "512",
    categories: Sequence[str] | None = None,
    strict: bool = True,
    token: str | bool | None = None,
) -> Dataset:
    """Lists the images of RealIAD or Real-IAD Variety, training and test images together, by class and then by name.

    Columns: ``image`` and ``mask`` (``Image(decode=False)``: see ``read_encoded`` and ``read_mask``; the mask is None
    where there is none), ``category``, ``view`` (``"C1"`` to ``"C5"``), ``anomaly_class`` (of the json: ``"OK"`` or
    such as ``"AK"``), ``is_anomalous``, ``is_good`` (below ``OK``: of an undamaged part) and ``sample`` (``"S0001"``;
    counted anew in ``OK`` and each ``NG/<code>``). An image is anomalous only if it has a mask: not every view of a
    damaged sample shows the damage.

    Args:
        source: a folder, or the id of a dataset repository on the Hub.
        resolution: ``"256"``, ``"512"``, ``"1024"`` or ``"raw"``.
        categories: the classes to load; from the Hub, no other zip is downloaded. All by default.
        strict: see ``usable_items``.
        token: for the Hub; the one that is logged in by default.

    Raises:
        MissingPathError: no such folder or repository.
        InputError: what is there is incomplete, damaged or contradicts itself; or the Hub does not give it.
    """
    root = Path(os.path.abspath(source))
    if root.is_dir():
        release, layout = layout_of_folder(root)
        wanted = choose(release, layout, source, resolution, categories)
    else:
        root, release, wanted = _download(str(source), resolution, categories, token)
    classes = (rows_of_class(root, release, resolution, category, strict=strict) for category in wanted)
    return make_table(row for rows in classes for _, row in rows)


def list_categories(source: str | Path, *, resolution: str = "512", token: str | bool | None = None) -> list[str]:
    """The classes that a folder or a repository has at a resolution, in order; of the Hub's, no zip is downloaded.

    Raises:
        MissingPathError, InputError: see ``load_real_iad``.
    """
    root = Path(os.path.abspath(source))
    release, layout = layout_of_folder(root) if root.is_dir() else _repository(str(source), token)[1:]
    return choose(release, layout, source, resolution, None)


def _download(
    repo_id: str, resolution: str, categories: Sequence[str] | None, token: str | bool | None
) -> tuple[Path, Release, list[str]]:
    """Downloads the zips that are asked for and not yet cached; returns their folder, the release, and the classes."""
    files, release, layout = _repository(repo_id, token)
    wanted = choose(release, layout, repo_id, resolution, categories)
    for category in wanted:
        # Each member of a zip has a checksum, which is looked at when it is read.
        files.file(f"{release.folder(resolution)}/{category}.zip")
    return files.file(release.archive).parent, release, wanted


def _repository(repo_id: str, token: str | bool | None) -> tuple[RepositoryFiles, Release, Layout]:
    """A repository's files, its jsons downloaded, which release it is and which classes it has."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MissingPathError(f"no RealIAD at {repo_id}: neither a folder nor the id of a repository") from error
    files, release = _open(repo_id, token)
    if files.names is not None:
        return files, *layout_of_repository(files.names)
    _LOG.warning("the Hub cannot be asked what %s holds: taking the classes that are cached as all", repo_id)
    return files, *layout_of_folder(files.file(release.archive).parent)


def _open(repo_id: str, token: str | bool | None) -> tuple[RepositoryFiles, Release]:
    """Opens a repository by the jsons of whichever release it has."""
    errors = []
    for release in RELEASES:
        try:
            options: dict[str, Any] = {"probe": release.archive, "repo_type": "dataset", "contents": "RealIAD"}
            files = RepositoryFiles(repo_id, token=token, **options)
            files.file(release.archive)
            return files, release
        except BundleError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            errors.append(error)
    raise errors[0]
