"""ImageBind-Huge's vision trunk, converted to transformers' ``CLIPVisionModel``; it needs no ImageBind code."""

import math
import re
from pathlib import Path

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from adpretrain_hf.backbones.clip_tower import build_clip_vision_model, rename
from adpretrain_hf.backbones.pickles import read_checkpoint
from adpretrain_hf.errors import InputError

IMAGEBIND_KEYS: tuple[tuple[str, str], ...] = (
    ("modality_preprocessors.vision.cls_token", "embeddings.class_embedding"),
    ("modality_preprocessors.vision.pos_embedding_helper.pos_embed", "embeddings.position_embedding.weight"),
    ("modality_preprocessors.vision.rgbt_stem.proj.1.weight", "embeddings.patch_embedding.weight"),
    ("modality_trunks.vision.pre_transformer_layer.0.{p}", "pre_layrnorm.{p}"),
    ("modality_trunks.vision.blocks.{i}.norm_1.{p}", "encoder.layers.{i}.layer_norm1.{p}"),
    ("modality_trunks.vision.blocks.{i}.attn.in_proj_{p}", "encoder.layers.{i}.self_attn.in_proj.{p}"),
    ("modality_trunks.vision.blocks.{i}.attn.out_proj.{p}", "encoder.layers.{i}.self_attn.out_proj.{p}"),
    ("modality_trunks.vision.blocks.{i}.norm_2.{p}", "encoder.layers.{i}.layer_norm2.{p}"),
    ("modality_trunks.vision.blocks.{i}.mlp.fc1.{p}", "encoder.layers.{i}.mlp.fc1.{p}"),
    ("modality_trunks.vision.blocks.{i}.mlp.fc2.{p}", "encoder.layers.{i}.mlp.fc2.{p}"),
)


def from_imagebind(path: str | Path) -> CLIPVisionModel:
    """Load ImageBind's vision trunk (its ``imagebind_model.py``); the other modalities are ignored.

    Args:
        path: ``imagebind_huge.pth``, or the same tensors as .safetensors; patch kernel (C, 3, 2, p, p), positions
            (1, 1 + h*w, C).

    Raises:
        InputError: the file cannot be read; tensors of the trunk are missing, unknown, or of unexpected shapes.
    """
    tensors, config = _read_trunk(path)
    # An image is repeated over both frames: the two slices of the kernel see the same pixels, and add up.
    kernel = tensors["embeddings.patch_embedding.weight"].sum(2)
    positions = tensors["embeddings.position_embedding.weight"].squeeze(0)
    tensors["embeddings.class_embedding"] = tensors["embeddings.class_embedding"].flatten()
    of_clip = {"embeddings.patch_embedding.weight": kernel, "embeddings.position_embedding.weight": positions}
    return build_clip_vision_model(tensors | of_clip, config)


def imagebind_vision_config(path: str | Path) -> CLIPVisionConfig:
    """Tell the trunk's sizes; of the file's 4.8 GB only the shapes are looked at.

    Args and Raises: as of ``from_imagebind``.
    """
    return _read_trunk(path)[1]


def _read_trunk(path: str | Path) -> tuple[dict[str, Tensor], CLIPVisionConfig]:
    """The trunk's tensors, still in the file, under CLIPVisionModel's names but in ImageBind's shapes; its sizes."""
    ours = ("modality_preprocessors.vision.", "modality_trunks.vision.")
    state = {key: tensor for key, tensor in read_checkpoint(path).items() if key.startswith(ours)}
    depth = len({match[1] for key in state if (match := re.search(r"\.blocks\.(\d+)\.", key))})
    tensors = rename(state, IMAGEBIND_KEYS, max(depth, 1))
    kernel = tensors["embeddings.patch_embedding.weight"]
    positions = tensors["embeddings.position_embedding.weight"]
    grid = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if kernel.ndim != 5 or kernel.shape[2] != 2 or kernel.shape[0] % 16 or grid == 0:
        raise InputError(
            f"got a patch kernel {tuple(kernel.shape)} and positions {tuple(positions.shape)}; expected "
            "(C, 3, 2, p, p), with C a multiple of 16, and (1, 1 + h*w, C): give ImageBind's own file"
        )
    config = CLIPVisionConfig(
        hidden_size=kernel.shape[0],
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=depth,
        num_attention_heads=16,
        patch_size=kernel.shape[-1],
        image_size=grid * kernel.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    return tensors, config
