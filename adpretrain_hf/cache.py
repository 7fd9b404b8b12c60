"""A value derived from parameters, computed once and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

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
        self._entry: tuple[list[Tensor], list[int], T] | None = None

    def clear(self) -> None:
        """Forgets the value."""
        self._entry = None

    def get(self, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """Returns the kept value, or computes it, without gradients and in the parameters' own precision."""
        if any(parameter.grad is not None for parameter in parameters):
            self.clear()
            return _without_gradients(parameters, compute)
        entry = self._entry
        if entry is not None and _unchanged(parameters, entry[0], entry[1]):
            return entry[2]
        versions = [_version(parameter) for parameter in parameters]
        value = _without_gradients(parameters, compute)
        # Holding the storages keeps their addresses from being given to new ones, which would look unchanged.
        self._entry = ([parameter.detach() for parameter in parameters], versions, value)
        return value


def _without_gradients(parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
    # Not an inference tensor, even when first needed inside inference_mode: it may meet autograd later.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(parameters[0].device.type, enabled=False):
        return compute()


def _unchanged(parameters: Sequence[Tensor], kept: Sequence[Tensor], versions: Sequence[int]) -> bool:
    return all(
        parameter.data_ptr() == old.data_ptr()
        and parameter.dtype == old.dtype
        and parameter.device == old.device
        and not parameter.is_inference()  # those have no version counter
        and parameter._version == version
        for parameter, old, version in zip(parameters, kept, versions, strict=True)
    )


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version
