"""CLIP-shaped vision towers of other libraries as transformers' ``CLIPVisionModel``: the part they share.

Their tables of names have rows (name in the source, name in CLIPVisionModel); {i} is the block, {p} weight and bias.
Query, key and value are one ``in_proj`` in both, which is split when the model is built.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from adpretrain_hf.files import check_fit, check_names


def rename(state: Mapping[str, Tensor], table: tuple[tuple[str, str], ...], depth: int) -> dict[str, Tensor]:
    """Give every tensor its name in CLIPVisionModel; nothing may be missing, nothing left over."""
    pairs = [(row, i, p) for row in table for i in range(depth) for p in ("weight", "bias")]
    names = {source.format(i=i, p=p): target.format(i=i, p=p) for (source, target), i, p in pairs}
    check_names("the vision tensors do not match", state, names, advice=f"give the checkpoint of these {depth} blocks")
    return {target: state[source] for source, target in names.items()}


def build_clip_vision_model(tensors: Mapping[str, Tensor], config: CLIPVisionConfig) -> CLIPVisionModel:
    """Put tensors, named as in CLIPVisionModel but with ``in_proj`` fused, into a new model in eval mode."""
    norm = tensors["pre_layrnorm.weight"]
    # A trunk may end without a norm, and nothing in this package uses the one that CLIPVisionModel has.
    identity = {"post_layernorm.weight": torch.ones_like(norm), "post_layernorm.bias": torch.zeros_like(norm)}
    # Of in_proj three tensors; any other is its own only piece, and its name stays.
    tensors = identity | {
        name.replace("in_proj", f"{part}_proj"): piece
        for name, tensor in tensors.items()
        for part, piece in zip("qkv", tensor.chunk(3) if ".in_proj." in name else [tensor], strict=False)
    }
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    check_fit("the vision tensors do not fit", tensors, model.state_dict(), "give the checkpoint of this architecture")
    # open_clip's half-precision towers keep their norms in float32, but a transformers model has one type.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    # Copies: neither views of a fused tensor, which safetensors will not save, nor a file kept open.
    own = torch.contiguous_format
    copies = {k: t.detach().to(dtype, copy=True, memory_format=own) for k, t in tensors.items()}
    model.load_state_dict(copies, assign=True)
    # The one buffer that is in no state dict is still on the meta device.
    ids = torch.arange(model.embeddings.num_positions, device=norm.device)[None]
    model.embeddings.register_buffer("position_ids", ids, persistent=False)
    return model.eval()
