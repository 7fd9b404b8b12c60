"""What a core does with an image: bytes, the time to decode and crop one for training, and to prepare it either way.

    python -m tests.benchmarks.bench_reading

Training images are those that training/synthetic draws, at RealIAD's resolutions. JPEGs that are prepared exactly and
with ``decode="fast"``, in turn, are the photographs of tests/photos, side by side: as they are, with about as much
detail as a JPEG can have, and enlarged twofold, as a lens that is not quite sharp shows them; and 64 x 64 random
colours, enlarged smoothly. Networks of 224 px.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.images import Preprocessor, list_images, read_image
from tests.training.real_iad_tree import load_real_iad
from training.data.samples import Item, Samples
from training.data.table import read_encoded
from training.references import ReferencePool
from training.settings import PretrainSettings
from training.synthetic.generate import generate

_PHOTOS = Path(__file__).parents[1] / "photos"


def main() -> None:
    """Prints one line for each resolution, and one for each size of JPEGs."""
    torch.set_num_threads(1)
    _print_preparation()
    config = ADPretrainConfig.preset("dinov2-large")
    print("| resolution | bytes of an image | decode | decode, crop |\n|---|---|---|---|")
    for size in (256, 512, 1024):
        with TemporaryDirectory() as folder:
            dataset = load_real_iad(generate(folder, categories=2, normals=4, size=size), resolution=str(size))
            pool = ReferencePool(*(dataset[name] for name in ("category", "view", "is_good")))
            samples = Samples(dataset, range(len(dataset)), config, pool, PretrainSettings())
            encoded = [read_encoded(image) for image in dataset["image"]]
            decode = _seconds(lambda data: read_image(data, "image"), encoded)
            crops = _seconds(samples.__getitem__, [Item(number, 0, 8) for number in range(len(dataset))])
        print(f"| {size} px | {mean(map(len, encoded)) / 1e3:.0f} kB | {1e3 * decode:.1f} ms | {1e3 * crops:.1f} ms |")


def _print_preparation() -> None:
    config = ADPretrainConfig.preset("dinov2-large")
    exact, fast = (Preprocessor(config.replace(decode=how)).prepare for how in ("exact", "fast"))
    print("| JPEG, quality 90 | bytes | exact | fast | ratio |\n|---|---|---|---|---|")
    images = {"1000 x 800, random colours": _colours(1000, 800)}
    for width, height in ((1000, 800), (4000, 3000)):
        images[f"{width} x {height}"] = _photographs(width, height)
        images[f"{width} x {height}, enlarged"] = _photographs(width, height, 2)
    for name, data in images.items():
        times = [(_thread_seconds(exact, data), _thread_seconds(fast, data)) for _ in range(20)]
        slow, quick = (median(column) for column in zip(*times, strict=True))
        cells = (f"{len(data) / 1e3:.0f} kB", f"{1e3 * slow:.1f} ms", f"{1e3 * quick:.1f} ms", f"{slow / quick:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def _photographs(width: int, height: int, scale: int = 1) -> bytes:
    """The photographs of tests/photos, enlarged so many times, side by side, as a JPEG."""
    whole, photographs = Image.new("RGB", (width, height)), cycle(map(Image.open, list_images(_PHOTOS)))
    side = 102 * scale
    for place in product(range(0, width, side), range(0, height, side)):
        whole.paste(next(photographs).resize((side, side), Image.Resampling.BICUBIC), place)
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _colours(width: int, height: int) -> bytes:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _thread_seconds(call: Callable[[Any], object], argument: Any) -> float:
    """Of this thread, whatever else the machine does."""
    start = time.thread_time()
    call(argument)
    return time.thread_time() - start


def _seconds(call: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    start = time.perf_counter()
    for argument in arguments:
        call(argument)
    return (time.perf_counter() - start) / len(arguments)


if __name__ == "__main__":
    main()
