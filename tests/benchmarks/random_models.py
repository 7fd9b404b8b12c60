"""Extractors of real sizes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from adpretrain_hf import ADPretrainConfig, ADPretrainFeatureExtractor
from adpretrain_hf.backbones import Backbone
from training.run.state import initialise

SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def random_vit(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Dinov2Model:
    """DINOv2 of a published size, as transformers makes it."""
    channels, depth = SIZES[size]
    model = _vit(hidden_size=channels, num_hidden_layers=depth, num_attention_heads=channels // 64)
    return nn.Module.to(model, device, dtype)


def random_extractor(size: str, device: str = "cpu") -> ADPretrainFeatureExtractor:
    """The preset of that size; projectors are no identity, which any computation gets right."""
    config = ADPretrainConfig.preset(f"dinov2-{size}")
    extractor = ADPretrainFeatureExtractor(config, Backbone(random_vit(size), config.layers))
    initialise(extractor.projectors, 1.0)
    return extractor.to(device)


def tiny_extractor() -> ADPretrainFeatureExtractor:
    """One that costs next to nothing, where the subject is what goes on around the network."""
    config = ADPretrainConfig.preset("dinov2-small").replace(
        hidden_size=32, layers=(2, 4), residual_scale=(1.0, 1.0), resize_mode="crop"
    )
    return ADPretrainFeatureExtractor(config, Backbone(_vit(**TINY), config.layers))


def _vit(**sizes: int) -> Dinov2Model:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"image_size": 518, "patch_size": 14, "attn_implementation": "sdpa", **sizes}
    config = Dinov2Config(**settings)
    return Dinov2Model(config).eval().requires_grad_(False)
