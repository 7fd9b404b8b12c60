"""A value derived from parameters, computed once and kept until one of them changes."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ParameterCache(Generic[T]):
    """Keeps what was computed from some parameters for as long as they stay as they were.

    ``load_state_dict``, any other in-place change, and a move to another dtype or device are noticed through the
    version counter of each tensor, and its storage. Fused optimisers do not count versions: nothing is kept while a
    parameter holds a gradient, for it may be about to change. Writing through ``parameter.data`` is not noticed; call
    ``clear`` after that.

    Two threads that find it void at once both compute the same value; neither sees half of one.
    """

    def __init__(self) -> None:
        self._entry: tuple[list[Any], list[Tensor], T] | None = None

    def clear(self) -> None:
        """Forgets the value."""
        self._entry = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are void: what is kept is computed again where it is needed."""
        return type(self), ()

    def get(self, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """Returns the kept value, or computes it, without gradients and in the parameters' own precision."""
        # Inference tensors have no version counter.
        if any(parameter.grad is not None or parameter.is_inference() for parameter in parameters):
            self.clear()
            return _without_gradients(parameters[0], compute)
        state = [(one.data_ptr(), one._version, one.dtype, one.device) for one in parameters]
        entry = self._entry
        if entry is None or entry[0] != state:
            # Holding the storages keeps their addresses from being given to new ones, which would look unchanged.
            storages = [parameter.detach() for parameter in parameters]
            self._entry = entry = (state, storages, _without_gradients(parameters[0], compute))
        return entry[2]


def _without_gradients(parameter: Tensor, compute: Callable[[], T]) -> T:
    # Not an inference tensor, even when first needed inside inference_mode: it may meet autograd later.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
        return compute()
