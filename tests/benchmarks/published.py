"""The published computation, restated plainly, for benchmarks to compare with: nothing is computed once that could be
computed again. Equal results, not equal speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.projector import Projectors, ResidualProjector


class PublishedProjectors(nn.Module):
    """The projectors with keys and values made from the reference tokens again for every image of a batch.

    Args:
        projectors: whose parameters it uses.
    """

    def __init__(self, projectors: Projectors) -> None:
        super().__init__()
        self.projectors = projectors

    def forward(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Projects L residual maps (B, C, h, w) to L feature maps (B, C, h, w)."""
        return [_project(level, residual) for level, residual in zip(self.projectors, residuals, strict=True)]


def published_residual(features: Tensor, references: Tensor) -> Tensor:
    """Residuals (B, C, h, w) against references (K, C), by a full similarity matrix of normalised copies."""
    tokens = features.flatten(2).transpose(1, 2)  # (B, h*w, C)
    similarity = F.normalize(tokens, dim=2) @ F.normalize(references, dim=1).T
    residual = tokens - references[similarity.argmax(dim=2)]
    return residual.transpose(1, 2).unflatten(2, features.shape[2:])


def _project(level: ResidualProjector, residual: Tensor) -> Tensor:
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
        need_weights=False,
    )
    tokens = tokens - explained.transpose(0, 1)
    tokens = tokens + level.mlp(tokens)
    return tokens.transpose(1, 2).unflatten(2, residual.shape[2:])


def encode_references(encode: object, images: Tensor) -> list[Tensor]:
    """Patches (K, C) of every level of reference images (k, 3, S, S), encoded anew."""
    with torch.no_grad():
        return [level.permute(0, 2, 3, 1).flatten(0, 2) for level in encode(images)]  # type: ignore[operator]
