"""The device: batches to a GPU and results back from it, without making the GPU wait. On a CPU nothing is copied."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError

Key = TypeVar("Key")
Copy = tuple[list[Tensor], "torch.cuda.Event | None"]  # tensors on the CPU, and what marks that they have arrived


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default the GPU if there is one, and the CPU otherwise.

    Raises:
        InputError: no such device here.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {device} cannot be used: expected cpu, cuda, cuda:1 ... ({reason})") from error


def to_device(images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copies a batch to a device; to a GPU through pinned memory, from which the copy goes on by itself."""
    if device.type == "cuda" and images.device.type == "cpu":
        images = images.contiguous().pin_memory()  # memory that several elements share cannot be pinned
    return images.to(device, dtype, non_blocking=True)


def to_host(
    results: Iterable[tuple[Key, list[Tensor]]], device: torch.device, batch_size: int = 0
) -> Iterator[tuple[Key, list[Tensor]]]:
    """Brings the tensors of every result to the CPU.

    From a GPU each comes when the next has been computed as far as the CPU has to do with it, so that the GPU has work
    while it is copied; but not where results are of one image, for whose next one a live camera may be waited for. What
    came before an error is yielded before the error is raised.

    Args:
        results: keys, and tensors.
        device: where the tensors are.
        batch_size: images of a result, if it is of images.
    """
    behind = 1 if device.type == "cuda" and batch_size != 1 else 0
    return late(((key, begin_copy(tensors)) for key, tensors in results), behind)


def late(copies: Iterable[tuple[Key, Copy]], behind: int) -> Iterator[tuple[Key, list[Tensor]]]:
    """Yields what was copied, each after ``behind`` more copies were begun."""
    waiting: deque[tuple[Key, Copy]] = deque()
    try:
        for copy in copies:
            waiting.append(copy)
            if len(waiting) > behind:
                yield _finish(*waiting.popleft())
    except Exception:
        yield from (_finish(*copy) for copy in waiting)
        raise
    yield from (_finish(*copy) for copy in waiting)


def begin_copy(tensors: list[Tensor]) -> Copy:
    """Begins to copy tensors of one device to the CPU; from all devices but CUDA's it waits until they are there."""
    device = tensors[0].device
    on_cuda = device.type == "cuda"
    copies = [tensor.to("cpu", non_blocking=on_cuda) for tensor in tensors]
    # Of the tensors' device: the current one may be another, whose stream knows nothing of the copies.
    return copies, torch.cuda.current_stream(device).record_event() if on_cuda else None


def _finish(key: Key, copy: Copy) -> tuple[Key, list[Tensor]]:
    tensors, arrived = copy
    if arrived is not None:
        arrived.synchronize()
    return key, tensors
