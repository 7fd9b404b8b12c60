"""Backbone: a frozen vision transformer of transformers, from images to the patch maps of the chosen blocks."""

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import combined_digest, tensor_digests

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of pixels in [0, 1]
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: Statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """How one model type of transformers differs from the others."""

    class_tokens: int = 1
    free_size: bool = False  # no fixed grid of positions to keep to: used at the published 224 px
    unused: tuple[str, ...] = ()  # what comes after the last block: the tokens of this package are taken before it
    statistics: Statistics = IMAGENET  # of its published checkpoints, where no preprocessor_config.json says otherwise


_FAMILIES: dict[str, Family] = {
    "dinov2": Family(free_size=True, unused=("layernorm",)),
    "dinov2_with_registers": Family(free_size=True, unused=("layernorm",)),
    "dinov3_vit": Family(free_size=True, unused=("norm",)),
    "clip_vision_model": Family(unused=("post_layernorm",), statistics=CLIP),
    "siglip_vision_model": Family(0, unused=("post_layernorm", "head"), statistics=_HALF),
    "vit": Family(unused=("layernorm", "pooler"), statistics=_HALF),
}


def family_of(model_type: str) -> Family:
    """The family of a transformers model type; an unknown one is taken to be a plain ViT with a class token."""
    return _FAMILIES.get(model_type, Family())


