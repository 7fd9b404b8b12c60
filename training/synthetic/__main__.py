"""Draws the synthetic data set, and a contact sheet of it:

python -m training.synthetic OUTPUT [--categories 24] [--normals 12] [--seed 0] [--size 256]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adpretrain_hf.errors import run_program
from training.synthetic.generate import SIZE, SIZES, generate
from training.synthetic.overview import draw_overview


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code, see ``run_program``."""
    parser = argparse.ArgumentParser(
        prog="python -m training.synthetic", description="Draws the synthetic data set, and a contact sheet of it."
    )
    parser.add_argument("output", type=Path, help="folder that gets the data set")
    parser.add_argument("--categories", type=int, default=24, help="number of classes (default 24)")
    parser.add_argument("--normals", type=int, default=12, help="normal samples of each class (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument("--size", type=int, default=SIZE, choices=SIZES, help="side of the images in px (default 256)")
    given = parser.parse_args(arguments)

    def run() -> int:
        generate(given.output, categories=given.categories, normals=given.normals, seed=given.seed, size=given.size)
        print(draw_overview(given.output, given.size))
        return 0

    return run_program("synthetic", run)


if __name__ == "__main__":
    sys.exit(main())
