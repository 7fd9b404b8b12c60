"""The authors' released checkpoints (``checkpoints_pro_angle.pth`` ...) -> a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf import bundle
from adpretrain_hf.checkpoints import load_pickle
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.hub_download import RepositoryFiles
from adpretrain_hf.projector import Projectors
from adpretrain_hf.released import from_released

# The released scores are numpy scalars, pickled under numpy 1; under numpy 2 the function has another home.
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED = (
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
)
# The authors' repository on the Hub, and its folder for each preset.
RELEASE = "xcyao00/ADPretrain"
FOLDERS = {
    "dinov2-base": "dino-base",
    "dinov2-large": "dino-large",
    "clip-base": "clip-base",
    "clip-large": "clip-large",
    "imagebind": "imagebind",
}


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """One file of the release: projectors by the authors' names, and the MVTecAD scores of their epoch."""

    projectors: dict[str, Tensor]
    scores: dict[str, float]


def read_released(path: str | Path) -> ReleasedCheckpoint:
    """Reads a released ``.pth``. Of a pickle's globals only numpy's scalars and dtypes are allowed.

    Raises:
        InputError: no such file, a pickle that asks for another global (named; nothing of it is run), or not a
            released checkpoint.
    """
    content = load_pickle(path, _ALLOWED)
    projectors = content.get("projectors") if isinstance(content, dict) else None
    if not isinstance(projectors, dict) or not all(isinstance(tensor, Tensor) for tensor in projectors.values()):
        raise InputError(f"{path}: not a released ADPretrain checkpoint: expected {{'projectors': tensors, ...}}")
    scores = {name: float(value) for name, value in content.items() if name != "projectors"}
    return ReleasedCheckpoint(projectors, scores)


def fetch_released(preset: str, repository: str = RELEASE, **hub: Any) -> dict[str, Path]:
    """Downloads the two documented checkpoints of a preset, ``{"angle": path, "norm": path}``.

    Args:
        preset: a key of ``FOLDERS``.
        repository: the authors', or a copy of it.
        hub: see ``RepositoryFiles``.

    Raises:
        InputError: the release has none for this preset, or it is not to be had.
    """
    if preset not in FOLDERS:
        raise InputError(f"there are no released checkpoints for {preset!r}: expected one of {', '.join(FOLDERS)}")
    names = {variant: f"{FOLDERS[preset]}/checkpoints_pro_{variant}.pth" for variant in ("angle", "norm")}
    files = RepositoryFiles(repository, probe=names["angle"], **hub)
    return {variant: files.file(name) for variant, name in names.items()}


def convert(
    source: str, checkpoints: Mapping[str, str | Path], output: str | Path, **overrides: Any
) -> ADPretrainFeatureExtractor:
    """Makes a bundle of a backbone and released projectors; the projectors keep their precision.

    Args:
        source: the backbone, as for ``ADPretrainFeatureExtractor.from_backbone``.
        checkpoints: the file of each variant; the first is the bundle's default.
        output: folder of the bundle.
        overrides: fields of ``ADPretrainConfig``, e.g. ``layers`` where the backbone is none of the presets.

    Returns:
        The extractor with the default variant.

    Raises:
        InputError: no checkpoint, or one that cannot be read or does not fit the backbone.
    """
    if not checkpoints:
        raise InputError("no checkpoint was given: expected the file of the angle or the norm variant, or both")
    released = {variant: read_released(path) for variant, path in checkpoints.items()}
    default = next(iter(released))
    fixed: dict[str, Any] = {
        "normalize_tokens": False,
        "default_variant": default,
        "num_reference_tokens": _num_reference_tokens(released[default], checkpoints[default]),
        "reported_scores": {variant: one.scores for variant, one in released.items()},
    }
    extractor = ADPretrainFeatureExtractor.from_backbone(source, **(fixed | overrides))
    config, where = extractor.config, Path(output)
    for variant, one in released.items():
        tensors = from_released(one.projectors, len(config.layers))
        with torch.device("meta"):
            projectors = Projectors(config)
        bundle.load_strict(projectors, tensors, str(checkpoints[variant]), dtype=None)
        projectors.requires_grad_(False)
        if variant == default:
            extractor = ADPretrainFeatureExtractor(config, extractor.backbone, projectors)
            extractor.save_pretrained(where)
        else:
            bundle.write_weights(where / bundle.weights_file(config, variant), projectors)
    return extractor


def _num_reference_tokens(checkpoint: ReleasedCheckpoint, path: str | Path) -> int:
    tokens = checkpoint.projectors.get("l1_proj.x_ref")
    if tokens is None or tokens.ndim != 3:
        raise InputError(f"{path}: not a released ADPretrain checkpoint: missing l1_proj.x_ref of shape (1, N, C)")
    return tokens.shape[1]