class Backbone(nn.Module):
    """A frozen vision transformer that ends after the last level.

    No parameter has a gradient, and it stays in eval mode whatever ``train()`` is told. Tokens are the raw residual
    stream after a block: no final LayerNorm, class and register tokens dropped (released code, ``feature_extractor``).

    Args:
        model: a vision transformer of transformers with ``hidden_states``; blocks after the last level and whatever
            follows them are removed from it.
        layers: the levels, blocks counted from 1.
        commit: of the repository on the Hub that the weights come from, if they do.

    Attributes:
        loaded_digests: see ``digests``; those of the weights as they were loaded, and rounded to other precisions.

    Raises:
        InputError: a level beyond the depth of the network.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[int], commit: str | None = None) -> None:
        from transformers.utils import output_capturing

        super().__init__()
        family = family_of(model.config.model_type)
        self.layers, self.commit = tuple(layers), commit
        self.loaded_digests: list[str] = []
        self.hidden_size: int = model.config.hidden_size
        self.patch_size: int = model.config.patch_size
        self._prefix_tokens = family.class_tokens + getattr(model.config, "num_register_tokens", 0)
        # The installed transformers may be able to keep only those states that are asked for.
        some = hasattr(output_capturing, "selected_hidden_states")
        self._arguments: dict[str, Any] = {"output_hidden_states": list(self.layers) if some else True}
        # Some resample their positions only where they are told to.
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self._arguments["interpolate_pos_encoding"] = True
        self.model = _end_after(model, self.layers[-1], family.unused)
        self.requires_grad_().eval()

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Computes the patch maps of every level.

        Args:
            images: (B, 3, H, W), normalised; H and W multiples of the patch size.
            layers: some of the levels; blocks after the last of them are not computed.

        Returns:
            L maps (B, C, h, w) with h = H / patch size, w = W / patch size.

        Raises:
            InputError: H or W is no multiple of the patch size.
        """
        height, width, patch = images.shape[-2], images.shape[-1], self.patch_size
        if height % patch or width % patch:  # the last rows and columns would not be seen, and maps be stretched
            raise InputError(f"got images of {height} x {width} pixels, expected multiples of the patch size {patch}")
        h, w = height // patch, width // patch
        wanted = layers or self.layers
        states = self._until(wanted[-1])(pixel_values=images, **self._arguments).hidden_states
        return [self._to_map(states[n], h, w) for n in wanted]

    def keep(self, layers: Sequence[int]) -> None:
        """Drops all levels but some, and the blocks after the last of them."""
        del _blocks_of(self.model)[1][layers[-1] :]
        cut_config(self.model.config, layers[-1], self.model.config.model_type)
        self.layers = tuple(layers)

    def _until(self, depth: int) -> "PreTrainedModel":
        """The network as if it ended after a block: a copy of what holds the blocks, in which all else is shared."""
        if depth == self.layers[-1] or torch.compiler.is_compiling():
            return self.model
        path, blocks = _blocks_of(self.model)
        # The first call puts transformers' hooks on the blocks: by the copy they would be put there twice.
        if not any(map(_is_capturing, blocks[0]._forward_hooks.values())):
            return self.model
        return _replaced(self.model, path.split("."), blocks[:depth])

    def _to_map(self, tokens: Tensor, h: int, w: int) -> Tensor:
        patches = tokens[:, self._prefix_tokens :]  # (B, h*w, C)
        if patches.shape[1] != h * w:
            raise InputError(
                f"{self.model.config.model_type!r} gave {tokens.shape[1]} tokens for a grid of {h} x {w} patches and "
                f"{self._prefix_tokens} prefix tokens: this kind of vision transformer is not supported"
            )
        return patches.transpose(1, 2).unflatten(2, (h, w))

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a backbone is never trained."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "Backbone":
        """Stays frozen."""
        return super().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        """The state without transformers' hooks, which cannot be pickled; the first call installs them again."""
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        model = copy.deepcopy(self.model, tensors)  # all but the tensors, which both share
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if _is_capturing(hook):
                    del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        return self.__dict__ | {"_modules": self._modules | {"model": model}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a state over, in a process where transformers may never have constructed such a network."""
        from transformers.modeling_utils import PreTrainedModel

        super().__setstate__(state)
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                # Only there it notes what a class can keep of its outputs; releases differ in how.
                PreTrainedModel.__init__(type(module).__new__(type(module)), module.config)

    def digest(self) -> str:
        """16 hex digits that identify the weights. A more precise copy of the same values has the same ones."""
        return self.digests([torch.float32])[0]

    def digests(self, dtypes: Sequence[torch.dtype]) -> list[str]:
        """The ``digest`` of the weights as they are when they were rounded to each of some dtypes."""
        found = [tensor_digests(tensor, dtypes) for tensor in self.model.state_dict().values()]
        # Sorted, for a library may rename and reorder a network's parameters from one version to the next.
        return [combined_digest(sorted(of_dtype)) for of_dtype in zip(*found, strict=True)]

    def save(self, folder: str | Path) -> None:
        """Writes the network as transformers' own ``save_pretrained`` does."""
        with quiet_transformers():
            self.model.save_pretrained(folder)


def _end_after(model: "PreTrainedModel", depth: int, unused: tuple[str, ...]) -> "PreTrainedModel":
    """Drops all that is computed after block ``depth``, and puts DINOv2's own rule for positions in."""
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    _, blocks = _blocks_of(model)
    cut_config(model.config, depth, model.config.model_type)
    del blocks[depth:]
    if hasattr(model.config, "use_mask_token"):
        embeddings: Any = model.embeddings
        embeddings.mask_token = None
    for name in unused:
        if getattr(model, name, None) is not None:
            setattr(model, name, nn.Identity())
    if isinstance(model, Dinov2Model):
        from adpretrain_hf.backbones.position_grid import PublishedGridEmbeddings

        model.embeddings = PublishedGridEmbeddings(model.embeddings)
    return model


def _blocks_of(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of a network's blocks, and where it is: ``encoder.layer``."""
    kind, number = model.config.model_type, model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return path, module
    raise InputError(f"{kind!r} has no list of {number} blocks: it is not supported as a backbone")


def _replaced(module: Any, path: Sequence[str], part: nn.Module) -> Any:
    """A copy of a module with another part at a place; it shares all others."""
    if not path:
        return part
    copied = copy.copy(module)
    inner = _replaced(module._modules[path[0]], path[1:], part)
    copied.__dict__["_modules"] = {**module._modules, path[0]: inner}
    return copied


def _is_capturing(hook: Any) -> bool:
    """Whether a hook is that by which transformers keeps hidden states."""
    return hook.__module__ == "transformers.utils.output_capturing"


def cut_config(config: "PretrainedConfig", depth: int, source: object) -> None:
    """Makes a configuration that of a network which ends after block ``depth`` and never masks a patch.

    Raises:
        InputError: ``source``, as the message calls it, has fewer blocks.
    """
    if depth > config.num_hidden_layers:
        raise InputError(f"level {depth} was asked for, but {str(source)!r} has blocks 1 to {config.num_hidden_layers}")
    config.num_hidden_layers = depth
    if hasattr(config, "use_mask_token"):
        config.use_mask_token = False
    if getattr(config, "stage_names", None):  # transformers' own backbones refuse names of blocks that are gone
        config.stage_names = config.stage_names[: depth + 1]
        config.out_features = config.stage_names[-1:]


_ALONE = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the loading report (what it says of keys is checked and raised here) and the bars.

    One thread at a time: the settings are of the whole process, as are those of torch that loading changes; and
    ``transformers`` is another module when its first import is over, in which threads that waited for it find nothing.
    """
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(_ALONE)
        from transformers.utils import logging

        afterwards.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            afterwards.callback(logging.enable_progress_bar)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
