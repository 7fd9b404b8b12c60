"""Runs the benchmarks, each in a process of its own, and prints one table.

python -m tests.benchmarks [NAME ...] [--device cuda] [--write BENCHMARKS.md]

Every row is a ratio of two things that were measured in turn in the same process, on random weights of the real sizes.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from adpretrain_hf.files import write_text
from tests.benchmarks.rows import HEADER, Row, table

NAMES = (
    "projector", "extraction", "matching", "compaction", "folder", "loading", "start", "precision", "training"
)  # fmt: skip
_BEGIN, _END = "<!-- table begins -->\n", "<!-- table ends -->\n"


def main() -> None:
    """The command; the exit code is 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also put the table into this file")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmarks {unknown}, expected some of {', '.join(NAMES)}")
    text, failed = _run_all(arguments.names or NAMES, arguments.device)
    print(text)
    if arguments.write and not failed:
        _put_between_marks(arguments.write, text)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _run_all(names: tuple[str, ...] | list[str], device: str) -> tuple[str, list[str]]:
    cells: list[tuple[str, ...]] = []
    failed = []
    for number, name in enumerate(names, start=1):
        print(f"{number} of {len(names)}: {name}", file=sys.stderr, flush=True)
        command = f"python -m tests.benchmarks.bench_{name}" + (f" --device {device}" if device != "cpu" else "")
        arguments = [sys.executable, *command.split()[1:], "--json"]
        result = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            failed.append(name)
            continue
        rows = [Row(**values) for values in json.loads(result.stdout.splitlines()[-1])]
        cells += [(*row.cells(), f"`{command}`" if row is rows[0] else "") for row in rows]
    return f"{_machine(device)}\n\n{table(cells, (*HEADER, 'command'))}\n", failed


def _machine(device: str) -> str:
    """What the numbers were measured on."""
    date = datetime.datetime.now(datetime.timezone.utc).date()
    gpu = f", {torch.cuda.get_device_name()}" if device != "cpu" else ""
    cpu = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{date}, {cpu}{gpu}, Python {platform.python_version()}, PyTorch {torch.__version__}"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _put_between_marks(path: Path, text: str) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    write_text(path, f"{before}{_BEGIN}\n{text}\n{_END}{after}")


if __name__ == "__main__":
    main()
