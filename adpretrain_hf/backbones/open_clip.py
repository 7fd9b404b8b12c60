"""Vision towers of open_clip, converted to transformers' ``CLIPVisionModel``."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from adpretrain_hf.backbones.clip_tower import build_clip_vision_model, rename
from adpretrain_hf.backbones.pickles import read_checkpoint
from adpretrain_hf.backbones.vit import CLIP, Statistics
from adpretrain_hf.errors import InputError

try:
    import open_clip
except ImportError as error:
    raise InputError(
        f"open_clip cannot be imported ({error}): install it by `pip install adpretrain-hf[open-clip]`"
    ) from error

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


def from_open_clip(name: str) -> CLIPVisionModel:
    """Load the vision tower of an open_clip model; its text tower is never built.

    Args:
        name: ``"<arch>/<weights>"``: an architecture of ``open_clip.list_models()``, such as "ViT-B-16-quickgelu", and
            one of its pretrained tags ("openai") or the path of a checkpoint with open_clip's names. A file does not
            tell its activation: choose an architecture that fits.

    Raises:
        InputError: the architecture, tag or file is unknown or cannot be converted; the tag's weights are for another
            activation than the architecture has.
    """
    # Whatever is wrong with the architecture or the tag is found before anything is downloaded.
    visual, weights, tag = _resolve(name)
    try:
        file = open_clip.download_pretrained(tag) if tag else weights
    except (OSError, RuntimeError) as error:
        raise InputError(f"could not download {weights!r} ({error}): give the path of its file") from error
    state = {key.removeprefix("module."): tensor for key, tensor in read_checkpoint(file).items()}
    return convert_open_clip_tower(visual, {key[7:]: state[key] for key in state if key.startswith("visual.")})


def open_clip_vision_config(name: str) -> tuple[CLIPVisionConfig, Statistics]:
    """Tell a tower's sizes and pixel normalisation, without its weights; a few tags have statistics of their own.

    Args and Raises: as of ``from_open_clip``.
    """
    visual, _, tag = _resolve(name)
    return _tower_config(visual), (tuple(tag.get("mean", CLIP[0])), tuple(tag.get("std", CLIP[1])))


def convert_open_clip_tower(visual: Any, state: Mapping[str, Tensor]) -> CLIPVisionModel:
    """Convert an ``open_clip.transformer.VisionTransformer``: everything up to the last block, and ``ln_post``.

    Poolers and the projection behind them have no place in a ``CLIPVisionModel``, and are left out.

    Args:
        visual: the tower, whose sizes and options are read off its modules; it may be on the meta device.
        state: its tensors, by their names in ``visual.state_dict()``.

    Raises:
        InputError: the tower has a part that ``CLIPVisionModel`` cannot express, or the tensors do not fit it.
    """
    config = _tower_config(visual)
    unused, table = {"proj", "attn_pool", "attn_pool_contrastive"}, OPEN_CLIP_KEYS
    if visual.attn_pool is not None or not isinstance(visual.ln_post, nn.LayerNorm):
        # Behind an attentional pooler ln_post is not for tokens, and has another width.
        unused, table = unused | {"ln_post"}, OPEN_CLIP_KEYS[:-1]
    state = {key: tensor for key, tensor in state.items() if key.split(".")[0] not in unused}
    return build_clip_vision_model(rename(state, table, config.num_hidden_layers), config)


def _resolve(name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """The tower without its weights, the name of these, and open_clip's entry for a tag: empty for a file's path."""
    arch, _, weights = name.partition("/")
    if not arch or not weights:
        raise InputError(f"got 'open_clip:{name}', expected open_clip:<arch>/<tag or checkpoint path>")
    visual = _build_tower(arch)
    built = _tower_config(visual).hidden_act == "quick_gelu"
    tag = open_clip.get_pretrained_cfg(arch, weights)
    if not tag and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise InputError(f"{weights!r} is no file and no tag of {arch}; expected a path or one of: {tags}")
    quick = {True: "QuickGELU", False: "GELU"}
    wanted = tag.get("quick_gelu", False)
    if tag and wanted != built:
        other = f"{arch}-quickgelu" if wanted else arch.removesuffix("-quickgelu")
        if other == arch or other not in open_clip.list_models():
            other = "the downloaded file in place of the tag, if you know that it fits"
        raise InputError(f"{weights!r} needs {quick[wanted]}, but {arch} has {quick[built]}: use {other}")
    return visual, weights, tag


def _build_tower(arch: str) -> nn.Module:
    names = open_clip.list_models()
    if arch not in names:
        close = ", ".join(difflib.get_close_matches(arch, names) or names[:3])
        raise InputError(f"open_clip has no architecture {arch!r}; expected one of list_models(): {close}")
    config = open_clip.get_model_config(arch)
    if "timm_model_name" in config["vision_cfg"]:
        raise _inexpressible(f"{arch}, a timm tower")
    with torch.device("meta"):
        # Not the public `create_model`: that builds the text tower too, warns of an activation that does not
        # fit only after the download, and resamples a position table of another size without a word.
        quick = config.get("quick_gelu", False)
        return open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=quick)


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
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        yield f"a {type(visual).__name__}"
    conv = visual.conv1
    if type(conv) is not nn.Conv2d or conv.padding != (0, 0) or conv.dilation != (1, 1):
        yield f"the patchification {conv}"
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        yield "a tower without ln_pre"
    for block in visual.transformer.resblocks:
        if type(block) is not open_clip.transformer.ResidualAttentionBlock:
            yield f"a {type(block).__name__}"
        if not isinstance(block.ls_1, nn.Identity) or not isinstance(block.ls_2, nn.Identity):
            yield "LayerScale"
        if type(block.attn) is not nn.MultiheadAttention or block.attn.add_zero_attn:
            yield f"the attention {block.attn}"


def _activation(module: nn.Module) -> str:
    if isinstance(module, open_clip.transformer.QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise _inexpressible(f"the activation {module}")
