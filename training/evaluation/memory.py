"""Tensors that are looked up instead of computed again, in bounded memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class Memory:
    """Tensors by key, in bounded memory: those that were not asked for longest go first.

    Args:
        capacity: in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._entries: OrderedDict[Hashable, list[Tensor]] = OrderedDict()

    def get(self, key: Hashable) -> list[Tensor] | None:
        """What was put there, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Keeps tensors; larger ones than the capacity are not kept."""
        self._drop(key)
        self._entries[key] = [tensor.clone() for tensor in tensors]  # no view, which would keep a batch
        self._size += _bytes(tensors)
        while self._size > self._capacity:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        self._size -= _bytes(self._entries.pop(key, []))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def look_up(memory: Memory, keys: Sequence[Hashable], compute: Callable[[int], Sequence[Tensor]]) -> list[Tensor]:
    """Feature maps of a batch, looked up or computed.

    Images are computed one by one: what a network makes of one differs in the last bits with the others of its batch,
    and a run that was interrupted should give what one in a piece does. On two cores a ViT-S is no faster in batches.

    Args:
        memory: where they are.
        keys: B of them.
        compute: the place of an image in the batch to its L maps (1, C, h, w).

    Returns:
        L maps (B, C, h, w).
    """
    found = []
    for place, key in enumerate(keys):
        tokens = memory.get(key)
        if tokens is None:
            # As transformers leave them, the channels of a patch beside each other: sums over them keep their order.
            tokens = [level.permute(0, 2, 3, 1).contiguous() for level in compute(place)]
            memory.put(key, tokens)
        found.append(tokens)
    return [torch.cat(level).permute(0, 3, 1, 2) for level in zip(*found, strict=True)]


def exact_digest(tensor: Tensor) -> bytes:
    """The identity of a tensor: of its shape and all its values."""
    digest = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.digest()
