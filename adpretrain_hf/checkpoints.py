"""Reading tensors from other people's checkpoints, without running anything that is in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adpretrain_hf.errors import InputError

# What damaged and foreign files make torch.load and safetensors raise.
_READING_FAILED = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from a file of torch.save or a .safetensors; no code in a pickle is ever run.

    The ``state_dict`` of a training checkpoint is taken out of its wrapping.

    Raises:
        InputError: there is no such file, it is damaged, or it holds anything else than tensors by name.
    """
    expected = "expected a dictionary of tensors and nothing else, saved by torch.save or as .safetensors"
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; {expected}")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # Mapped, because of ImageBind's 4.8 GB the vision trunk is only a half.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*_READING_FAILED, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read safely ({type(error).__name__}); {expected}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: got other things than tensors; {expected}")
    return {str(key): value for key, value in state.items()}
