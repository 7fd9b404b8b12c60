"""The authors' released checkpoints (``checkpoints_pro_angle.pth`` ...): their names and ours, and bundles of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf.backbones import load_pickle
from adpretrain_hf.bundle.layout import LAYOUT
from adpretrain_hf.bundle.load import Parts, new, projectors_of
from adpretrain_hf.bundle.save import check_no_foreign_files, save, write_projectors
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import check_names, remove
from adpretrain_hf.hub import RepositoryFiles

# The released scores are numpy scalars, pickled under numpy 1; under numpy 2 the function has another home.
_SCALAR = np.float64(0).__reduce__()[0]
_SCALARS = ((_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"))
_ALLOWED = (*_SCALARS, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType)
# Names inside one projector: in the released checkpoints, here. Every layer has a weight and a bias.
_LAYERS = {
    "ref_proj.project.": "reference_projection.",
    "layers.0.cross_attn.in_proj_": "attention.in_proj_",
    "layers.0.cross_attn.out_proj.": "attention.out_proj.",
    "layers.0.mlp.fc1.": "mlp.fc1.",
    "layers.0.mlp.fc2.": "mlp.fc2.",
    "layers.0.mlp.se.fc1.": "mlp.gate.fc1.",
    "layers.0.mlp.se.fc2.": "mlp.gate.fc2.",
}
_NAMES = {theirs + kind: ours + kind for theirs, ours in _LAYERS.items() for kind in ("weight", "bias")}
_NAMES["x_ref"] = "reference_tokens"
# The authors' repository on the Hub, and its folder for each preset.
RELEASE = "xcyao00/ADPretrain"
FOLDERS = {"dinov2-base": "dino-base", "dinov2-large": "dino-large"}
FOLDERS |= {preset: preset for preset in ("clip-base", "clip-large", "imagebind")}


def read_released(path: str | Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Reads a released ``.pth``. Of a pickle's globals only numpy's scalars and dtypes are allowed.

    Returns:
        The projectors' tensors by the authors' names, and the MVTecAD scores of their epoch by metric.

    Raises:
        InputError: no such file, a pickle that asks for another global (named; nothing of it is run), or not a
            released checkpoint.
    """
    content = load_pickle(path, _ALLOWED)
    tensors = content.pop("projectors", None) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: not a released ADPretrain checkpoint: expected {{'projectors': tensors, ...}}")
    if "l1_proj.x_ref" not in tensors or tensors["l1_proj.x_ref"].ndim != 3:
        raise InputError(f"{path}: not a released ADPretrain checkpoint: missing l1_proj.x_ref of shape (1, N, C)")
    try:
        return tensors, {name: float(value) for name, value in content.items()}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a released ADPretrain checkpoint: expected numbers beside tensors, {error}"
        ) from error


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
    files = RepositoryFiles(repository, probe=names["angle"], contents="ADPretrain's release", **hub)
    return {variant: files.file(name) for variant, name in names.items()}


def released_key_map(num_levels: int) -> dict[str, str]:
    """Every key of a released checkpoint's ``projectors`` with its name in ``Projectors.state_dict()``."""
    levels = range(num_levels)
    return {f"l{n + 1}_proj.{theirs}": f"levels.{n}.{ours}" for n in levels for theirs, ours in _NAMES.items()}


def from_released(state_dict: Mapping[str, Tensor], num_levels: int = 4) -> dict[str, Tensor]:
    """Renames the tensors of a released checkpoint; values and precision stay as they are.

    The released modules hold two axes of length 1 that have no meaning (a batch of one, a kernel of one); they go.

    Raises:
        BundleError: keys are missing or left over; all are listed.
    """
    names = released_key_map(num_levels)
    check_names("not a released ADPretrain checkpoint", state_dict, names)
    unit_axes = {"x_ref": 0, "ref_proj.project.weight": -1}
    axes = {key: unit_axes.get(key.partition(".")[2]) for key in names}
    return {names[key]: t if (axis := axes[key]) is None else t.squeeze(axis) for key, t in state_dict.items()}


def convert(
    source: str, checkpoints: Mapping[str, str | Path], output: str | Path, **overrides: Any
) -> ADPretrainConfig:
    """Makes a bundle of a backbone and released projectors; the projectors keep their precision.

    Args:
        source: the backbone, as for ``ADPretrainFeatureExtractor.from_backbone``.
        checkpoints: the file of each variant; the first is the bundle's default.
        output: folder of the bundle.
        overrides: fields of ``ADPretrainConfig``, e.g. ``layers`` where the backbone is none of the presets.

    Returns:
        Its configuration.

    Raises:
        InputError: no checkpoint, or one that cannot be read or does not fit the backbone.
    """
    if not checkpoints:
        raise InputError("no checkpoint was given: expected the file of the angle or the norm variant, or both")
    released = {variant: read_released(path) for variant, path in checkpoints.items()}
    default = next(iter(released))
    fixed: dict[str, Any] = {
        "normalize_tokens": False,
        "resize_mode": "crop",
        "default_variant": default,
        "num_reference_tokens": released[default][0]["l1_proj.x_ref"].shape[1],
        "reported_scores": {variant: scores for variant, (_, scores) in released.items()},
    }
    config, backbone, *_ = new(source, dtype=torch.float32, **(fixed | overrides))
    projectors = {
        variant: projectors_of(from_released(tensors, len(config.layers)), config, str(checkpoints[variant]))
        for variant, (tensors, _) in released.items()
    }
    parts = Parts(config, backbone, projectors.pop(default), default)
    check_no_foreign_files(Path(output), config, default)
    remove(Path(output) / LAYOUT.config)
    for variant, others in projectors.items():
        write_projectors(others, Path(output) / LAYOUT.weights_of(variant, config))
    save(parts, Path(output))  # last, for the configuration that it writes is what makes a bundle of the folder
    return config
