"""A training step against the published form of it, and two processes against one on the same cores.

python -m tests.benchmarks.bench_training

The parts of a step are shown by ``python -m tests.benchmarks.bench_step``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import harmonic_mean
from tempfile import TemporaryDirectory

from tests.benchmarks.bench_step import Bench, time_steps
from tests.benchmarks.random_models import random_vit
from tests.benchmarks.rows import Row, at_least, main
from training.synthetic.generate import generate

CORES = 2
SETTINGS = "--resolution 256 --references 8 --epochs 3 --precision float32 --workers 1 --shots 2"


def measure(device: str) -> list[Row]:
    """DINOv2-S with random weights, 8 references for each image; steps of 8 images, runs with steps of 32."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_vit("small").save_pretrained(folder / "backbone")
        return [*_step(folder, device), _processes(folder, device)]


def _step(folder: Path, device: str) -> list[Row]:
    bench = Bench(str(folder / "backbone"), folder, 8, references=8, tokens=2048, precision="float32", device=device)
    clocks, _ = time_steps(bench, repeats=3)
    ours, published, fused = (clock.total() for clock in clocks.values())
    what = "training step, DINOv2-S, batch 8, 8 references"
    return [
        at_least(4, what, f"{ours:.2f} s", f"published: {published:.2f} s", published / ours),
        Row(what, f"{ours:.2f} s", f"published, fused attention: {fused:.2f} s", fused / ours),
    ]


def _processes(folder: Path, device: str) -> Row:
    data = generate(folder / "images", categories=3, normals=6, size=256)
    alone = [sys.executable, "-m"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    one = _images_per_second(alone, CORES, folder / "one", folder, data, device)
    two = _images_per_second(together, CORES // 2, folder / "two", folder, data, device)
    return at_least(
        1, "training, 2 processes of 1 core", f"{two:.2f} images/s", f"1 process of 2: {one:.2f} images/s", two / one
    )


def _images_per_second(program: list[str], threads: int, run: Path, folder: Path, data: Path, device: str) -> float:
    """Of the steps of all epochs."""
    validation = sorted(path.name for path in (data / "realiad_256").iterdir())[0]
    settings = [*SETTINGS.split(), "--validation-categories", validation, "--device", device]
    subprocess.run(
        [*program, "training.pretrain", "--data", data, "--backbone", folder / "backbone", *settings, "--output", run],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.DEVNULL,
    )
    epochs = json.loads((run / "metrics.json").read_text())["epochs"]
    return harmonic_mean(epoch["images_per_second"] for epoch in epochs)


if __name__ == "__main__":
    main(measure, __doc__)
