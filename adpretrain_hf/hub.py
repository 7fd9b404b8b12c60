"""Finding a bundle: a folder, or the files of one variant from a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from adpretrain_hf import bundle
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import BundleError, MissingPathError
from adpretrain_hf.hub_download import RepositoryFiles


def describe_bundle(name: str | os.PathLike[str], **hub: Any) -> tuple[ADPretrainConfig, list[str]]:
    """Reads a bundle's configuration and the names of its files; from the Hub, nothing else is downloaded.

    Raises:
        MissingPathError: no such folder or repository.
        BundleError: not a bundle, or not to be had.
    """
    folder = Path(name)
    if folder.is_dir():
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return bundle.read_config(folder), names
    files = _repository(name, **hub)
    config = bundle.read_config(files.file(bundle.CONFIG_FILE).parent)
    return config, files.names or []


def bundle_folder(name: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> Path:
    """Returns the folder of a bundle; from the Hub, only what the variant needs is downloaded.

    Args:
        name: a folder, or the id of a repository.
        variant: the projectors that are wanted; the bundle's default ones by default.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``; see ``RepositoryFiles``.

    Raises:
        MissingPathError: no such folder or repository.
        BundleError: not a bundle, not to be had, or damaged on the way twice.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    files = _repository(name, **hub)
    config = bundle.read_config(files.file(bundle.CONFIG_FILE).parent)
    variant = variant or config.default_variant
    wanted = bundle.weights_file(config, variant)
    if files.names is not None and wanted not in files.names:
        there = bundle.variants_among(files.names, config)
        raise BundleError(f"{name} has no variant {variant!r} ({wanted} is missing): expected one of {there}")
    return files.folder([bundle.CONFIG_FILE, bundle.PREPROCESSOR_FILE, wanted, f"{bundle.BACKBONE_FOLDER}/*"])


def _repository(name: str | os.PathLike[str], **hub: Any) -> RepositoryFiles:
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise MissingPathError(f"no bundle at {name}: it is neither a folder nor the id of a repository") from error
    return RepositoryFiles(str(name), **hub)
