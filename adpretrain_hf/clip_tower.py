"""CLIP-shaped vision towers of other libraries as transformers' ``CLIPVisionModel``: the part they share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from adpretrain_hf.errors import InputError


def rename(state: Mapping[str, Tensor], table: tuple[tuple[str, str], ...], depth: int) -> dict[str, Tensor]:
    """Give every tensor its name in CLIPVisionModel; nothing may be missing, nothing left over."""
    pairs = [(row, i, p) for row in table for i in range(depth) for p in ("weight", "bias")]
    names = {source.format(i=i, p=p): target.format(i=i, p=p) for (source, target), i, p in pairs}
    missing = [name for name in names if name not in state]
    unknown = [name for name in state if name not in names]
    if missing or unknown:
        raise InputError(
            f"the vision tensors do not match: missing {_first_ten(missing)}; unknown {_first_ten(unknown)}; "
            f"expected exactly {len(names)}, for {depth} blocks: give the checkpoint of this architecture"
        )
    return {target: state[source] for source, target in names.items()}


def build_clip_vision_model(tensors: Mapping[str, Tensor], config: CLIPVisionConfig) -> CLIPVisionModel:
    """Put tensors, named as in CLIPVisionModel but with ``in_proj`` fused, into a new model in eval mode."""
    norm = tensors["pre_layrnorm.weight"]
    # A trunk may end without a norm, and nothing in this package uses the one that CLIPVisionModel has.
    identity = {"post_layernorm.weight": torch.ones_like(norm), "post_layernorm.bias": torch.zeros_like(norm)}
    tensors = identity | dict(_split_attention(tensors))
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tower: Any = getattr(model, "vision_model", model)  # wrapped once more before transformers 5.6
    _check_shapes(tensors, tower.state_dict())
    # open_clip's half-precision towers keep their norms in float32, but a transformers model has one type.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    # Copies: neither views of a fused tensor, which safetensors will not save, nor a file kept open.
    own = torch.contiguous_format
    copies = {k: t.detach().to(dtype, copy=True, memory_format=own) for k, t in tensors.items()}
    tower.load_state_dict(copies, assign=True)
    # The one buffer that is in no state dict is still on the meta device.
    ids = torch.arange(tower.embeddings.num_positions, device=norm.device)[None]
    tower.embeddings.register_buffer("position_ids", ids, persistent=False)
    return model.eval()


def _split_attention(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if ".in_proj." not in name:
            yield name, tensor
        else:
            parts = (name.replace("in_proj", f"{part}_proj") for part in "qkv")
            yield from zip(parts, tensor.chunk(3), strict=False)


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name].shape or not tensor.is_floating_point()
    ]
    if wrong:
        raise InputError(
            f"tensors of unexpected shape or type: {_first_ten(wrong)}; all must be floating-point: give the "
            "checkpoint of this architecture"
        )


def _first_ten(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more
