"""Vision towers of open_clip, converted to transformers' ``CLIPVisionModel``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from adpretrain_hf.checkpoints import read_checkpoint
from adpretrain_hf.clip_tower import build_clip_vision_model, rename
from adpretrain_hf.errors import InputError

# Names in the source -> names in CLIPVisionModel; {i} is the block, {p} weight and bias.
# Query, key and value are one `in_proj`, which is split when the model is built.
OPEN_CLIP_KEYS: tuple[tuple[str, str], ...] = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("ln_pre.{p}", "pre_layrnorm.{p}"),
    ("transformer.resblocks.{i}.ln_1.{p}", "encoder.layers.{i}.layer_norm1.{p}"),
    ("transformer.resblocks.{i}.attn.in_proj_{p}", "encoder.layers.{i}.self_attn.in_proj.{p}"),
    ("transformer.resblocks.{i}.attn.out_proj.{p}", "encoder.layers.{i}.self_attn.out_proj.{p}"),
    ("transformer.resblocks.{i}.ln_2.{p}", "encoder.layers.{i}.layer_norm2.{p}"),
    ("transformer.resblocks.{i}.mlp.c_fc.{p}", "encoder.layers.{i}.mlp.fc1.{p}"),
    ("transformer.resblocks.{i}.mlp.c_proj.{p}", "encoder.layers.{i}.mlp.fc2.{p}"),
    ("ln_post.{p}", "post_layernorm.{p}"),
)


@dataclass(frozen=True)
class OpenClipVision:
    """Sizes of an open_clip vision tower; mean and standard deviation of its pixels, which are in [0, 1]."""

    hidden_size: int
    num_hidden_layers: int
    patch_size: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def from_open_clip(arch: str, weights: str | None) -> CLIPVisionModel:
    """Load the vision tower of an open_clip model; its text tower is never built.

    Args:
        arch: an architecture of ``open_clip.list_models()``, such as "ViT-B-16-quickgelu".
        weights: one of its pretrained tags ("openai"), or the path of a checkpoint with open_clip's names. A
            file does not tell its activation: choose an ``arch`` that fits. None: random weights.

    Raises:
        InputError: open_clip is missing; the architecture, tag or file is unknown or cannot be converted; the
            tag's weights are for another activation than the architecture has.
    """
    visual = _build_tower(arch, "cpu" if weights is None else "meta")
    if weights is None:
        return convert_open_clip_tower(visual)
    # Whatever is wrong with the architecture or the tag is found before anything is downloaded.
    tag = _find_tag(arch, weights, _tower_config(visual))
    state = read_checkpoint(_download(tag, weights) if tag else weights)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return _convert_tower(visual, {key[7:]: state[key] for key in state if key.startswith("visual.")})


def convert_open_clip_tower(visual: nn.Module) -> CLIPVisionModel:
    """Convert an ``open_clip.transformer.VisionTransformer``: everything up to the last block, and ``ln_post``.

    Poolers and the projection behind them have no place in a ``CLIPVisionModel``, and are left out.

    Raises:
        InputError: open_clip is missing, or the tower has a part that ``CLIPVisionModel`` cannot express.
    """
    return _convert_tower(visual, visual.state_dict())


def open_clip_vision_config(arch: str, weights: str | None = None) -> OpenClipVision:
    """Tell a tower's sizes and pixel normalisation, without its weights.

    Args:
        arch: as for ``from_open_clip``.
        weights: as for ``from_open_clip``; a few tags have a mean and standard deviation of their own.

    Raises:
        InputError: as for ``from_open_clip``.
    """
    config: Any = _tower_config(_build_tower(arch, "meta"))
    sizes = (config.hidden_size, config.num_hidden_layers, config.patch_size, config.image_size)
    tag = _find_tag(arch, weights, config) if weights else {}
    mean, std = _open_clip().OPENAI_DATASET_MEAN, _open_clip().OPENAI_DATASET_STD
    return OpenClipVision(*sizes, mean=tuple(tag.get("mean", mean)), std=tuple(tag.get("std", std)))


def _open_clip() -> ModuleType:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise InputError(
            f"open_clip cannot be imported ({error}): install it by `pip install adpretrain-hf[open-clip]`"
        ) from error


def _build_tower(arch: str, device: str) -> nn.Module:
    open_clip = _open_clip()
    names = open_clip.list_models()
    if arch not in names:
        close = ", ".join(difflib.get_close_matches(arch, names) or names[:3])
        raise InputError(f"open_clip has no architecture {arch!r}; expected one of list_models(): {close}")
    config = open_clip.get_model_config(arch)
    if "timm_model_name" in config["vision_cfg"]:
        raise _inexpressible(f"{arch}, a timm tower")
    with torch.device(device):
        # Not the public `create_model`: that builds the text tower too, warns of an activation that does not
        # fit only after the download, and resamples a position table of another size without a word.
        return open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], quick_gelu=config.get("quick_gelu", False)
        )


def _find_tag(arch: str, weights: str, config: CLIPVisionConfig) -> dict[str, Any]:
    """open_clip's entry for a pretrained tag; empty for the path of a file."""
    open_clip = _open_clip()
    tag = open_clip.get_pretrained_cfg(arch, weights)
    if not tag and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise InputError(f"{weights!r} is no file and no tag of {arch}; expected a path or one of: {tags}")
    quick = {True: "QuickGELU", False: "GELU"}
    wanted, built = tag.get("quick_gelu", False), config.hidden_act == "quick_gelu"
    if tag and wanted != built:
        other = f"{arch}-quickgelu" if wanted else arch.removesuffix("-quickgelu")
        if other == arch or other not in open_clip.list_models():
            other = "the downloaded file in place of the tag, if you know that it fits"
        raise InputError(f"{weights!r} needs {quick[wanted]}, but {arch} has {quick[built]}: use {other}")
    return tag


