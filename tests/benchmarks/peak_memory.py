"""The peak of memory within a block of code: of this process, or of a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """What a block took: megabytes above those in use when it began, and those."""

    megabytes: float = float("nan")
    began_with: float = float("nan")


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measures what PyTorch allocated on a GPU, or else resident memory.

    The latter through Linux's own high-water mark; not a number on other systems.
    """
    peak, is_cuda = Peak(), torch.device(device).type == "cuda"
    before = peak.began_with = _start_cuda(device) if is_cuda else _start_resident()
    yield peak
    after = torch.cuda.max_memory_allocated(device) / 1e6 if is_cuda else _status("VmHWM")
    peak.megabytes = max(0.0, after - before)


def _start_cuda(device: torch.device | str) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 1e6


def _start_resident() -> float:
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the block takes what others freed, and seems to take none
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is in use now
    except OSError:
        return float("nan")
    return _status("VmRSS")


def _status(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(match[1]) / 1024 if match else float("nan")
