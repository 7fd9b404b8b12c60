"""The published computation, restated plainly, for benchmarks to compare with.

Keys and values, references and norms are computed again for every image, as there. Equal results, not equal speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.projector import Projectors, ResidualProjector


class PublishedProjectors(nn.Module):
    """The projectors with keys and values made from the reference tokens again for every image of a batch.

    Args:
        projectors: whose parameters it uses.
        need_weights: let the attention return its weights, as ``nn.MultiheadAttention`` does unless it is told not to;
            without them PyTorch takes its fused kernel.
    """

    def __init__(self, projectors: Projectors, need_weights: bool = True) -> None:
        super().__init__()
        self.projectors, self.need_weights = projectors, need_weights

    def forward(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Projects L residual maps (B, C, h, w) to L feature maps (B, C, h, w)."""
        pairs = zip(self.projectors, residuals, strict=True)
        return [_project(level, residual, self.need_weights) for level, residual in pairs]


def published_residual(features: Tensor, references: Tensor) -> Tensor:
    """Residuals (B, C, h, w) against references (K, C), by a full similarity matrix of normalised copies."""
    tokens = features.flatten(2).transpose(1, 2)  # (B, h*w, C)
    similarity = F.normalize(tokens, dim=2) @ F.normalize(references, dim=1).T
    residual = tokens - references[similarity.argmax(dim=2)]
    return residual.transpose(1, 2).unflatten(2, features.shape[2:])


def _project(level: ResidualProjector, residual: Tensor, need_weights: bool) -> Tensor:
    tokens = residual.flatten(2).transpose(1, 2)
    references = level.reference_tokens.expand(len(tokens), -1, -1).contiguous()
    references = level.reference_projection(references).transpose(0, 1)  # (N, B, C)
    attention = level.attention
    explained, _ = F.multi_head_attention_forward(
        tokens.transpose(0, 1),
        references,
        references,
        tokens.shape[2],
        attention.num_heads,
        attention.in_proj_weight,
        attention.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        need_weights=need_weights,
    )
    tokens = tokens - explained.transpose(0, 1)
    tokens = tokens + level.mlp(tokens)
    return tokens.transpose(1, 2).unflatten(2, residual.shape[2:])


def encode_references(encode: Callable[[Tensor], list[Tensor]], images: Tensor) -> list[Tensor]:
    """Patches (K, C) of every level of reference images (k, 3, S, S), encoded anew."""
    with torch.no_grad():
        return [level.permute(0, 2, 3, 1).flatten(0, 2) for level in encode(images)]
