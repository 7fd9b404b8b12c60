"""A bundle: a saved extractor as it lies on disk or on the Hub. Its files, read strictly and written whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adpretrain_hf.backbone_loading import check_finite, load_backbone, load_saved_backbone
from adpretrain_hf.backbones import Backbone
from adpretrain_hf.config import MODEL_TYPE, ADPretrainConfig, check_variant_name
from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.files import atomic_path, write_text
from adpretrain_hf.projector import Projectors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BACKBONE_FOLDER = "backbone"
PREPROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
IMAGE_PROCESSOR_TYPE = "ADPretrainImageProcessor"
_WEIGHTS_NAME = re.compile(r"model(?:\.([A-Za-z0-9_-]+))?\.safetensors")


def weights_file(config: ADPretrainConfig, variant: str) -> str:
    """The file that holds a variant's projectors."""
    return WEIGHTS_FILE if variant == config.default_variant else f"model.{check_variant_name(variant)}.safetensors"


def variants_in(folder: Path, config: ADPretrainConfig) -> list[str]:
    """The variants whose projectors lie in a bundle, the default one first."""
    return variants_among([path.name for path in sorted(folder.iterdir())], config)


def variants_among(names: Iterable[str], config: ADPretrainConfig) -> list[str]:
    """The variants whose projectors are among some files, the default one first."""
    found = [match[1] or config.default_variant for name in names if (match := _WEIGHTS_NAME.fullmatch(name))]
    return sorted(found, key=lambda variant: variant != config.default_variant)


def read_config(folder: Path) -> ADPretrainConfig:
    """Reads a bundle's configuration.

    Raises:
        MissingPathError: no such folder.
        BundleError: not a bundle, or of another format version, or damaged.
    """
    if not folder.is_dir():
        raise MissingPathError(f"no bundle at {folder}: it is not a folder")
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} is not an ADPretrain bundle: there is no {CONFIG_FILE} (`adpretrain new` makes one)"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    try:
        return ADPretrainConfig.from_dict(values)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def write_config(folder: Path, config: ADPretrainConfig) -> None:
    """Writes the configuration, and the same preparation for transformers' image processors."""
    write_text(folder / PREPROCESSOR_FILE, _to_json(image_processor_settings(config)))
    write_text(folder / CONFIG_FILE, _to_json({"model_type": MODEL_TYPE} | config.to_dict()))


def image_processor_settings(config: ADPretrainConfig) -> dict[str, Any]:
    """The preparation in the words of transformers.

    ``AutoImageProcessor`` finds the exact one by its type (``integrations/transformers.py``). To a processor of
    transformers itself that is asked for by its class, such as ``BitImageProcessor``, the rest says the centre crop.
    """
    side = config.image_size
    return {
        "image_processor_type": IMAGE_PROCESSOR_TYPE,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        BundleError: missing, or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a whole safetensors file: {error}") from error


def write_weights(path: Path, module: nn.Module) -> None:
    """Writes a module's tensors; the same tensors give the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_strict(module: nn.Module, tensors: dict[str, Tensor], where: str, dtype: torch.dtype | None) -> None:
    """Puts tensors into a module (which may lie on the meta device) if they fit it exactly.

    Args:
        module: where they go.
        tensors: by name.
        where: what errors call them.
        dtype: what they are converted to; None keeps what they are.

    Raises:
        BundleError: tensors are missing, unexpected, of another shape, not floats or not finite; all are listed.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name}: got {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    kinds = [f"{name}: got {t.dtype}, expected floats" for name, t in tensors.items() if not t.is_floating_point()]
    if missing or unexpected or shapes or kinds:
        raise BundleError(
            f"{where} does not fit its configuration: missing {missing}, unexpected {unexpected}, "
            f"mis-shaped or of another kind {shapes + kinds}"
        )
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    check_finite(tensors, where)  # in the precision that they are used in
    module.load_state_dict(tensors, assign=True)


def load_projectors(folder: Path, config: ADPretrainConfig, variant: str, dtype: torch.dtype) -> Projectors:
    """Loads a variant's projectors from a bundle.

    Raises:
        BundleError: the bundle does not have the variant, or its file is incomplete or damaged.
    """
    path = folder / weights_file(config, variant)
    if not path.is_file():
        raise BundleError(
            f"no variant {variant!r} in {folder} ({path.name} is missing): "
            f"expected one of {variants_in(folder, config)}"
        )
    with torch.device("meta"):
        projectors = Projectors(config)
    load_strict(projectors, read_weights(path), str(path), dtype)
    return projectors.requires_grad_(False)


def load_bundled_backbone(folder: Path, config: ADPretrainConfig, dtype: torch.dtype, **hub: Any) -> Backbone:
    """Loads a bundle's backbone, or fetches the one its configuration names if it was saved without.

    Raises:
        BundleError: it is neither there nor to be had, incomplete or damaged.
    """
    if (folder / BACKBONE_FOLDER).is_dir():
        return load_saved_backbone(folder / BACKBONE_FOLDER, config.layers, dtype=dtype, digest=config.backbone_digest)
    try:
        return load_backbone(config.backbone, config.layers, revision=config.backbone_revision, dtype=dtype, **hub)
    except InputError as error:
        raise BundleError(
            f"{folder} was saved without its backbone, and {config.backbone!r} (revision {config.backbone_revision}) "
            f"cannot be loaded: connect to the network once, or save the bundle with include_backbone=True. {error}"
        ) from error


def check_no_foreign_variants(folder: Path, config: ADPretrainConfig, variant: str) -> None:
    """Raises InputError if saving to a folder would leave another extractor's projectors beside the new ones."""
    if not (folder / CONFIG_FILE).is_file():
        return
    there = read_config(folder)
    others = [name for name in variants_in(folder, there) if name != variant]
    if others and there != config:
        differing = sorted(name for name, value in config.to_dict().items() if there.to_dict()[name] != value)
        raise InputError(
            f"{folder} holds the variants {others} of an extractor with another configuration (it differs in "
            f"{differing}): save to another folder, or remove that one first"
        )


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
