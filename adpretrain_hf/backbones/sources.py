"""What a backbone's source string means: its sizes and statistics without its weights, or the weights.

``facebook/dinov2-base`` or a folder (transformers), ``open_clip:<arch>/<weights>``, ``imagebind:<checkpoint>``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from adpretrain_hf.backbones.vit import CLIP, IMAGENET, Backbone, Statistics, cut_config, family_of, quiet_transformers
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.files import check_finite, check_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # that a bundle's weights may have been made in


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes and statistics of a vision transformer: C, blocks, pixels of a patch and of the image, mean and std."""

    hidden_size: int
    depth: int
    patch_size: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def split_source(source: str) -> tuple[str, str]:
    """Splits ``"open_clip:ViT-B-16/openai"`` into ``("open_clip", "ViT-B-16/openai")``.

    Whatever has neither prefix is for transformers: ``("transformers", source)``.
    """
    kind, colon, rest = source.partition(":")
    return (kind, rest) if colon and kind in ("open_clip", "imagebind") else ("transformers", source)


def without_path(source: str) -> str:
    """A source as others may see it: of a path on this machine only the last part; what can be an id stays."""
    kind, name = split_source(source)
    if kind == "transformers" and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return source
    arch = f"{name.partition('/')[0]}/" if kind == "open_clip" else ""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return last if kind == "transformers" else f"{kind}:{arch}{last}"


def describe(source: str, **hub: Any) -> BackboneSpec:
    """Reads a backbone's sizes and statistics.

    Args:
        source, hub: as for ``load_backbone``.

    Raises:
        InputError: unknown, unreachable, or not a vision transformer that is supported.
    """
    kind, name = split_source(source)
    config: Any
    if kind == "open_clip":
        from adpretrain_hf.backbones.open_clip import open_clip_vision_config

        config, statistics = open_clip_vision_config(name)
    elif kind == "imagebind":
        from adpretrain_hf.backbones.imagebind import imagebind_vision_config

        config, statistics = imagebind_vision_config(name), CLIP
    else:
        folder = _locate(name, ["*.json"], **hub)
        config = _vision_config(folder)
        statistics = family_of(config.model_type).statistics
        if (preparation := folder / "preprocessor_config.json").is_file():
            statistics = _statistics(preparation)
    patch, free = config.patch_size, family_of(config.model_type).free_size
    image_size = 224 - 224 % patch if free else config.image_size
    return BackboneSpec(config.hidden_size, config.num_hidden_layers, patch, image_size, *statistics)


