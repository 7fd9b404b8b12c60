"""A folder of JPEGs of up to 2000 px against the bare backbone on ready tensors, and memory for more and more images.

    python -m tests.benchmarks.bench_folder
    python -m tests.benchmarks.bench_folder --device cuda

Decoding and extraction share the cores of a CPU, so a folder costs at least the sum of both; beside a GPU they overlap.
What is left to the cores then is also measured without one, with a network that only hands out ready features.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.images import PreparedBatches
from tests.benchmarks.peak_memory import Peak, peak_memory
from tests.benchmarks.random_models import random_extractor, random_vit, tiny_extractor
from tests.benchmarks.rows import Row, at_least, at_most, main

DIFFERENT, IMAGES, MANY = 100, 1_000, 10_000
CHUNK, BATCH = 100, 16


@torch.no_grad()
def measure(device: str) -> list[Row]:
    """Images per second of 1,000 JPEGs through DINOv2-B, and whether memory grows over 10,000."""
    with TemporaryDirectory() as folder:
        paths = make_jpegs(Path(folder))
        if device != "cpu":
            return _beside_gpu(paths[:IMAGES], device)
        return [*_speed(paths[:IMAGES], device), _beside_nothing(paths[:IMAGES]), _memory(paths)]


def make_jpegs(folder: Path) -> list[Path]:
    """Writes noise of many scales as JPEGs of 400 to 2000 px; each of them is there under a hundred names."""
    random = np.random.default_rng(0)
    for number in range(DIFFERENT):
        width, height = (int(side) for side in random.integers(400, 2001, 2))
        coarse = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (pixels + random.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05}.jpg", quality=90)
    for number in range(DIFFERENT, MANY):
        os.link(folder / f"{number % DIFFERENT:05}.jpg", folder / f"{number:05}.jpg")
    return sorted(folder.glob("*.jpg"))


def _speed(paths: Sequence[Path], device: str) -> list[Row]:
    bare, extractor = random_vit("base", device), random_extractor("base", device)
    ready = torch.randn(BATCH, 3, 224, 224, device=device)
    extractor.set_reference(ready[:8])
    rates: dict[str, list[float]] = {"bare": [], "extract": [], "encode": []}
    bare(pixel_values=ready)
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        rates["bare"].append(_rate(_repeat(bare, ready, 3), 3 * BATCH))
        rates["extract"].append(_rate(partial(_extract, extractor, chunk), len(chunk)))
        if len(rates["encode"]) < 3:
            rates["encode"].append(_rate(partial(extractor.make_reference, chunk), len(chunk)))
        print(f"{start + len(chunk)} of {len(paths)} images", file=sys.stderr)
    alone, whole, encoded = (median(rates[name]) for name in ("bare", "extract", "encode"))
    other = f"bare DINOv2-B on ready tensors: {alone:.2f} images/s"
    return [
        at_least(0.9, f"extract, {len(paths):,} JPEGs", f"{whole:.2f} images/s", other, whole / alone),
        at_least(0.9, "the backbone alone, same JPEGs", f"{encoded:.2f} images/s", other, encoded / alone),
    ]


def _beside_gpu(paths: Sequence[Path], device: str) -> list[Row]:
    """Extraction beside what the threads can decode, and the network alone, in bfloat16."""
    extractor = random_extractor("base", device).to(torch.bfloat16)
    ready = torch.randn(64, 3, 224, 224, device=device)
    extractor.set_reference(ready[:8])
    rates: dict[str, list[float]] = {"decode": [], "extract": [], "network": [], "preprocess": []}
    for _ in range(2):
        for name, rate in zip(("decode", "extract"), _decoded_and_extracted(extractor, paths), strict=True):
            rates[name].append(rate)
        rates["preprocess"].append(_rate(lambda: extractor.preprocess(paths[:400]), 400))
        rates["network"].append(_rate(lambda: _drain(extractor(ready) for _ in range(20)), 20 * 64))
    decode, extract, network, preprocess = (median(rates[name]) for name in rates)
    what, other = (
        f"extract, {len(paths):,} JPEGs, bfloat16",
        f"{len(os.sched_getaffinity(0))} cores that decode: {decode:.0f} images/s",
    )
    return [
        at_least(0.9, what, f"{extract:.0f} images/s", other, extract / min(decode, network)),
        Row("the network alone", f"{network:.0f} images/s", other, network / decode),
        Row("preprocess() of 400", f"{preprocess:.0f} images/s", other, preprocess / decode),
    ]


def _beside_nothing(paths: Sequence[Path]) -> Row:
    """Extraction by a network that takes nothing of the cores, as one on a GPU, beside what the threads can decode."""
    extractor = random_extractor("base").to(torch.bfloat16)
    features = extractor.set_reference(torch.randn(1, 3, 224, 224)).encode(torch.randn(64, 3, 224, 224))
    with (
        patch.object(extractor, "encode", lambda images, **_: [level[: len(images)] for level in features]),
        patch.object(extractor, "residuals", lambda features, *_, **__: features),
        patch.object(extractor.projectors, "forward", lambda residuals, _: residuals),
    ):
        rates = [_decoded_and_extracted(extractor, paths) for _ in range(3)]
    decode, extract = (median(of) for of in zip(*rates, strict=True))
    other = f"{len(os.sched_getaffinity(0))} cores that decode: {decode:.0f} images/s"
    return at_least(0.9, "the same, features ready, bfloat16", f"{extract:.0f} images/s", other, extract / decode)


def _decoded_and_extracted(extractor: ADPretrainFeatureExtractor, paths: Sequence[Path]) -> tuple[float, float]:
    """Images per second that are decoded and thrown away, and whose features come out."""
    decoded = PreparedBatches(paths, extractor.preprocess, 64)
    extracted = extractor.extract(paths, batch_size=64, progress=False)
    return _rate(partial(_drain, decoded), len(paths)), _rate(partial(_drain, extracted), len(paths))


def _repeat(model: Callable[..., object], images: Tensor, times: int) -> Callable[[], None]:
    return lambda: _drain(model(pixel_values=images) for _ in range(times))


def _rate(work: Callable[[], object], images: int) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def _extract(extractor: ADPretrainFeatureExtractor, paths: Sequence[Path]) -> None:
    _drain(extractor.extract(paths, progress=False))


def _drain(results: Iterable[object]) -> None:
    for _ in results:
        pass


def _memory(paths: Sequence[Path]) -> Row:
    extractor = tiny_extractor().set_reference(torch.randn(1, 3, 224, 224))
    _drain(extractor.extract(paths[:DIFFERENT], progress=False))
    results, parts = extractor.extract(paths, progress=False), list[Peak]()
    while len(parts) * IMAGES < len(paths):
        with peak_memory() as peak:
            _drain(islice(results, IMAGES))
        parts.append(peak)
    peaks = [part.began_with - parts[0].began_with + part.megabytes for part in parts]
    # Where the largest images meet is chance, so a single peak is: medians, of parts of one run.
    first, last = median(peaks[: len(peaks) // 2]), median(peaks[len(peaks) // 2 :])
    what = f"peak memory in the second half of {len(paths):,} JPEGs"
    return at_most(1.1, what, f"{last:.0f} MB", f"in the first half: {first:.0f} MB", last / first)


if __name__ == "__main__":
    main(measure, __doc__)
