"""The parts of an extractor: read from a bundle on disk or on the Hub, strictly, or made new from a backbone."""

import fnmatch
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from adpretrain_hf.backbones import Backbone, load_backbone, load_same_backbone, load_saved_backbone
from adpretrain_hf.bundle.layout import LAYOUT, files_in, prepared_as, read_config, variants_among
from adpretrain_hf.config import PRESETS, ADPretrainConfig
from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.files import check_finite, check_fit, read_safetensors
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, read_references

PathLike = str | os.PathLike[str]


class Parts(NamedTuple):
    """What an extractor is made of, in the order of its constructor's arguments."""

    config: ADPretrainConfig
    backbone: Backbone
    projectors: Projectors
    variant: str
    references: Mapping[str, ReferenceBank] | None = None
    whole: ADPretrainConfig | None = None


def new(source: str, *, dtype: torch.dtype, hub: dict[str, Any] | None = None, **overrides: Any) -> Parts:
    """Makes the parts of a new extractor, whose projectors are the identity; see ``from_backbone``."""
    config = ADPretrainConfig.from_backbone(source, hub=hub, **overrides)
    name, revision = config.backbone if source in PRESETS else source, config.backbone_revision
    backbone = load_backbone(name, config.layers, revision=revision, dtype=dtype, **(hub or {}))
    config = config.replace(backbone_digest=backbone.digest(), backbone_revision=revision or backbone.commit)
    # A network of a kind that does not fit fails here, rather than at the first image.
    backbone(torch.zeros(1, 3, config.image_size, config.image_size, dtype=dtype))
    return Parts(config, backbone, Projectors(config).to(dtype).requires_grad_(False), config.default_variant)


def load(
    name: PathLike,
    variant: str | None,
    dtype: torch.dtype | str | None,
    changes: Mapping[str, Any],
    references: bool = False,
    layers: Sequence[str] | None = None,
    **hub: Any,
) -> Parts:
    """Reads an extractor's parts from a folder, or the Hub, where only they are downloaded; see ``from_pretrained``."""
    config, names, fetch, is_all = _open(name, **hub)
    places = config.places(layers)
    there = variants_among(names, config)
    # The default, or else the one that is there; in a cache the default may only not have been asked for yet.
    variant = variant or (there if there and is_all else [config.default_variant])[0]
    weights = LAYOUT.weights_of(variant, config)
    where, advice = (name, "") if is_all else (f"what is cached of {name}", ", or connect to the network once")
    if weights not in names:
        missing = f"{where} has no variant {variant!r} ({weights} is missing)"
        raise BundleError(f"{missing}: expected one of {there}{advice}")
    banks = f"{LAYOUT.references}/*.safetensors"
    if references and not fnmatch.filter(names, banks):
        missing = f"{where} has no references ({banks})"
        raise BundleError(f"{missing}: save it with references=True, or load it without{advice}")
    wanted = [LAYOUT.config, LAYOUT.preprocessor, weights, f"{LAYOUT.backbone}/*"]
    folder = fetch([*wanted, banks] if references else wanted)
    config = config.replace(**{name: value for name, value in changes.items() if value is not None})
    precision = _as_dtype(dtype or torch.float32)
    projectors = read_projectors(folder / weights, config, precision)
    found = read_references(folder / LAYOUT.references) if references else None
    parts = Parts(config, _load_bundled_backbone(folder, config, precision, **hub), projectors, variant, found)
    return _with_levels(parts, places) if len(places) < len(config.layers) else parts


def describe_bundle(name: PathLike, **hub: Any) -> tuple[ADPretrainConfig, list[str]]:
    """Reads a bundle's configuration and the names of its files; from the Hub, nothing else is downloaded.

    Raises:
        MissingPathError: no such folder or repository.
        BundleError: not a bundle, or not to be had.
    """
    config, names, *_ = _open(name, **hub)
    return config, sorted(names)


