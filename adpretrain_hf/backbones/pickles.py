"""Reading tensors from other people's checkpoints, without running anything that is in them."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import read_safetensors

_EXPECTED = "expected a dictionary of tensors and nothing else, saved by torch.save or as .safetensors"


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads tensors by name from a file of torch.save or a .safetensors.

    The ``state_dict`` of a training checkpoint is taken out of its wrapping.

    Raises:
        InputError: there is no such file, it is damaged, or it holds anything else than tensors by name.
    """
    state = read_safetensors(path)[0] if str(path).endswith(".safetensors") else load_pickle(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: got other things than tensors; {_EXPECTED}")
    return {str(key): value for key, value in state.items()}


def load_pickle(path: str | Path, allowed: Sequence[Any] = ()) -> Any:
    """Reads a file of torch.save; no code in it is ever run.

    Args:
        path: the file.
        allowed: globals that it may name besides PyTorch's own, as ``torch.serialization.safe_globals`` takes them.

    Raises:
        InputError: there is no such file, it is damaged, or it names another global, which the message tells.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; {_EXPECTED}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            # Mapped, because of ImageBind's 4.8 GB the vision trunk is only a half.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        asked = f"it asks for the global {found[1]}" if found else "it is damaged or no pickle of tensors"
        raise InputError(f"{path}: refused, for {asked}; {_EXPECTED}") from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError) as error:  # damaged or foreign
        raise InputError(f"{path}: cannot be read safely ({type(error).__name__}); {_EXPECTED}") from error
