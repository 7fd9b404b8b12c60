"""UniAD's network: reconstructs features without looking at a patch's own neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        jitter_probability: with which a batch is jittered.

    Raises:
        InputError: a grid of a single row or column, a neighbourhood of an even size, or a width that the heads cannot
            share.
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
        jitter_probability: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise InputError(f"got hidden_dim {hidden_dim}, expected a multiple of num_heads, {num_heads}")
        self.grid = grid
        self.jitter_scale = jitter_scale
        self.jitter_probability = jitter_probability
        self.register_buffer("mask", neighbor_mask(grid, neighbor_size), persistent=False)
        places = grid[0] * grid[1]
        layer = (hidden_dim, num_heads, feedforward_dim, dropout)
        self.project_in = nn.Linear(in_channels, hidden_dim)
        self.positions = nn.Parameter(torch.rand(places, hidden_dim))
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(places, *layer) for _ in range(num_layers))
        self.project_out = nn.Linear(hidden_dim, in_channels)
        # Near zero: a linear layer's usual weights make far more of normalised states than features of unit length are,
        # and training would spend its first hundreds of steps on shrinking them.
        nn.init.normal_(self.project_out.weight, std=1e-3)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Reconstructs features (B, in_channels, h, w); in training, from jittered ones.

        Raises:
            InputError: a grid of another size.
        """
        if tuple(features.shape[-2:]) != self.grid:
            raise InputError(f"got features on a grid of {tuple(features.shape[-2:])} patches, expected {self.grid}")
        tokens = features.flatten(2).mT  # (B, h*w, in_channels)
        hidden = self.project_in(self._jitter(tokens) if self.training else tokens)
        for layer in self.encoder:
            hidden = layer(hidden, self.positions, self.mask)
        memory = hidden
        for layer in self.decoder:
            hidden = layer(hidden, memory, self.positions, self.mask)
        return self.project_out(hidden).mT.unflatten(2, self.grid)

    def loss(self, features: Tensor) -> Tensor:
        """Mean squared error of the reconstruction of features (B, in_channels, h, w), a scalar."""
        return F.mse_loss(self(features), features)

    def distances(self, features: Tensor) -> Tensor:
        """Length of the difference between features (B, in_channels, h, w) and their reconstruction: (B, h, w)."""
        return torch.linalg.vector_norm(features - self(features), dim=1)

    def _jitter(self, tokens: Tensor) -> Tensor:
        if torch.rand(()) >= self.jitter_probability:
            return tokens
        deviation = self.jitter_scale * tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1]
        return tokens + deviation * torch.randn_like(tokens)


class EncoderLayer(nn.Module):
    """Attention among the patches, then a feed-forward network, each with a residual and a norm after it."""

    def __init__(self, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = MaskedAttention(hidden_dim, num_heads, dropout)
        self.feed_forward = FeedForward(hidden_dim, feedforward_dim, dropout)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Maps (B, P, D) to (B, P, D)."""
        return self.feed_forward(self.attention(hidden, hidden, positions, mask))


class DecoderLayer(nn.Module):
    """Learned queries ask the encoder's output, and then the layer before."""

    def __init__(self, places: int, hidden_dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(places, hidden_dim))
        self.ask_encoder = MaskedAttention(hidden_dim, num_heads, dropout)
        self.ask_before = MaskedAttention(hidden_dim, num_heads, dropout)
        self.feed_forward = FeedForward(hidden_dim, feedforward_dim, dropout)

    def forward(self, before: Tensor, memory: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Maps the output of the layer before and of the encoder, (B, P, D) each, to (B, P, D)."""
        asked = self.ask_encoder(self.query.expand_as(memory), memory, positions, mask)
        return self.feed_forward(self.ask_before(asked, before, positions, mask))


class MaskedAttention(nn.Module):
    """Attention with positions added to queries and keys, a residual, and a norm after it."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, hidden: Tensor, context: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """From hidden states (B, P, D) to those of the context (B, P, D) that the mask (P, P) leaves to see."""
        attended, _ = self.attention(
            hidden + positions, context + positions, context, attn_mask=mask, need_weights=False
        )
        return self.norm(hidden + self.dropout(attended))


class FeedForward(nn.Module):
    """Two linear layers, a residual, and a norm after it."""

    def __init__(self, hidden_dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_dim, feedforward_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (B, P, D) to (B, P, D)."""
        return self.norm(hidden + self.layers(hidden))


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
    near = []
    for patches, side in zip(grid, size, strict=True):
        reach = min(side, 2 * (patches // 2) - 1) // 2  # else nothing would be left to see from the middle
        place = torch.arange(patches)
        near.append((place[:, None] - place).abs() <= reach)
    rows, columns = near
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid[0] * grid[1], -1)
