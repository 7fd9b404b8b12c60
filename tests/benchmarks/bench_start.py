"""How long it takes until the package is there: import against import of torch, and the command line's help.

python -m tests.benchmarks.bench_start
"""

from __future__ import annotations

import subprocess
import sys

from tests.benchmarks.rows import Row, at_most, main
from tests.benchmarks.timing import side_by_side

PROGRAMS = {
    "torch": ["-c", "import torch"],
    "package": ["-c", "import adpretrain_hf"],
    "class": ["-c", "from adpretrain_hf import ADPretrainFeatureExtractor"],
    "help": ["-m", "adpretrain_hf.cli", "--help"],
}


def measure(device: str) -> list[Row]:
    """Seconds of whole processes."""
    runs = (lambda arguments=arguments: _run(arguments) for arguments in PROGRAMS.values())
    torch, package, extractor, help_text = side_by_side(*runs, repeats=7)
    other = f"import torch: {torch:.2f} s"
    return [
        at_most(1.2, "import adpretrain_hf", f"{package:.2f} s", other, package / torch),
        at_most(1.2, "import of ADPretrainFeatureExtractor", f"{extractor:.2f} s", other, extractor / torch),
        at_most(0.3, "adpretrain --help, s", f"{help_text:.3f} s", "one second", help_text),
    ]


def _run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    main(measure, __doc__)
