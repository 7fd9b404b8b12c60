"""Loading a backbone's weights: from transformers (a Hub id or a folder), open_clip, ImageBind, or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from adpretrain_hf.backbones import Backbone, check_depth, cut_config, family_of
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.quiet import quiet_transformers
from adpretrain_hf.sources import locate, split_open_clip, split_source, vision_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_backbone(
    source: str | Path,
    layers: Sequence[int],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    **hub: Any,
) -> Backbone:
    """Loads a frozen backbone from any supported source, cut after its last level.

    Args:
        source: a transformers id or folder, ``open_clip:<arch>/<weights>`` or ``imagebind:<checkpoint>``.
        layers: the levels, blocks counted from 1.
        revision: branch, tag or commit on the Hub.
        dtype: precision of the weights in memory.
        hub: ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` for the Hub.

    Raises:
        InputError: the source is unknown, unreachable or not supported, or a level lies beyond its depth.
        BundleError: weights are missing, of another shape, or not finite.
    """
    kind, name = split_source(str(source))
    commit = None
    if kind == "open_clip":
        from adpretrain_hf.open_clip_towers import from_open_clip

        model: PreTrainedModel = from_open_clip(*split_open_clip(name))
    elif kind == "imagebind":
        from adpretrain_hf.imagebind import from_imagebind

        model = from_imagebind(name)
    else:
        folder = locate(name, ["*.json", "*.safetensors"], revision=revision, **hub)
        model = _load_transformers(folder, layers[-1], dtype=dtype)
        commit = None if folder == Path(name) else folder.name
    return _finish(Backbone(model, layers, commit), dtype, None, source)


def load_saved_backbone(
    folder: Path, layers: Sequence[int], *, dtype: torch.dtype = torch.float32, digest: str | None = None
) -> Backbone:
    """Loads the ``backbone/`` of a bundle; unlike an upstream checkpoint it may hold nothing that is not used.

    Args:
        folder: as ``Backbone.save`` wrote it.
        layers: the levels, blocks counted from 1.
        dtype: precision of the weights in memory.
        digest: what ``Backbone.digest`` must be; None if it is not known.

    Raises:
        BundleError: tensors are missing, unexpected, of another shape, or not finite; the folder is unreadable; the
            weights are others than those that the bundle was made with.
    """
    try:
        # In the precision of the file, for the digest is of these values.
        model = _load_transformers(folder, layers[-1], dtype="auto", strict=True)
    except InputError as error:
        raise BundleError(str(error)) from error
    return _finish(Backbone(model, layers), dtype, digest, folder)


def _finish(backbone: Backbone, dtype: torch.dtype, digest: str | None, where: str | Path) -> Backbone:
    found = backbone.digest()  # before the precision changes
    backbone = backbone.to(dtype)
    check_finite(backbone.state_dict(), str(where))
    if digest not in (None, found):
        raise BundleError(
            f"the backbone at {str(where)!r} has other weights than the bundle was made with: their digest is {found}, "
            f"the configuration's {digest}. Get the bundle again, or make a new one"
        )
    return backbone


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises BundleError if any tensor holds NaN or infinity, listing them."""
    # A sum carries every NaN and infinity along and reads the memory once.
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite()]
    if bad:
        raise BundleError(f"{where}: NaN or infinite values in {bad}; the file is damaged, get it again")


def _load_transformers(source: Path, depth: int, *, dtype: torch.dtype | str, strict: bool = False) -> PreTrainedModel:
    from transformers import AutoModel

    config = vision_config(source)
    check_depth(depth, config.num_hidden_layers, source)
    cut_config(config, depth)
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the backbone at {str(source)!r} cannot be loaded: {error}") from error
    _check_report(report, config, source, strict)
    return model


def _check_report(report: dict[str, Any], config: PretrainedConfig, source: Path, strict: bool) -> None:
    unused = family_of(config.model_type).unused
    missing = sorted(key for key in report["missing_keys"] if key.split(".")[0] not in unused)
    unexpected = sorted(report["unexpected_keys"]) if strict else []
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or unexpected or mismatched:
        raise BundleError(
            f"the backbone at {str(source)!r} does not fit its configuration: missing {missing}, "
            f"unexpected {unexpected}, of another shape {mismatched}"
        )
