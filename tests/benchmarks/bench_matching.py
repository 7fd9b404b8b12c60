"""Matching against many reference images: time and memory, against a full similarity matrix.

    python -m tests.benchmarks.bench_matching
    python -m tests.benchmarks.bench_matching --device cuda

On a GPU in bfloat16, against the same values in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from adpretrain_hf import ReferenceBank
from adpretrain_hf.matching import nearest_reference, to_rows
from tests.benchmarks.peak_memory import peak_memory
from tests.benchmarks.published import published_residual
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side

CHANNELS, PATCHES = 768, 256
IMAGES = (250, 500, 1000)


def measure(device: str) -> list[Row]:
    """One level of a batch of 8 images against 64,000 to 256,000 patches of 768 channels; on a GPU 32, of 1024."""
    return _measure_cpu(device) if device == "cpu" else _measure_gpu(device)


@torch.no_grad()
def _measure_gpu(device: str) -> list[Row]:
    torch.manual_seed(0)
    references = torch.randn(IMAGES[-1] * PATCHES, 1024, device=device, dtype=torch.bfloat16)
    features = torch.randn(32, 1024, 16, 16, device=device, dtype=torch.bfloat16)
    halves, floats = ReferenceBank([references]), ReferenceBank([references.float()])
    exact, queries = features.float(), to_rows(features)
    ours, before = side_by_side(lambda: halves.residuals([features]), lambda: floats.residuals([exact]), repeats=5)
    with peak_memory(device) as peak:
        halves.residuals([features])
    chosen, right = (
        nearest_reference(*rows) for rows in ((queries, references), (queries.float(), references.float()))
    )
    similarities = [F.cosine_similarity(queries.float(), references[index].float()) for index in (chosen, right)]
    farther = float((similarities[1] - similarities[0]).max())
    what = "matching of 32 images, 1,024 channels, 256,000 patches, bfloat16, one level"
    return [
        at_least(5, what, f"{1e3 * ours:.1f} ms", f"in float32: {1e3 * before:.1f} ms", before / ours),
        at_least(0.999, "its choice", "", "in float32: share of equal ones", float((chosen == right).float().mean())),
        at_most(1e-3, "the others", "", "in float32: farther by a cosine of at most", farther),
        Row("its peak memory above the bank", f"{peak.megabytes:.0f} MB", "", peak.megabytes),
    ]


@torch.no_grad()
def _measure_cpu(device: str) -> list[Row]:
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
