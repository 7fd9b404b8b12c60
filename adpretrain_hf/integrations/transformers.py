"""Bundles in transformers: importing this module makes its ``Auto`` classes and pipelines know them.

import adpretrain_hf.integrations.transformers
features = pipeline("image-feature-extraction", model="org/adpretrain-dinov2-large")
features.model.set_reference(normal_images)
"""

import copy
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, BatchFeature
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.hub import convert_file_size_to_int

from adpretrain_hf.bundle import LAYOUT, image_processor_settings, read_preparation, write_config
from adpretrain_hf.config import MODEL_TYPE, ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import check_fit
from adpretrain_hf.images import Preprocessor, choose_device
from adpretrain_hf.projector import Projectors

_Path = str | os.PathLike[str]
# What AutoModel and pipeline() pass on beside the arguments they were given; it says nothing about a bundle.
_OF_TRANSFORMERS = (
    "trust_remote_code",
    "adapter_kwargs",
    "code_revision",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
)
_ANY_FLAG = (True, False)
# What else is passed to any model, with the values that hold for every bundle: others cannot be honoured.
_AT_LOADING: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": _ANY_FLAG,
    "use_safetensors": (True,),
    "weights_only": (True,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "attn_implementation": ("sdpa",),
    "subfolder": ("",),
}
_AT_SAVING: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True,),
    "save_peft_format": _ANY_FLAG,
    "save_original_format": _ANY_FLAG,
    "distributed_checkpoint": (False,),
}
_OF_MODELS = (*_AT_LOADING, "device_map", "device", "dtype", "torch_dtype", "variant")
_OUTPUT = ("output_hidden_states", "return_dict")
_PARAMETERS = inspect.signature(ADPretrainFeatureExtractor.from_pretrained).parameters


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
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: _Path,
        *,
        config: ADPretrainModelConfig | _Path | None = None,
        device_map: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **arguments: Any,
    ) -> "ADPretrainModel":
        """Loads a bundle strictly; see ``ADPretrainFeatureExtractor.from_pretrained`` for more arguments and errors.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository.
            config: what AutoConfig made of the bundle's, with overrides, or where it lies.
            device_map: one device for all of it: ``"cpu"``, ``0``, ``{"": "cuda:1"}``; ``"auto"`` and its kin are the
                GPU if there is one.
            dtype, torch_dtype: precision in memory, the first if both are given; ``"auto"`` is float32.
            arguments: whatever else is passed to models of transformers, where a bundle can honour it.

        Raises:
            InputError: an argument, or an override of the configuration, that a bundle cannot honour.
        """
        told: ADPretrainModelConfig | None = (
            cls.config_class.from_pretrained(config) if isinstance(config, (str, os.PathLike)) else config
        )
        given = _checked(arguments, _AT_LOADING)
        output = {name: given.pop(name) for name in _OUTPUT if name in given}
        given["device"] = _only_device(device_map or "cpu")
        given["dtype"] = next((one for one in (dtype, torch_dtype) if one not in (None, "auto")), None)
        overrides = told.to_dict() if told else {}
        # AutoConfig takes to itself the arguments that it has fields for.
        for name in overrides.keys() & _PARAMETERS.keys() - {"dtype", "layers"}:
            given.setdefault(name, overrides[name])
        extractor = ADPretrainFeatureExtractor.from_pretrained(os.fspath(pretrained_model_name_or_path), **given)
        settings = extractor.config.to_dict() | {"name_or_path": str(pretrained_model_name_or_path)}
        loaded = cls.config_class(**settings)
        if told is not None:
            output = {name: getattr(told, name) for name in _OUTPUT} | output
            _check_overrides(told, loaded, honoured={*given, *_OUTPUT})
        for name, value in output.items():
            setattr(loaded, name, value)
        return cls(loaded, extractor)

    @classmethod
    def _from_config(cls, config: ADPretrainModelConfig, **arguments: Any) -> NoReturn:
        raise InputError(
            "a bundle cannot be made of its configuration alone: load one with AutoModel.from_pretrained(bundle), or "
            "make a new one with ADPretrainFeatureExtractor.from_backbone"
        )

    def set_reference(self, images: Any = None, **arguments: Any) -> "ADPretrainModel":
        """Sets the normal images to compare with, and returns self; see ``ADPretrainFeatureExtractor``."""
        self.extractor.set_reference(images, **arguments)
        return self

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> ADPretrainOutput | tuple[Any, ...]:
        """Extracts features of prepared images (B, 3, H, W).

        Args:
            pixel_values: the images.
            output_hidden_states: False leaves ``hidden_states`` out, of which the last level's is there anyway.
            return_dict: False returns a tuple.
            output_attentions: True is refused: attention is not kept.
            interpolate_pos_encoding: makes no difference: positions are interpolated where they have to be.

        Raises:
            InputError: no reference is set, one with tiles, images of a wrong shape, or attention is asked for.
        """
        if output_attentions:
            raise InputError("output_attentions=True cannot be honoured by a bundle: attention is not kept")
        if self.extractor.reference is not None and self.extractor.reference.tiles:
            raise InputError("the reference has tiles, and images come here whole: call model.extractor.score")
        maps = tuple(self.extractor(pixel_values).values())
        states = tuple(level.flatten(2).transpose(1, 2) for level in maps)
        output = ADPretrainOutput(last_hidden_state=states[-1], hidden_states=states, feature_maps=maps)
        if output_hidden_states is False:
            output = ADPretrainOutput(last_hidden_state=states[-1], feature_maps=maps)
        as_tuple = (self.config.return_dict if return_dict is None else return_dict) is False
        return output.to_tuple() if as_tuple else output

    def requires_grad_(self, requires_grad: bool = True) -> "ADPretrainModel":
        """Opens the projectors to training, or closes them; the backbone stays frozen."""
        self.extractor.requires_grad_(requires_grad)
        return self

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: _Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        save_function: Any = None,
        **arguments: Any,
    ) -> None:
        """Writes the bundle; see ``ADPretrainFeatureExtractor.save_pretrained`` for more arguments.

        Args:
            save_directory: the folder.
            is_main_process: False writes nothing, as other processes of a training do.
            state_dict: tensors to write in place of the model's own, by its names, e.g. gathered from many processes.
            push_to_hub: also push it.
            max_shard_size: at least the size of the weights, for the files of a bundle are never cut.
            variant: that of the projectors that are loaded.
            token: for the push.
            save_function: not used: a bundle is safetensors.
            arguments: whatever else is passed to models of transformers, where a bundle can honour it.

        Raises:
            InputError: an argument that a bundle cannot honour.
            BundleError: ``state_dict`` does not fit the model; all that is wrong with it is listed.
        """
        given = _checked(arguments, _AT_SAVING)
        if variant not in (None, self.extractor.variant):
            raise InputError(f"variant={variant!r} cannot be honoured: the projectors are {self.extractor.variant!r}")
        size = sum(tensor.nbytes for tensor in self.state_dict().values())
        if max_shard_size is not None and convert_file_size_to_int(max_shard_size) < size:
            raise InputError(f"max_shard_size={max_shard_size!r} cannot be honoured: a bundle's files are not cut")
        if push_to_hub:
            given |= {"push_to_hub": True, "token": token}
        if is_main_process:
            extractor = self.extractor if state_dict is None else self._with_tensors(state_dict)
            extractor.save_pretrained(os.fspath(save_directory), **given)

    def _with_tensors(self, state_dict: Mapping[str, Tensor]) -> ADPretrainFeatureExtractor:
        """The extractor with other tensors; its own stay as they are."""
        own = self.extractor
        tensors = {name.removeprefix("extractor."): tensor for name, tensor in state_dict.items()}
        check_fit("state_dict", tensors, own.state_dict(), "give that of the whole model")
        shared = {id(tensor): tensor for tensor in (*own.backbone.parameters(), *own.backbone.buffers())}
        with torch.device("meta"):
            projectors = Projectors(own.config)
        other = ADPretrainFeatureExtractor(own.config, copy.deepcopy(own.backbone, shared), projectors, own.variant)
        other.load_state_dict(tensors, assign=True)
        return other

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads tensors by the model's names, or by those of ``model.safetensors``, from which Trainer resumes."""
        projectors = self.extractor.projectors
        if state_dict.keys() == projectors.state_dict().keys():
            return projectors.load_state_dict(state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

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
            arguments: ``image_size``, in pixels, ``resize_mode`` and ``decode``, which override the bundle's;
                ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` for the Hub.

        Raises:
            MissingPathError: no such folder or repository.
            BundleError: not a bundle.
            InputError: another preparation than the bundle's is asked for, by ``size``, ``do_normalize`` and the like.
        """
        given = _checked(arguments, {})
        if "_from_pipeline" in arguments:  # which passes the model's arguments to its processor as well
            given = {name: value for name, value in given.items() if name not in _OF_MODELS}
        chosen = {name: given.pop(name) for name in ("image_size", "resize_mode", "decode") if name in given}
        asked = {name: given.pop(name) for name in cls.valid_kwargs.__annotations__.keys() & given.keys()}
        config = read_preparation(pretrained_model_name_or_path, **given)
        config = config.replace(**chosen)
        settings = image_processor_settings(config) | {"do_center_crop": config.resize_mode == "crop"}
        if refused := sorted(name for name, value in asked.items() if settings.get(name) != value):
            raise InputError(
                f"{', '.join(refused)} cannot be honoured: a bundle says how its images are prepared, and its features "
                "depend on it; image_size=... sets the side"
            )
        return cls(config)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Prepares images: ``pixel_values`` (B, 3, H, W).

        Raises:
            InputError: nothing to prepare, or images whose shapes do not make one batch.
            ImageError: an image cannot be used.
        """
        return BatchFeature({"pixel_values": self.preprocessor(images)}, tensor_type=return_tensors)

    def save_pretrained(self, save_directory: _Path, push_to_hub: bool = False, **arguments: Any) -> None:
        """Writes ``preprocessor_config.json``, and the bundle's ``config.json`` where there is none.

        Raises:
            InputError: ``push_to_hub``, for a processor is pushed with its bundle.
        """
        if push_to_hub or arguments:
            raise InputError(f"{sorted(arguments) or 'push_to_hub'} cannot be honoured: push the bundle instead")
        if (Path(save_directory) / LAYOUT.config).exists():
            super().save_pretrained(save_directory)
        else:
            write_config(Path(save_directory), self.preprocessor.config)

    def push_to_hub(self, *args: Any, **arguments: Any) -> NoReturn:
        """Is refused: a processor is pushed with its bundle."""
        raise InputError("a bundle's processor is not pushed alone: push the bundle, which it is part of")

    def to_dict(self) -> dict[str, Any]:
        """The preparation, as ``preprocessor_config.json`` holds it."""
        return image_processor_settings(self.preprocessor.config)


def _checked(arguments: Mapping[str, Any], holding: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The arguments that are left to be honoured, without those that transformers adds.

    Raises:
        InputError: one of ``holding`` has another value than those that hold for every bundle.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name not in _OF_TRANSFORMERS}
    for name in given.keys() & holding.keys():
        if (value := given.pop(name)) not in holding[name]:
            expected = " or ".join(map(repr, holding[name]))
            raise InputError(f"{name}={value!r} cannot be honoured by a bundle, expected {expected}")
    return given


def _only_device(device_map: Any) -> torch.device:
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(places) == 1:
        (place,) = places
        if place in ("auto", "balanced", "balanced_low_0", "sequential"):
            return choose_device()
        try:
            return torch.device(place)
        except (RuntimeError, TypeError):
            pass
    raise InputError(f"device_map={device_map!r} cannot be honoured by a bundle, expected one device, or 'auto'")


def _check_overrides(config: ADPretrainModelConfig, loaded: ADPretrainModelConfig, honoured: set[str]) -> None:
    """Raises InputError if AutoConfig took an argument that loading a bundle cannot honour."""
    asked, had = (one.to_dict() | {"attn_implementation": one._attn_implementation} for one in (config, loaded))
    same = {*honoured, "dtype", "transformers_version", "_name_or_path"}
    differing = [name for name in sorted(asked.keys() - same) if _plain(asked[name]) != _plain(had.get(name))]
    if asked["attn_implementation"] == "sdpa":
        differing = [name for name in differing if name != "attn_implementation"]
    if differing:
        raise InputError(f"{', '.join(differing)} cannot be honoured: a bundle is loaded as its configuration says")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


AutoConfig.register(MODEL_TYPE, ADPretrainModelConfig, exist_ok=True)
AutoModel.register(ADPretrainModelConfig, ADPretrainModel, exist_ok=True)
_BACKENDS: dict[str, type] = dict.fromkeys(("torchvision", "pil"), ADPretrainImageProcessor)
AutoImageProcessor.register(ADPretrainModelConfig, image_processor_classes=_BACKENDS, exist_ok=True)
