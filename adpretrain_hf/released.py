"""The names of the released checkpoints' tensors, and ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adpretrain_hf.errors import InputError

# Names inside one projector: in the released checkpoints, here.
_RELEASED_NAMES = {
    "x_ref": "reference_tokens",
    "ref_proj.project.weight": "reference_projection.weight",
    "ref_proj.project.bias": "reference_projection.bias",
    "layers.0.cross_attn.in_proj_weight": "attention.in_proj_weight",
    "layers.0.cross_attn.in_proj_bias": "attention.in_proj_bias",
    "layers.0.cross_attn.out_proj.weight": "attention.out_proj.weight",
    "layers.0.cross_attn.out_proj.bias": "attention.out_proj.bias",
    "layers.0.mlp.fc1.weight": "mlp.fc1.weight",
    "layers.0.mlp.fc1.bias": "mlp.fc1.bias",
    "layers.0.mlp.fc2.weight": "mlp.fc2.weight",
    "layers.0.mlp.fc2.bias": "mlp.fc2.bias",
    "layers.0.mlp.se.fc1.weight": "mlp.gate.fc1.weight",
    "layers.0.mlp.se.fc1.bias": "mlp.gate.fc1.bias",
    "layers.0.mlp.se.fc2.weight": "mlp.gate.fc2.weight",
    "layers.0.mlp.se.fc2.bias": "mlp.gate.fc2.bias",
}


def released_key_map(num_levels: int) -> dict[str, str]:
    """Every key of a released checkpoint's ``projectors`` with its name in ``Projectors.state_dict()``."""
    return {
        f"l{level + 1}_proj.{released}": f"levels.{level}.{ours}"
        for level in range(num_levels)
        for released, ours in _RELEASED_NAMES.items()
    }


def from_released(state_dict: Mapping[str, Tensor], num_levels: int = 4) -> dict[str, Tensor]:
    """Renames the tensors of a released checkpoint; values and precision stay as they are.

    The released modules hold two axes of length 1 that have no meaning (a batch of one, a kernel of one); they go.

    Raises:
        InputError: keys are missing or left over; all are listed.
    """
    names = released_key_map(num_levels)
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise InputError(f"not a released ADPretrain checkpoint: missing {missing}, unexpected {unexpected}")
    return {names[key]: _drop_unit_axis(key, tensor) for key, tensor in state_dict.items()}


def _drop_unit_axis(key: str, tensor: Tensor) -> Tensor:
    if key.endswith("x_ref"):
        return tensor.squeeze(0)
    return tensor.squeeze(-1) if key.endswith("ref_proj.project.weight") else tensor
