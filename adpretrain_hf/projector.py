"""The projectors: what ADPretrain trains, one per level, from residuals to pretrained features."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.cache import ParameterCache
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import tensor_digest

KeysValues = tuple[Tensor, Tensor]  # two of (1, heads, N, C / heads)


class CrossAttention(nn.Module):
    """Multi-head attention of C channels; its parameters are those of ``nn.MultiheadAttention``."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Projects the context (N, C) to keys and values, each (1, heads, N, C / heads)."""
        channels = context.shape[-1]
        key, value = F.linear(context, self.in_proj_weight[channels:], self.in_proj_bias[channels:]).chunk(2, dim=-1)
        return self._split_heads(key), self._split_heads(value)

    def forward(self, tokens: Tensor, keys_values: KeysValues) -> Tensor:
        """Attends from tokens (M, C), of all images at once, and returns (M, C)."""
        channels = tokens.shape[-1]
        query = F.linear(tokens, self.in_proj_weight[:channels], self.in_proj_bias[:channels])
        attended = F.scaled_dot_product_attention(self._split_heads(query), *keys_values)
        return self.out_proj(attended.squeeze(0).transpose(0, 1).flatten(1))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        # Contiguous: on a CPU, attention reads a head's rows 5 to 10 % faster than out of the rows of all heads.
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(0, 1).contiguous().unsqueeze(0)


class SqueezeExcite(nn.Module):
    """A gate per channel from the mean over all tokens: here a projector sees more than one patch at a time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A sixteenth, rounded to a multiple of 8 (timm, make_divisible without its round limit).
        hidden = max(8, (channels // 16 + 4) // 8 * 8)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """The gate (B, 1, D) of tokens (B, T, D)."""
        return self.fc2(F.relu(self.fc1(tokens.mean(dim=1, keepdim=True)))).sigmoid()


class GatedMlp(nn.Module):
    """C -> 4C, squeeze-excite, GELU, 4C -> C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.gate = SqueezeExcite(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (B, T, C) to (B, T, C)."""
        hidden = self.fc1(tokens)
        gate = self.gate(hidden)
        if gate.requires_grad:  # as it does wherever the hidden tokens do
            return self.fc2(F.gelu(hidden * gate))
        # In place: on a CPU two more tensors of 4C channels, new to the process, take as long as what is computed.
        return self.fc2(torch.ops.aten.gelu_(hidden.mul_(gate)))


class ResidualProjector(nn.Module):
    """One level's projector: subtracts what learned reference tokens explain, then a gated MLP (paper, section 3.3).

    ``h = x - attention(x, R)``, ``out = h + mlp(h)``, with R a linear map of N learned tokens. Keys and values of R do
    not depend on the images: without gradients they are computed once per set of weights, and once per batch in
    training. The gate of the MLP averages over all patches, so an output depends on the size of the input.

    A new projector is the identity: the output projection of the attention and the last layer of the MLP start at
    zero. An untrained bundle then already gives the residual features, which detect anomalies, rather than noise, and
    training can only depart from them where the loss asks for it. Both layers receive gradients from the first step.

    Args:
        channels: C.
        num_heads: heads of the cross-attention.
        num_reference_tokens: N.
    """

    def __init__(self, channels: int, num_heads: int, num_reference_tokens: int) -> None:
        super().__init__()
        self.reference_tokens = nn.Parameter(torch.randn(num_reference_tokens, channels))
        self.reference_projection = nn.Linear(channels, channels)
        self.attention = CrossAttention(channels, num_heads)
        self.mlp = GatedMlp(channels)
        for parameter in (*self.attention.out_proj.parameters(), *self.mlp.fc2.parameters()):
            nn.init.zeros_(parameter)
        self._cache: ParameterCache[KeysValues] = ParameterCache()

    def forward(self, residual: Tensor) -> Tensor:
        """Projects one level's residuals (B, C, h, w) to features (B, C, h, w)."""
        b, _, h, w = residual.shape
        # Contiguous: a sum is laid out as its first summand, and on rows that are strided a matrix product is slower.
        tokens = residual.permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # (B*h*w, C)
        tokens = tokens - self.attention(tokens, self.keys_values())
        tokens = tokens.unflatten(0, (b, h * w))
        tokens = tokens + self.mlp(tokens)
        return tokens.transpose(1, 2).unflatten(2, (h, w))

    def keys_values(self) -> KeysValues:
        """Keys and values of the reference tokens, kept for as long as the weights they come from do not change."""
        parameters = [self.reference_tokens, *self.reference_projection.parameters()]
        parameters += [self.attention.in_proj_weight, self.attention.in_proj_bias]
        in_training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if in_training or torch.compiler.is_compiling():
            self._cache.clear()  # what follows may be a step of an optimiser
            return self._compute_keys_values()
        return self._cache.get(parameters, self._compute_keys_values)

    def _compute_keys_values(self) -> KeysValues:
        return self.attention.keys_values(self.reference_projection(self.reference_tokens))


class Projectors(nn.Module):
    """The projectors of all levels; ``projectors[l]`` is level l's, weights are not shared.

    Args:
        config: gives C, the levels, the heads and the number of reference tokens.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.num_heads, config.num_reference_tokens)
        self.levels = nn.ModuleList(ResidualProjector(*sizes) for _ in config.layers)

    def forward(self, residuals: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        """Projects L residual maps (B, C, h, w) to L feature maps (B, C, h, w).

        Args:
            residuals: of all levels, or of some.
            places: which levels they are of, from 0; all by default.

        Raises:
            InputError: not as many maps, or not of C channels.
        """
        levels = list(self) if places is None else [self[place] for place in places]
        channels = self[0].reference_tokens.shape[-1]
        shapes = [tuple(residual.shape) for residual in residuals]
        if len(shapes) != len(levels) or any(len(shape) != 4 or shape[1] != channels for shape in shapes):
            raise InputError(f"got maps of shapes {shapes}, expected {len(levels)} of (B, {channels}, h, w)")
        return [level(residual) for level, residual in zip(levels, residuals, strict=True)]

    def keep(self, places: Sequence[int]) -> None:
        """Drops all levels but some, from 0."""
        self.levels = nn.ModuleList([self[place] for place in places])

    def check_fits(self, config: ADPretrainConfig) -> None:
        """Raises InputError if the levels, width, heads or reference tokens are others than the configuration's."""
        got = [(*level.reference_tokens.shape, level.attention.num_heads) for level in self]
        expected = [(config.num_reference_tokens, config.hidden_size, config.num_heads)] * len(config.layers)
        if got != expected:
            raise InputError(
                f"the projectors' reference tokens, width and heads are {got}, the configuration's are {expected}"
            )

    def digests(self) -> list[bytes]:
        """The ``tensor_digest`` of every tensor; weights that are packed in 8 bits are none."""
        return [tensor_digest(value) for value in self.state_dict().values() if isinstance(value, Tensor)]

    def are_identity(self) -> bool:
        """Whether all are as new: their output is their input."""
        last = (layer for level in self for layer in (level.attention.out_proj, level.mlp.fc2))
        return not any(parameter.any() for layer in last for parameter in layer.parameters())

    def __getitem__(self, level: int) -> ResidualProjector:
        return self.levels[level]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[ResidualProjector]:
        return iter(self.levels)  # type: ignore[arg-type]
