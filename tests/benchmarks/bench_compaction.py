"""Compacting 20,000 patches to 10 % against anomalib's core-set of the same rows.

python -m tests.benchmarks.bench_compaction

The rows are tokens of the embedded bundle's backbone, from images that training/synthetic draws; distances are measured
from rows that neither has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from anomalib.models.components.sampling import KCenterGreedy
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side
from training.synthetic.generate import generate

ROWS, FRACTION, BUNDLE = 20_000, 0.1, "hub_cards/adpretrain-dinov2-small"


@torch.no_grad()
def measure(device: str) -> list[Row]:
    """Time of both, and the mean distance from other rows to the nearest one that was kept."""
    rows = _tokens(device)
    rows, others = rows[:ROWS], rows[ROWS:]
    kept: dict[str, Tensor] = {}

    def keep(name: str, choose: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: kept.update({name: choose()})

    ours, theirs = side_by_side(
        keep("ours", lambda: ReferenceBank([rows]).compact(FRACTION).patches[0]),
        keep("anomalib", lambda: KCenterGreedy(rows, FRACTION).sample_coreset()),
        repeats=3,
    )
    what = f"compaction of {ROWS:,} rows to {FRACTION:.0%}"
    angles, lengths = ({n: float(d(others, k).mean()) for n, k in kept.items()} for d in (_cosine, _euclidean))
    return [
        at_least(3, what, f"{ours:.2f} s", f"anomalib's core-set: {theirs:.2f} s", theirs / ours),
        _compare("distance to the nearest row kept, 1 - cosine", angles),
        _compare("the same, Euclidean", lengths),
    ]


def _compare(what: str, distances: dict[str, float]) -> Row:
    ours, theirs = distances["ours"], distances["anomalib"]
    return at_most(1.02, what, f"{ours:.4f}", f"anomalib's core-set: {theirs:.4f}", ours / theirs)


def _tokens(device: str) -> Tensor:
    extractor = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, device=device, image_size=224)
    with TemporaryDirectory() as folder:
        generate(folder, categories=4, normals=8, size=256)
        paths = sorted(Path(folder).glob("realiad_256/*/OK/**/*.jpg"))
        bank = extractor.make_reference(paths, progress=True)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    return bank.patches[-1][order.to(device)]


def _cosine(rows: Tensor, kept: Tensor) -> Tensor:
    return 1 - (F.normalize(rows, dim=1) @ F.normalize(kept, dim=1).T).amax(dim=1)


def _euclidean(rows: Tensor, kept: Tensor) -> Tensor:
    return torch.cdist(rows, kept).amin(dim=1)


if __name__ == "__main__":
    main(measure, __doc__)
