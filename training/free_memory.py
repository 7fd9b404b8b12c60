"""How much memory this process may still take: of the machine, and of the container that it runs in."""

from __future__ import annotations

import os
from pathlib import Path

# Limit, usage, statistics, and the statistic that counts cached files: of version 2 and of version 1 of control groups.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping: the least of what the machine and the control group have left.

    Args:
        root: of the file system whose ``proc`` and ``sys`` are read.
    """
    left = [_machine(root), *(_group(root / "sys/fs/cgroup", *names) for names in _CONTROL_GROUPS)]
    return max(0, min(amount for amount in left if amount is not None))


def _machine(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux: all there is


def _group(folder: Path, limit: str, usage: str, statistics: str, cached: str) -> int | None:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not most.isdigit() or not used.isdigit():  # "max", or no such group
        return None
    fields = dict(line.split() for line in _text(folder / statistics).splitlines() if len(line.split()) == 2)
    return int(most) - int(used) + int(fields.get(cached, 0))  # cached files give way to whoever needs memory


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
