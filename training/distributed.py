"""One process or many: what differs is here, so that the loop reads the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

# The first process validates and fills the cache while the others wait.
_PATIENCE = timedelta(hours=6)


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the group that ``torchrun`` describes in the environment; without it, this process is alone."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    # gloo carries what the processes agree on beside the GPUs' work, without waiting for it.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str) -> torch.device:
    """The device of this process: ``name`` if it is given, else its own GPU, else the CPU."""
    if name:
        return torch.device(name)
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def wait_for_all() -> None:
    """Returns when every process has come here."""
    anyone(False)


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in order: (N, ...) -> (world size * N, ...), N the same everywhere.

    Gradients reach this process's own rows alone. With a loss of the gathered rows, the sum of the processes' gradients
    is that of one process with all rows; DistributedDataParallel takes the mean, so the loss is multiplied by their
    number.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)
