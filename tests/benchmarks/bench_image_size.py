"""What a larger image costs: the embedded bundle on one core, its patches, and the size of a bank of 8 images.

python -m tests.benchmarks.bench_image_size
"""

from __future__ import annotations

import time

import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.benchmarks.rows import Row, main

BUNDLE, SIDES, IMAGES = "hub_cards/adpretrain-dinov2-small", (224, 336, 448), 4


def measure(device: str) -> list[Row]:
    """Seconds of scoring one square image against 8; those of one core's work, whatever else runs beside it."""
    torch.set_num_threads(1)
    found = [_measure_side(side, device) for side in SIDES]
    seconds = found[0][0]
    what = "one image on one core, {} px: {:,} patches, a bank of 8 images of {:.1f} MB, {:.1f} in float16"
    rows = []
    for side, (own, count) in zip(SIDES, found, strict=True):
        megabytes = 8 * count * 3 * 384 * 4 / 1e6
        other = f"{SIDES[0]} px: {seconds:.2f} s"
        text = what.format(side, count, megabytes, megabytes / 2)
        rows.append(Row(text, f"{own:.2f} s", other, own / seconds))
    return rows


@torch.no_grad()
def _measure_side(side: int, device: str) -> tuple[float, int]:
    extractor = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, device=device, image_size=side)
    references, images = torch.randn(2, 8, 3, side, side, device=device)
    extractor.set_reference(references)
    extractor.score(images[:1])  # makes what is kept
    start = time.process_time()
    for image in images[:IMAGES].split(1):
        extractor.score(image)
    return (time.process_time() - start) / IMAGES, (side // extractor.config.patch_size) ** 2


if __name__ == "__main__":
    main(measure, __doc__)
