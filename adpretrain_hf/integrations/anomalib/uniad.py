"""UniAD: reconstructs features without looking at a patch's own neighbourhood."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MLP

from adpretrain_hf.errors import InputError


class UniadModel(nn.Module):
    """A transformer that reconstructs normal features, of any category, and cannot copy anomalous ones.

    You et al., "A Unified Model for Multi-class Anomaly Detection" (NeurIPS 2022), section 3: attention that is masked
    around each patch, so that a patch is told by others only; a decoder that asks with learned queries in every layer;
    and features that are jittered in training while the clean ones are the target. Defaults are the paper's. Two things
    are not: the output starts near zero, and each patch has a learned position of its own.

    Args:
        in_channels: of the features, all levels joined.
        grid: h and w, patches of an image.
        hidden_dim: width of the transformer, a multiple of ``num_heads``.
        num_heads, feedforward_dim, dropout: of every layer.
        num_layers: of the encoder, and of the decoder.
        neighbor_size: height and width, odd numbers, of the neighbourhood that a patch does not see. A side that would
            cover all rows, or all columns, from the middle of the grid is cut to the largest that does not.
        jitter_scale: the noise of a patch with the length l has the standard deviation ``jitter_scale * l /
            in_channels`` in every channel.

    Raises:
        InputError: a single row or column, a neighbourhood of an even size, or a width that the heads cannot share.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        grid: tuple[int, int],
        *,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 4,
        feedforward_dim: int = 1024,
        neighbor_size: tuple[int, int] = (7, 7),
        jitter_scale: float = 20.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise InputError(f"got hidden_dim {hidden_dim}, expected a multiple of num_heads, {num_heads}")
        self.grid, self.jitter_scale = grid, jitter_scale
        self.register_buffer("mask", neighbor_mask(grid, neighbor_size), persistent=False)
        layer = (hidden_dim, num_heads, feedforward_dim, dropout)
        self.project_in = nn.Linear(in_channels, hidden_dim)
        self.positions = nn.Parameter(torch.rand(grid[0] * grid[1], hidden_dim))
        self.encoder = nn.ModuleList(MaskedLayer(1, *layer) for _ in range(num_layers))
        self.queries = nn.Parameter(torch.randn(num_layers, grid[0] * grid[1], hidden_dim))
        self.decoder = nn.ModuleList(MaskedLayer(2, *layer) for _ in range(num_layers))
        self.project_out = nn.Linear(hidden_dim, in_channels)
        # Near zero: a linear layer's usual weights make far more of normalised states than features of unit length are,
        # and training would spend its first hundreds of steps on shrinking them.
        nn.init.normal_(self.project_out.weight, std=1e-3)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps (B, H, W) of what could not be reconstructed of the features (B, C, h, w) of the levels, up-sampled."""
        features = torch.cat([*levels], dim=1)
        distances = torch.linalg.vector_norm(features - self.reconstruct(features), dim=1, keepdim=True)
        return F.interpolate(distances, size=size, mode="bilinear", align_corners=False)[:, 0]

    def loss(self, levels: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the reconstruction of the features (B, C, h, w) of the levels, a scalar."""
        features = torch.cat([*levels], dim=1)
        return F.mse_loss(self.reconstruct(features), features)

    def reconstruct(self, features: Tensor) -> Tensor:
        """Reconstructs features (B, in_channels, h, w) of all levels, joined; in training, from jittered ones.

        Raises:
            InputError: a grid of another size.
        """
        if tuple(features.shape[-2:]) != self.grid:
            raise InputError(f"got features on a grid of {tuple(features.shape[-2:])} patches, expected {self.grid}")
        tokens = features.flatten(2).mT  # (B, h*w, in_channels)
        hidden = self.project_in(self._jitter(tokens) if self.training else tokens)
        for layer in self.encoder:
            hidden = layer(hidden, [hidden], self.positions, self.mask)
        memory = hidden
        for layer, query in zip(self.decoder, self.queries, strict=True):
            hidden = layer(query.expand_as(memory), [memory, hidden], self.positions, self.mask)
        return self.project_out(hidden).mT.unflatten(2, self.grid)

    def _jitter(self, tokens: Tensor) -> Tensor:
        deviation = self.jitter_scale * tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
        return tokens + deviation * torch.randn_like(tokens)


class MaskedLayer(nn.Module):
    """Attention to one context after another, then a feed-forward network, each with a residual and a norm after it.

    torch's own layers cannot be it: positions are added to queries and keys, but not to values and the residual.

    Args:
        contexts: how many. An encoder's is the states themselves; a decoder asks the encoder and the layer before.
        hidden_dim, num_heads, feedforward_dim, dropout: see ``UniadModel``.
    """

    def __init__(self, contexts: int, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        attentions = [nn.MultiheadAttention(hidden_dim, num_heads, dropout, batch_first=True) for _ in range(contexts)]
        self.attentions = nn.ModuleList(attentions)
        self.feed_forward = MLP(hidden_dim, [feedforward_dim, hidden_dim], dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(contexts + 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, contexts: Sequence[Tensor], positions: Tensor, mask: Tensor) -> Tensor:
        """From hidden states (B, P, D) to those of the contexts (B, P, D) that the mask (P, P) leaves to see."""
        for attention, norm, context in zip(self.attentions, self.norms, contexts, strict=False):
            keys = context + positions
            attended, _ = attention(hidden + positions, keys, context, attn_mask=mask, need_weights=False)
            hidden = norm(hidden + self.dropout(attended))
        return self.norms[-1](hidden + self.feed_forward(hidden))


def neighbor_mask(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """For each patch of a grid (h, w) which others it does not see: (h*w, h*w), bool, True in its neighbourhood.

    Raises:
        InputError: see ``UniadModel``.
    """
    if min(grid) < 2 or any(side % 2 == 0 for side in size):
        raise InputError(
            f"got a grid of {grid} patches and a neighbourhood of {size}, expected at least 2 rows and columns, and a "
            "neighbourhood of odd sides"
        )
    # Cut, or nothing would be left to see from the middle.
    sides = [min(side, 2 * (patches // 2) - 1) for patches, side in zip(grid, size, strict=True)]
    places = torch.cartesian_prod(*map(torch.arange, grid))  # (h*w, 2)
    return ((places[:, None] - places).abs() <= torch.tensor(sides) // 2).all(dim=-1)
