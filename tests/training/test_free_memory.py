"""Free memory: of this machine, and of made-up ones with control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.free_memory import free_memory

MEGABYTE = 1024**2


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with 64 MB free."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {99 * 1024} kB\nMemFree: 7 kB\nMemAvailable:   {64 * 1024} kB\n"
    )
    return tmp_path


def control_group(root: Path, names: tuple[str, str], limit: str, usage: int, statistics: str) -> None:
    for name, text in zip((*names, "memory.stat"), (limit, str(usage), statistics), strict=True):
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


V2 = ("memory.max", "memory.current")


def test_this_machine():
    assert 0 < free_memory() < 2**50


def test_without_control_groups(machine):
    assert free_memory(machine) == 64 * MEGABYTE


def test_a_group_that_has_less_left_than_the_machine(machine):
    control_group(machine, V2, str(40 * MEGABYTE), 30 * MEGABYTE, f"anon 5\ninactive_file {8 * MEGABYTE}")
    assert free_memory(machine) == 18 * MEGABYTE


def test_a_group_without_a_limit(machine):
    control_group(machine, V2, "max", 30 * MEGABYTE, "")
    assert free_memory(machine) == 64 * MEGABYTE


def test_a_group_that_is_full(machine):
    control_group(machine, V2, "1000", 2000, "")
    assert free_memory(machine) == 0


def test_a_group_of_version_1(machine):
    folder = machine / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{20 * MEGABYTE}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{10 * MEGABYTE}\n")
    (folder / "memory.stat").write_text(f"total_inactive_file {MEGABYTE}\n")
    assert free_memory(machine) == 11 * MEGABYTE


def test_a_system_without_proc(tmp_path):
    assert free_memory(tmp_path) > 2**26