def read_preparation(
    name: PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> ADPretrainConfig:
    """Reads a bundle's configuration with the preparation that its ``preprocessor_config.json`` tells.

    The two differ where a processor was saved that prepares images to another size.

    Raises:
        MissingPathError: no such folder or repository.
        BundleError: not a bundle, not to be had, or a preparation that is not known.
    """
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub |= {"local_files_only": local_files_only, "force_download": force_download}
    config, names, fetch, _ = _open(name, **hub)
    return prepared_as(config, fetch([LAYOUT.config, LAYOUT.preprocessor])) if LAYOUT.preprocessor in names else config


def read_projectors(path: Path, config: ADPretrainConfig, dtype: torch.dtype) -> Projectors:
    """Reads the projectors of one file, strictly.

    Raises:
        MissingPathError: there is none.
        BundleError: it does not fit the configuration, or is damaged.
    """
    return projectors_of(read_safetensors(path)[0], config, str(path), dtype)


def projectors_of(
    tensors: Mapping[str, Tensor], config: ADPretrainConfig, where: str, dtype: torch.dtype | None = None
) -> Projectors:
    """Makes frozen projectors of tensors (``where`` is what errors call them); without a dtype they keep their own.

    Raises:
        BundleError: tensors are missing, unexpected, of another shape, not floats or not finite; all are listed.
    """
    with torch.device("meta"):
        projectors = Projectors(config)
    check_fit(f"{where} does not fit its configuration", tensors, projectors.state_dict())
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    check_finite(where, tensors)  # in the precision that they are used in
    projectors.load_state_dict(tensors, assign=True)
    return projectors.requires_grad_(False)


def _open(name: PathLike, **hub: Any) -> tuple[ADPretrainConfig, Collection[str], Callable[[list[str]], Path], bool]:
    """A bundle's configuration, the names of its files, what gets those that match patterns into a folder, and whether
    those are all its files.
    """
    folder = Path(name)
    if folder.is_dir():
        return read_config(folder), files_in(folder), lambda patterns: folder, True
    from adpretrain_hf.hub import RepositoryFiles

    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise MissingPathError(f"no bundle at {name}: it is neither a folder nor the id of a repository") from error
    repository = RepositoryFiles(str(name), **hub)
    cached = repository.file(LAYOUT.config).parent
    names = repository.names
    return read_config(cached), names or files_in(cached), repository.folder, names is not None


def _load_bundled_backbone(folder: Path, config: ADPretrainConfig, dtype: torch.dtype, **hub: Any) -> Backbone:
    """Loads a bundle's backbone, or fetches the one that its configuration names if it was saved without."""
    if (folder / LAYOUT.backbone).is_dir():
        digest = config.backbone_saved_digest or config.backbone_digest
        return load_saved_backbone(folder / LAYOUT.backbone, config.layers, dtype=dtype, digest=digest)
    try:
        hub |= {"revision": config.backbone_revision}  # its own, not the bundle's
        return load_same_backbone(config.backbone, config.layers, digest=config.backbone_digest, dtype=dtype, **hub)
    except BundleError:  # says what is wrong with the weights that were found
        raise
    except InputError as error:
        raise BundleError(
            f"{folder} was saved without its backbone, and {config.backbone!r} (revision {config.backbone_revision}) "
            f"cannot be loaded: connect to the network once, or save the bundle with include_backbone=True. {error}"
        ) from error


def _with_levels(parts: Parts, places: Sequence[int]) -> Parts:
    """The parts of an extractor of some of the levels, from 0; what only the others need is dropped."""
    config = parts.config
    layers, scales = [config.layers[place] for place in places], [config.residual_scale[place] for place in places]
    parts.backbone.keep(layers)
    parts.projectors.keep(places)
    return parts._replace(config=config.replace(layers=layers, residual_scale=scales), whole=config)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype!r}, expected float16, bfloat16, float32 or float64")
    return found
