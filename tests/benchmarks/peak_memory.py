"""The peak of this process's memory within a block of code."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """What a block took: megabytes above those in use when it began."""

    megabytes: float = float("nan")


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures resident memory through Linux's own high-water mark; not a number on other systems."""
    peak = Peak()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the block takes what others freed, and seems to take none
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is in use now
    except OSError:
        yield peak
        return
    before = _status("VmRSS")
    yield peak
    peak.megabytes = max(0.0, _status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(match[1]) if match else float("nan")
