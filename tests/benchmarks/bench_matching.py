"""Matching against many reference images: time and memory, against a full similarity matrix.

python -m tests.benchmarks.bench_matching
"""

from __future__ import annotations

import torch

from adpretrain_hf import ReferenceBank
from tests.benchmarks.peak_memory import peak_memory
from tests.benchmarks.published import published_residual
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side

CHANNELS, PATCHES = 768, 256
IMAGES = (250, 500, 1000)


@torch.no_grad()
def measure(device: str) -> list[Row]:
    """One level of a batch of 8 images against 64,000 to 256,000 patches of 768 channels."""
    torch.manual_seed(0)
    features = torch.randn(8, CHANNELS, 16, 16, device=device)
    patches = torch.randn(IMAGES[-1] * PATCHES, CHANNELS, device=device)
    banks = [ReferenceBank([patches[: images * PATCHES]]) for images in IMAGES]
    *sizes, full = side_by_side(
        *(lambda bank=bank: bank.residuals([features]) for bank in banks),
        lambda: published_residual(features, patches),
        repeats=3,
    )
    with peak_memory(device) as ours:
        residual = banks[-1].residuals([features])[0]
    with peak_memory(device) as theirs:
        expected = published_residual(features, patches)
    equal = float((residual == expected).all(dim=1).float().mean())
    what = f"matching against {IMAGES[-1]:,} reference images"
    steps = [
        Row(f"matching against {n} images", f"{s:.2f} s", f"{IMAGES[0]} images: {sizes[0]:.2f} s", s / sizes[0])
        for n, s in zip(IMAGES[1:], sizes[1:], strict=True)
    ]
    return [
        at_least(1, what, f"{sizes[-1]:.2f} s", f"full matrix: {full:.2f} s", full / sizes[-1]),
        Row("its residuals", "", "full matrix: share of equal ones", equal),
        at_most(
            200, "its peak memory above the bank, in MB", "", f"full matrix: {theirs.megabytes:.0f}", ours.megabytes
        ),
        *steps,
    ]


if __name__ == "__main__":
    main(measure, __doc__)
