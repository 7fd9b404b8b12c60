"""A bundle as it lies on disk or on the Hub: the names of its files, its variants and its configuration."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adpretrain_hf.config import MODEL_TYPE, ADPretrainConfig, check_variant_name
from adpretrain_hf.errors import BundleError, MissingPathError
from adpretrain_hf.files import write_text

IMAGE_PROCESSOR_TYPE = "ADPretrainImageProcessor"
_WEIGHTS_NAME = re.compile(r"model(?:\.([A-Za-z0-9_-]+))?\.safetensors")


@dataclass(frozen=True)
class BundleLayout:
    """The names of a bundle's files and folders; other variants' projectors are ``model.<variant>.safetensors``."""

    config: str = "config.json"
    weights: str = "model.safetensors"
    backbone: str = "backbone"
    preprocessor: str = "preprocessor_config.json"
    references: str = "references"
    card: str = "README.md"

    def weights_of(self, variant: str, config: ADPretrainConfig) -> str:
        """The file that holds a variant's projectors."""
        is_default = variant in (config.default_variant, *config.variant_aliases)
        return self.weights if is_default else f"model.{check_variant_name(variant)}.safetensors"

    def is_own(self, name: str) -> bool:
        """Whether a file is weights or settings of a bundle; pictures and whatever else people add are not."""
        return name.startswith((f"{self.backbone}/", "model.", "model-")) and name.endswith((".safetensors", ".json"))


LAYOUT = BundleLayout()


def variants_among(names: Iterable[str], config: ADPretrainConfig) -> list[str]:
    """The variants whose projectors are among some files, the default one first."""
    found = [match[1] or config.default_variant for name in names if (match := _WEIGHTS_NAME.fullmatch(name))]
    found += config.variant_aliases if config.default_variant in found else ()
    return sorted(found, key=lambda variant: variant != config.default_variant)


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a bundle on disk by their names in it, ``backbone/config.json``; hidden ones are no part of it."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if not any(part[0] == "." for part in name.parts)}


def read_config(folder: Path) -> ADPretrainConfig:
    """Reads a bundle's configuration.

    Raises:
        MissingPathError: no such folder.
        BundleError: not a bundle, or of another format version, or damaged.
    """
    if not folder.is_dir():
        raise MissingPathError(f"no bundle at {folder}: it is not a folder")
    path = folder / LAYOUT.config
    try:
        return ADPretrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} is not an ADPretrain bundle: there is no {LAYOUT.config} (`adpretrain new` makes one)"
        ) from error
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error


def write_config(folder: Path, config: ADPretrainConfig) -> None:
    """Writes the configuration, and the same preparation for transformers' image processors."""
    settings = {"model_type": MODEL_TYPE} | config.to_dict()
    for name, values in ((LAYOUT.preprocessor, image_processor_settings(config)), (LAYOUT.config, settings)):
        write_text(folder / name, json.dumps(values, indent=2) + "\n")


def prepared_as(config: ADPretrainConfig, folder: Path) -> ADPretrainConfig:
    """A configuration with the size, mode, mean and std of a folder's ``preprocessor_config.json``.

    Raises:
        BundleError: the file is damaged, or tells another kind of preparation.
    """
    path = folder / LAYOUT.preprocessor
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        own = image_processor_settings(config) | told
        size, mode = own["size"]["shortest_edge"], own["resize_mode"]
        config = config.replace(image_size=size, resize_mode=mode, mean=own["image_mean"], std=own["image_std"])
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path} does not tell the preparation of a bundle: {error}") from error
    settings = image_processor_settings(config)
    if others := sorted(name for name in settings.keys() & told.keys() if told[name] != settings[name]):
        raise BundleError(f"{path}: {', '.join(others)} cannot be other than {[settings[name] for name in others]}")
    return config


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
        "resize_mode": config.resize_mode,
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
