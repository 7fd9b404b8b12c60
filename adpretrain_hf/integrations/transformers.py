"""Bundles in transformers: importing this module makes its ``Auto`` classes and pipelines know them.

import adpretrain_hf.integrations.transformers
features = pipeline("image-feature-extraction", model="org/adpretrain-dinov2-large")
features.model.set_reference(normal_images)
"""

import os
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, BatchFeature
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from adpretrain_hf.bundle import describe_bundle, image_processor_settings
from adpretrain_hf.config import MODEL_TYPE, ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import Preprocessor

_Path = str | os.PathLike[str]
# What AutoModel and pipeline() pass on beside the arguments they were given; it says nothing about a bundle.
_OF_TRANSFORMERS = ("config", "trust_remote_code", "adapter_kwargs", "_from_auto", "_from_pipeline")


class ADPretrainModelConfig(PreTrainedConfig):
    """A bundle's ``config.json`` as transformers holds it: the fields of ``ADPretrainConfig`` are its attributes."""

    model_type = MODEL_TYPE


@dataclass
class ADPretrainOutput(ModelOutput):
    """Pretrained features.

    Attributes:
        last_hidden_state: (B, h*w, C), of the last level.
        hidden_states: L of (B, h*w, C).
        feature_maps: the same as L maps (B, C, h, w).
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feature_maps: tuple[Tensor, ...] | None = None


class ADPretrainModel(PreTrainedModel):
    """An extractor as a model of transformers, which loads and saves it as the bundle it is.

    Attributes:
        extractor: all there is to it.
    """

    config_class = ADPretrainModelConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True

    def __init__(self, config: ADPretrainModelConfig, extractor: ADPretrainFeatureExtractor) -> None:
        super().__init__(config)
        self.extractor = extractor
        self.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: _Path, **arguments: Any) -> "ADPretrainModel":  # type: ignore[override]
        """Loads a bundle strictly; see ``ADPretrainFeatureExtractor.from_pretrained`` for the arguments and errors."""
        config = arguments.get("config")
        given = {name: value for name, value in arguments.items() if name not in _OF_TRANSFORMERS}
        if config is not None:
            given.setdefault("image_size", config.image_size)  # AutoConfig takes the argument to itself
        if given.get("dtype") == "auto":
            del given["dtype"]
        extractor = ADPretrainFeatureExtractor.from_pretrained(os.fspath(pretrained_model_name_or_path), **given)
        settings = extractor.config.to_dict() | {"name_or_path": str(pretrained_model_name_or_path)}
        return cls(cls.config_class(**settings), extractor)

    @classmethod
    def _from_config(cls, config: ADPretrainModelConfig, **arguments: Any) -> NoReturn:
        raise InputError(
            "a bundle cannot be made of its configuration alone: load one with AutoModel.from_pretrained(bundle), or "
            "make a new one with ADPretrainFeatureExtractor.from_backbone"
        )

    def set_reference(self, images: Any, **arguments: Any) -> "ADPretrainModel":
        """Sets the normal images to compare with, and returns self; see ``ADPretrainFeatureExtractor``."""
        self.extractor.set_reference(images, **arguments)
        return self

    def forward(self, pixel_values: Tensor) -> ADPretrainOutput:
        """Extracts features of prepared images (B, 3, H, W).

        Raises:
            InputError: no reference is set, or images of a wrong shape.
        """
        maps = tuple(self.extractor(pixel_values).values())
        states = tuple(level.flatten(2).transpose(1, 2) for level in maps)
        return ADPretrainOutput(last_hidden_state=states[-1], hidden_states=states, feature_maps=maps)

    def requires_grad_(self, requires_grad: bool = True) -> "ADPretrainModel":
        """Opens the projectors to training, or closes them; the backbone stays frozen."""
        self.extractor.requires_grad_(requires_grad)
        return self

    def save_pretrained(self, save_directory: _Path, **arguments: Any) -> None:  # type: ignore[override]
        """Writes the bundle; see ``ADPretrainFeatureExtractor.save_pretrained``."""
        self.extractor.save_pretrained(os.fspath(save_directory), **arguments)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:  # type: ignore[override]
        """Pushes the bundle; see ``ADPretrainFeatureExtractor.push_to_hub``."""
        return self.extractor.push_to_hub(repo_id, **arguments)


class ADPretrainImageProcessor(BaseImageProcessor):
    """``ADPretrainFeatureExtractor.preprocess`` as an image processor: the same values to the last bit."""

    def __init__(self, config: ADPretrainConfig) -> None:
        super().__init__()
        self.preprocessor = Preprocessor(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: _Path, **arguments: Any) -> "ADPretrainImageProcessor":  # type: ignore[override]
        """Reads how a bundle prepares images.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository.
            arguments: ``image_size``, which overrides the bundle's, in pixels; ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``force_download`` for the Hub.

        Raises:
            MissingPathError: no such folder or repository.
            BundleError: not a bundle.
        """
        given = {name: value for name, value in arguments.items() if name not in _OF_TRANSFORMERS}
        size = given.pop("image_size", None)
        config = describe_bundle(pretrained_model_name_or_path, **given)[0]
        return cls(config if size is None else config.replace(image_size=size))

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Prepares images: ``pixel_values`` (B, 3, H, W).

        Raises:
            InputError: nothing to prepare, or images whose shapes do not make one batch.
            ImageError: an image cannot be used.
        """
        return BatchFeature({"pixel_values": self.preprocessor(images)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The preparation, as ``preprocessor_config.json`` holds it."""
        return image_processor_settings(self.preprocessor.config)


AutoConfig.register(MODEL_TYPE, ADPretrainModelConfig, exist_ok=True)
AutoModel.register(ADPretrainModelConfig, ADPretrainModel, exist_ok=True)
_BACKENDS: dict[str, type] = dict.fromkeys(("torchvision", "pil"), ADPretrainImageProcessor)
AutoImageProcessor.register(ADPretrainModelConfig, image_processor_classes=_BACKENDS, exist_ok=True)
