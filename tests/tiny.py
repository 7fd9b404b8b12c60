"""Tiny random vision transformers of every supported family, and extractors made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 8,
    "image_size": 32,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES)),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)),
    "dinov3_vit": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, num_register_tokens=3)),
    "clip_vision_model": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)),
    "siglip_vision_model": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose every parameter matters: none starts at zero or one."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(folder: Path, family: str = "dinov2", seed: int = 0) -> Path:
    """Saves a tiny model as transformers does and returns its folder."""
    tiny_model(family, seed).save_pretrained(folder)
    return folder
