"""What a backbone's source string means, and its sizes and statistics without its weights.

``facebook/dinov2-base`` or a folder (transformers), ``open_clip:<arch>/<weights>``, ``imagebind:<checkpoint>``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adpretrain_hf.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# What a family's published checkpoints were trained with; a preprocessor_config.json beside the weights goes first.
_STATISTICS = {
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
    "vit": (HALF, HALF),
}
# Families without a fixed grid of positions to keep to are used at the published 224 px.
_FREE_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")


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


def split_open_clip(name: str) -> tuple[str, str]:
    """Splits ``"<arch>/<weights>"``; weights are a tag that open_clip knows or the path of a checkpoint.

    Raises:
        InputError: one of the two is missing.
    """
    arch, _, weights = name.partition("/")
    if not arch or not weights:
        raise InputError(f"got 'open_clip:{name}', expected open_clip:<arch>/<tag or checkpoint path>")
    return arch, weights


def describe(source: str, *, revision: str | None = None, **hub: Any) -> BackboneSpec:
    """Reads a backbone's sizes and statistics.

    Raises:
        InputError: unknown, unreachable, or not a vision transformer that is supported.
    """
    kind, name = split_source(source)
    if kind == "open_clip":
        from adpretrain_hf.open_clip_towers import open_clip_vision_config

        info = open_clip_vision_config(*split_open_clip(name))
        sizes = info.hidden_size, info.num_hidden_layers, info.patch_size, info.image_size
        return BackboneSpec(*sizes, tuple(info.mean), tuple(info.std))
    if kind == "imagebind":
        from adpretrain_hf.imagebind import from_imagebind

        return _spec(from_imagebind(name).config, CLIP_MEAN, CLIP_STD)
    return _describe_folder(locate(name, ["*.json"], revision=revision, **hub))


def locate(source: str | Path, patterns: Sequence[str], **hub: Any) -> Path:
    """The folder of a transformers model: itself, or the files of a repository on the Hub that match the patterns.

    Args:
        source: a folder, or the id of a repository.
        patterns: what to download, e.g. ``["*.json"]``.
        hub: see ``RepositoryFiles``.

    Raises:
        InputError: neither, or unreachable.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub.errors import HFValidationError

    from adpretrain_hf.hub_download import RepositoryFiles

    try:
        return RepositoryFiles(str(source), **hub).folder(list(patterns))
    except (InputError, HFValidationError) as error:
        raise InputError(
            f"no backbone at {str(source)!r}: expected a folder with a transformers model, an id on the Hub (reachable "
            f"now), open_clip:<arch>/<weights> or imagebind:<checkpoint>. {error}"
        ) from error


def vision_config(folder: Path) -> PretrainedConfig:
    """Reads the transformers configuration of a vision transformer, the vision part where there are two towers.

    Raises:
        InputError: missing, damaged, or not that of a vision transformer with one width and square patches.
    """
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


def _describe_folder(folder: Path) -> BackboneSpec:
    config = vision_config(folder)
    spec = _spec(config, *_statistics(folder / "preprocessor_config.json", config.model_type))
    return replace(spec, image_size=224 - 224 % spec.patch_size) if config.model_type in _FREE_SIZE else spec


def _spec(config: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> BackboneSpec:
    sizes = config.hidden_size, config.num_hidden_layers, config.patch_size, config.image_size
    return BackboneSpec(*sizes, mean, std)


def _statistics(path: Path, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not path.is_file():
        return _STATISTICS.get(model_type, (IMAGENET_MEAN, IMAGENET_STD))
    values = json.loads(path.read_text(encoding="utf-8"))
    return tuple(values.get("image_mean", IMAGENET_MEAN)), tuple(values.get("image_std", IMAGENET_STD))
