"""The processes of a run, one or many: what differs is here, so that the loop reads the same; and stopping in time."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

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
    # nccl wants a GPU for each process; gloo lets several share one, slowly, which is enough to try things out.
    own_gpus = torch.cuda.is_available() and _local("LOCAL_WORLD_SIZE", 1) <= torch.cuda.device_count()
    if torch.cuda.is_available():
        torch.cuda.set_device(_local("LOCAL_RANK", 0) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo", timeout=_PATIENCE)
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


@contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the others into a block once the first process has left it."""
    if rank() > 0:
        anyone(False)
    yield
    if rank() == 0:
        anyone(False)


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it, and wait for all."""
    return totals(int(flag))[0] > 0


def totals(*numbers: int) -> list[int]:
    """Sums over the processes; all must call it. On the CPU: no GPU is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    return _total(torch.tensor(numbers)).tolist()


def union(own: Sequence[Any]) -> list[Any]:
    """What any process has, in the order of the processes; all must call it."""
    if not dist.is_initialized():
        return list(own)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(own))
    return list(dict.fromkeys(one for part in parts for one in part))


def sharers(of_machine: bool) -> tuple[int, int]:
    """This process's number among those that share a work, and theirs: of this machine alone, or of all."""
    if not of_machine or not dist.is_initialized():
        return rank(), world_size()
    return _local("LOCAL_RANK", 0), _local("LOCAL_WORLD_SIZE", 1)


def broadcast_shares(rows: Tensor, shares: Sequence[Tensor]) -> None:
    """Gives every process the rows that the others have made: those of ``shares[rank]``, each a range of places."""
    for source, places in enumerate(shares if world_size() > 1 else ()):
        if len(places):
            dist.broadcast(rows[places[0] : places[-1] + 1], source)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in order: (N, ...) -> (world size * N, ...), N the same everywhere.

    Gradients reach this process's own rows alone, and only from what this process computes.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def exchange_rows(rows: Tensor) -> Tensor:
    """The same, but this process's rows receive the gradients of what every process computes from them.

    Every process has to call it, and its gradient, in the same order.
    """
    gathered = gather_rows(rows)
    if world_size() > 1 and rows.requires_grad:
        gathered.register_hook(_total)
    return gathered


def sum_of_all(own: Tensor) -> Tensor:
    """The sum over the processes of a tensor; gradients reach this process's summand."""
    if world_size() == 1:
        return own
    return own + (_total(own) - own.detach())


def _total(own: Tensor) -> Tensor:
    total = own.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _local(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


class StopRequest:
    """Takes SIGTERM and SIGINT for as long as a ``with`` block lasts; a second SIGINT interrupts at once.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._over = multiprocessing.Event()

    def __enter__(self) -> "StopRequest":
        self._before = {one: signal.signal(one, self._note) for one in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def leave_to_parent(self, worker: int = 0) -> None:
        """Lets a data worker ignore signals that all processes get, while the loop still needs its last batches."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self._over.is_set() else None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
