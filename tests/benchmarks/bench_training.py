"""Training: a step beside the published computation, and what the whole program makes of the machine.

    python -m tests.benchmarks.bench_training
    python -m tests.benchmarks.bench_training --device cuda

On a CPU also one process that uses all cores beside two that share them. On a GPU the program trains on photographs of
512 px, from decoding to the optimiser's step, and images/s and the share of the time that the GPU computes are those of
epochs after the first. The parts of a step are shown by ``python -m tests.benchmarks.bench_step``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import harmonic_mean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.bench_step import Bench, time_steps
from tests.benchmarks.random_models import random_vit
from tests.benchmarks.rows import Row, at_least, main
from training.pretrain import begin, train
from training.run.folder import RunFolder
from training.run.reporting import Reporter
from training.settings import PretrainSettings, parse, settings_of
from training.synthetic.generate import generate

CORES = 2
SETTINGS = "--resolution 256 --references 8 --epochs 3 --precision float32 --workers 1 --shots 2"
_PROFILED = 10  # steps
PHOTOS = Path(__file__).parents[1] / "photos"
SMALL = "--levels 2 5 8 --reference-tokens 256 --batch-size 64"
RUNS = [  # what, network, images/s to reach, flags
    ("DINOv2-S, 3 levels, 256 tokens, batch 64", "small", 1500, SMALL),
    ("DINOv2-S, the same, --compile", "small", 1500, f"{SMALL} --compile"),
    ("DINOv2-L, 4 levels, 2,048 tokens, batch 32", "large", 250, "--batch-size 32"),
]


def measure(device: str) -> list[Row]:
    """Networks with random weights: DINOv2-S in steps of 8 and 32 images on a CPU, S and L on a GPU."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if device == "cpu":
            random_vit("small").save_pretrained(folder / "backbone")
            return [*_step(folder, device), _processes(folder, device)]
        data = photographs(folder / "data")
        return [row for run in RUNS for row in _program(folder, data, device, *run)]


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


class Stopwatch(Reporter):
    """Times the steps from ``first`` to ``last``; a profile of ten more tells for how much of a step the GPU works."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        super().__init__(folder, total=10**6)
        self._first, self._last, self.count = first, last, 0
        self.images, self.seconds, self.busy = 0, 0.0, 0.0

    def step(self, losses: Tensor, images: int) -> None:
        """See ``Reporter``."""
        super().step(losses, images)
        self.count += 1
        if self.count in (self._first, self._last):
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds
        if self._first < self.count <= self._last:
            self.images += images
        if self.count == self._last:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        if self.count == self._last + _PROFILED:
            torch.cuda.synchronize()
            self._profile.stop()
            self.busy = busy_seconds(self._profile) / _PROFILED / (self.seconds / (self._last - self._first))


def busy_seconds(profiled: profile) -> float:
    """How long at least one kernel or copy ran; the profiler slows the host down, but not these."""
    events = [event.time_range for event in profiled.events() if event.device_type.name == "CUDA"]
    covered, end = 0.0, 0.0
    for span in sorted(events, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return covered / 1e6


def _program(folder: Path, data: Path, device: str, what: str, size: str, goal: float, more: str) -> list[Row]:
    backbone = folder / size
    random_vit(size).save_pretrained(backbone)
    workers = max(2, (os.cpu_count() or 2) - 2)
    words = f"--data {data} --backbone {backbone} --paint-defects 0.3 --workers {workers} --device {device} {more}"
    flags = [*words.split(), "--tracker", "none", "--shots", "4", "--epochs", "1000"]
    settings = settings_of(PretrainSettings, parse(PretrainSettings, ArgumentParser(), flags))
    run = RunFolder(folder / f"run {what}")
    began = time.perf_counter()
    parts, state = begin(settings, run)
    ready = time.perf_counter() - began
    first = state.steps_per_epoch + 10  # all images are decoded, all kernels chosen
    last = first + (200 if size == "small" else 60)
    state.total_steps = last + _PROFILED
    # Of RealIAD's size an epoch has thousands of steps: what is done between epochs of this one would count for more.
    parts.validation.end_epoch = lambda *arguments: None  # type: ignore[method-assign]
    state.save_checkpoint = lambda *arguments: None  # type: ignore[method-assign]
    watch = Stopwatch(run.path, first, last)
    with watch:
        train(parts, state, watch)
    rate = watch.images / watch.seconds
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return [
        at_least(1, f"training, {what}", f"{rate:.0f} images/s, {peak:.1f} GB", f"goal: {goal} images/s", rate / goal),
        at_least(
            0.85, f"the same, {workers} workers", f"GPU busy {watch.busy:.0%}", f"ready after {ready:.0f} s", watch.busy
        ),
    ]


def photographs(root: Path, categories: int = 4, images: int = 400, side: int = 512) -> Path:
    """Random parts of the test photographs as JPEGs in RealIAD's layout; every tenth has a square defect."""
    sources = [
        str(path) for path in sorted(PHOTOS.rglob("*")) if path.suffix in (".jpg", ".png") and "mask" not in path.stem
    ]
    jobs = [
        (root, f"part{category}", number, sources, side) for category in range(categories) for number in range(images)
    ]
    with ProcessPoolExecutor() as pool:
        items = list(pool.map(_photograph, jobs, chunksize=16))
    (root / "realiad_jsons").mkdir()
    for category in {job[1] for job in jobs}:
        own = [item for item in items if item["category"] == category]
        content = {"meta": {"normal_class": "OK", "prefix": f"{category}/"}, "train": own, "test": []}
        (root / "realiad_jsons" / f"{category}.json").write_text(json.dumps(content))
    return root


def _photograph(job: tuple[Path, str, int, list[str], int]) -> dict[str, str | None]:
    root, category, number, sources, side = job
    random = np.random.default_rng((int(category[4:]), number))
    anomalous = number % 10 == 0
    folder = f"{'NG/AK' if anomalous else 'OK'}/S{number:04}"
    name = f"{folder}/{category}_{number:04}_C1_x"
    path = root / f"realiad_{side}" / category / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(sources[int(category[4:]) % len(sources)]).convert("RGB").resize((side + 64, side + 64))
    left, top = random.integers(64, size=2).tolist()
    pixels = np.array(picture.crop((left, top, left + side, top + side)))
    mask = np.zeros((side, side), np.uint8)
    if anomalous:
        row, column = random.integers(side // 4, side // 2, size=2)
        pixels[row : row + 60, column : column + 60] //= 2
        mask[row : row + 60, column : column + 60] = 255
        Image.fromarray(mask).save(path.with_suffix(".png"))
    Image.fromarray(pixels).save(path, quality=90)
    mask_path = f"{name}.png" if anomalous else None
    kind = "AK" if anomalous else "OK"
    return {"category": category, "anomaly_class": kind, "image_path": f"{name}.jpg", "mask_path": mask_path}


if __name__ == "__main__":
    main(measure, __doc__)