def _download(tag: dict[str, Any], name: str) -> str:
    try:
        return _open_clip().download_pretrained(tag)
    except (OSError, RuntimeError) as error:
        raise InputError(f"could not download {name!r} ({error}): give the path of its file") from error


def _inexpressible(part: str) -> InputError:
    return InputError(
        f"CLIPVisionModel cannot express {part}; expected a plain vision transformer with ln_pre and square "
        "images: choose another architecture, such as ViT-B-16-quickgelu"
    )


def _one(what: str, values: Iterable[Any]) -> Any:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        raise _inexpressible(f"unequal {what}: {distinct}")
    return distinct[0]


def _tower_config(visual: Any) -> CLIPVisionConfig:
    """Read every size and option off the built modules, and refuse what has no counterpart."""
    if not isinstance(visual, _open_clip().transformer.VisionTransformer):
        raise _inexpressible(f"a {type(visual).__name__}")
    for obstacle in _obstacles(visual):
        raise _inexpressible(obstacle)
    conv, blocks = visual.conv1, visual.transformer.resblocks
    norms = [visual.ln_pre, *(block.ln_1 for block in blocks), *(block.ln_2 for block in blocks)]
    return CLIPVisionConfig(
        hidden_size=conv.out_channels,
        intermediate_size=_one("MLP widths", (block.mlp.c_fc.out_features for block in blocks)),
        num_hidden_layers=len(blocks),
        num_attention_heads=_one("numbers of heads", (block.attn.num_heads for block in blocks)),
        patch_size=_one("patch sizes and strides", (*conv.kernel_size, *conv.stride)),
        image_size=_one("image height and width", visual.image_size),
        hidden_act=_one("activations", (_activation(block.mlp.gelu) for block in blocks)),
        layer_norm_eps=_one("LayerNorm eps", (norm.eps for norm in norms)),
    )


def _obstacles(visual: Any) -> Iterator[str]:
    """Parts that change the features, and need not show in the names or shapes of the tensors."""
    conv = visual.conv1
    if type(conv) is not nn.Conv2d or conv.padding != (0, 0) or conv.dilation != (1, 1):
        yield f"the patchification {conv}"
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        yield "a tower without ln_pre"
    for block in visual.transformer.resblocks:
        if type(block) is not _open_clip().transformer.ResidualAttentionBlock:
            yield f"a {type(block).__name__}"
        if not isinstance(block.ls_1, nn.Identity) or not isinstance(block.ls_2, nn.Identity):
            yield "LayerScale"
        if type(block.attn) is not nn.MultiheadAttention or block.attn.add_zero_attn:
            yield f"the attention {block.attn}"


def _activation(module: nn.Module) -> str:
    if isinstance(module, _open_clip().transformer.QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise _inexpressible(f"the activation {module}")


def _convert_tower(visual: Any, state: Mapping[str, Tensor]) -> CLIPVisionModel:
    config = _tower_config(visual)
    unused, table = {"proj", "attn_pool", "attn_pool_contrastive"}, OPEN_CLIP_KEYS
    if visual.attn_pool is not None or not isinstance(visual.ln_post, nn.LayerNorm):
        # Behind an attentional pooler ln_post is not for tokens, and has another width.
        unused, table = unused | {"ln_post"}, OPEN_CLIP_KEYS[:-1]
    state = {key: tensor for key, tensor in state.items() if key.split(".")[0] not in unused}
    return build_clip_vision_model(rename(state, table, config.num_hidden_layers), config)
