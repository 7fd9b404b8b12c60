"""How long it takes to list RealIAD: python -m tests.benchmarks.bench_real_iad_index --images 150000

Makes a tree of 30 classes with as many tiny files, as folders and as zips, and prints the time that each takes to load.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from tests.training.real_iad_tree import RealIADClass, load_real_iad

CLASSES, VIEWS, CODES = 30, 5, ("AK", "CH", "HS", "ZW")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=150_000, help="about how many (default: 150000)")
    parser.add_argument("--folder", type=Path, help="where to make and leave the tree (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        if not (root / "folders").exists():
            make(root, arguments.images)
        parts = [measure(root / kind) for kind in ("folders", "zips")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{parts[0][0]:,} images, {parts[0][1]:,} masks: {parts[0][2]}, {parts[1][2]}, peak memory {peak:.0f} MB")


def make(root: Path, images: int) -> None:
    """Writes the tree; half of the samples are damaged, and one view of each does not show it."""
    damaged = max(1, round(images / CLASSES / VIEWS / 2 / len(CODES)))
    for number in range(CLASSES):
        made = RealIADClass(
            f"class_{number:02}", views=VIEWS, normals=damaged * len(CODES), codes=CODES, samples=damaged, tiny=True
        )
        made.write_folder(root / "folders")
        made.write_zip(root / "zips")
        for kind in ("folders", "zips"):
            made.write_json(root / kind)


def measure(root: Path) -> tuple[int, int, str]:
    """Images, masks, and the seconds in words."""
    start = time.perf_counter()
    dataset = load_real_iad(root)
    seconds = time.perf_counter() - start
    return len(dataset), sum(dataset["is_anomalous"]), f"{root.name} {seconds:.1f} s"


if __name__ == "__main__":
    main()