def _statistics(preparation: Path) -> Statistics:
    """Mean and standard deviation of the colours, as a ``preprocessor_config.json`` of transformers says them."""
    try:
        values = json.loads(preparation.read_text(encoding="utf-8"))
        told = {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}
        told |= {name: values[name] for name in told if values.get(name) is not None}
        mean, std = (tuple(np.broadcast_to(np.array(value, float), 3).tolist()) for value in told.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{preparation} does not tell the mean and std of three colours: {error}") from error
    return mean, std


def load_backbone(
    source: str | Path, layers: Sequence[int], *, dtype: torch.dtype = torch.float32, **hub: Any
) -> Backbone:
    """Loads a frozen backbone from any supported source, cut after its last level.

    Args:
        source: a transformers id or folder, ``open_clip:<arch>/<weights>`` or ``imagebind:<checkpoint>``.
        layers: the levels, blocks counted from 1.
        dtype: precision of the weights in memory.
        hub: ``revision`` (branch, tag or commit), ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        InputError: the source is unknown, unreachable or not supported, or a level lies beyond its depth.
        BundleError: weights are missing, of another shape, or not finite.
    """
    kind, name = split_source(str(source))
    commit = None
    if kind == "open_clip":
        from adpretrain_hf.backbones.open_clip import from_open_clip

        model: PreTrainedModel = from_open_clip(name)
    elif kind == "imagebind":
        from adpretrain_hf.backbones.imagebind import from_imagebind

        model = from_imagebind(name)
    else:
        folder = _locate(name, ["*.json", "*.safetensors"], **hub)
        model = _load_folder(folder, layers[-1])
        commit = None if folder == Path(name) else folder.name
    backbone = Backbone(model, layers, commit).to(dtype)
    check_finite(str(source), backbone.state_dict())
    backbone.loaded_digests = backbone.digests(_PRECISIONS)
    return backbone


def load_same_backbone(
    source: str, layers: Sequence[int], *, digest: str | None, dtype: torch.dtype = torch.float32, **hub: Any
) -> Backbone:
    """Loads the backbone that a bundle was made with, from where it came from.

    What is there may be more precise than what the bundle was made with: it is rounded as it was then, or values would
    differ. What is less precise cannot be put right.

    Args:
        source, layers, dtype, hub: as for ``load_backbone``.
        digest: what ``Backbone.digest`` must be; None if it is not known.

    Raises:
        InputError: as ``load_backbone``.
        BundleError: as ``load_backbone``; the weights are others than those that the bundle was made with.
    """
    if digest is None:
        return load_backbone(source, layers, dtype=dtype, **hub)
    backbone = load_backbone(source, layers, dtype=torch.float32, **hub)
    found = backbone.loaded_digests
    if digest not in found:
        raise _other_weights(Path(source).resolve() if Path(source).is_dir() else source, found[0], digest)
    return backbone.to(_PRECISIONS[found.index(digest)]).to(dtype)


def _other_weights(source: object, found: str, expected: str) -> BundleError:
    return BundleError(
        f"the backbone at {str(source)!r} has other weights than the bundle was made with: their digest is {found}, "
        f"the configuration's {expected}. It is another backbone, or a less precise copy: get the bundle or the "
        "backbone again, or make a new bundle"
    )


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
        model = _load_folder(folder, layers[-1], strict=True)
    except InputError as error:
        raise BundleError(str(error)) from error
    backbone = Backbone(model, layers)
    backbone.loaded_digests = backbone.digests(_PRECISIONS)
    found = backbone.loaded_digests[0]  # of the values as the file has them, for none is more precise
    check_finite(str(folder), backbone.to(dtype).state_dict())
    if digest not in (None, found):
        raise _other_weights(folder, found, str(digest))
    return backbone


@quiet_transformers()
def _load_folder(source: Path, depth: int, *, strict: bool = False) -> "PreTrainedModel":
    from transformers import AutoModel

    config = _vision_config(source)
    cut_config(config, depth, source)
    try:
        model, report = AutoModel.from_pretrained(
            source,
            config=config,
            # A half precision would be torch's default in all threads meanwhile.
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the backbone at {str(source)!r} cannot be loaded: {error}") from error
    missing = {key for key in report["missing_keys"] if key.split(".")[0] not in family_of(config.model_type).unused}
    unexpected = report["unexpected_keys"] if strict else ()
    where = f"the backbone at {str(source)!r} does not fit its configuration"
    check_names(where, unexpected, missing, [str(entry) for entry in report["mismatched_keys"]])
    return model


def _locate(source: str, patterns: list[str], **hub: Any) -> Path:
    """A folder itself, or that of a repository's files that match the patterns; ``hub``: see ``RepositoryFiles``."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub.errors import HFValidationError

    from adpretrain_hf.hub import RepositoryFiles

    try:
        return RepositoryFiles(source, contents="a transformers model", **hub).folder(patterns)
    except (InputError, HFValidationError) as error:
        raise InputError(
            f"no backbone at {source!r}: expected a folder with a transformers model, an id on the Hub (reachable "
            f"now), open_clip:<arch>/<weights> or imagebind:<checkpoint>. {error}"
        ) from error


@quiet_transformers()
def _vision_config(folder: Path) -> "PretrainedConfig":
    """The configuration of a vision transformer with one width and square patches, of two towers the vision part's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(f"no backbone at '{folder}': expected a transformers config.json in it. {error}") from error
    config = getattr(config, "vision_config", config)
    needed = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    lacking = [name for name in needed if not isinstance(getattr(config, name, None), int)]
    if lacking:
        raise InputError(
            f"'{folder}' is a {config.model_type!r} model without a single {', '.join(lacking)}: expected a plain "
            "vision transformer such as Dinov2, DINOv3ViT, CLIPVision, SiglipVision or ViT"
        )
    return config
