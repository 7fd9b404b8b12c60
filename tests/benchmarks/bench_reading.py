"""What a core does with a training image: bytes, and the time to decode and crop it.

    python -m tests.benchmarks.bench_reading

Images are those that training/synthetic draws, at RealIAD's resolutions; a network input of 224 px.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.images import read_image
from tests.training.real_iad_tree import load_real_iad
from training.data.samples import Item, Samples
from training.data.table import read_encoded
from training.references import ReferencePool
from training.synthetic.generate import generate


def main() -> None:
    """Prints one line for each resolution."""
    torch.set_num_threads(1)
    config = ADPretrainConfig.preset("dinov2-large")
    print("| resolution | bytes of an image | decode | decode, crop |\n|---|---|---|---|")
    for size in (256, 512, 1024):
        with TemporaryDirectory() as folder:
            dataset = load_real_iad(generate(folder, categories=2, normals=4, size=size), resolution=str(size))
            pool = ReferencePool(*(dataset[name] for name in ("category", "view", "is_good")))
            samples = Samples(dataset, range(len(dataset)), config, pool)
            encoded = [read_encoded(image) for image in dataset["image"]]
            decode = _seconds(lambda data: read_image(data, "image"), encoded)
            crops = _seconds(samples.__getitem__, [Item(number, 0, 8) for number in range(len(dataset))])
        print(f"| {size} px | {mean(map(len, encoded)) / 1e3:.0f} kB | {1e3 * decode:.1f} ms | {1e3 * crops:.1f} ms |")


def _seconds(call: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    start = time.perf_counter()
    for argument in arguments:
        call(argument)
    return (time.perf_counter() - start) / len(arguments)


if __name__ == "__main__":
    main()
