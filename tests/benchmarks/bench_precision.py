"""Extraction in bfloat16 and in 8 bits against float32: speed, and image AUROC on classes that were not trained on.

python -m tests.benchmarks.bench_precision

What they gain depends on the CPU: most on one with AMX, least with AVX2, where bfloat16 is slower than float32 and is
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.quantization import quantize
from tests.benchmarks.random_models import random_extractor
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side
from tests.training.real_iad_tree import load_real_iad
from training.evaluation.detectors import FeatureNorm
from training.evaluation.validation import Cell
from training.synthetic.generate import generate

BUNDLE = "hub_cards/adpretrain-dinov2-small"
HELD_OUT = ("bearing", "leather", "plug", "tiles")  # see training/README.md
Change = Callable[[ADPretrainFeatureExtractor], ADPretrainFeatureExtractor]


def measure(device: str) -> list[Row]:
    """Extraction of a batch of 8 at 224 px in the embedded bundle and in DINOv2-B, and FeatureNorm's AUROC."""
    del device  # a GPU has no 8-bit mode here, and bfloat16 is what it is given anyway
    fast: dict[str, Change] = {"8 bits": quantize}
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        fast["bfloat16"] = lambda extractor: extractor.to(torch.bfloat16)
    return [
        *_speed("the embedded bundle", _embedded, fast),
        *_speed("DINOv2-B", lambda: random_extractor("base"), fast),
        *_accuracy(fast),
    ]


def _embedded(variant: str | None = None) -> ADPretrainFeatureExtractor:
    return ADPretrainFeatureExtractor.from_pretrained(BUNDLE, variant=variant, device="cpu", image_size=224)


@torch.no_grad()
def _speed(name: str, make: Callable[[], ADPretrainFeatureExtractor], fast: dict[str, Change]) -> list[Row]:
    images = torch.randn(8, 3, 224, 224)
    extractors = [make(), *(change(make()) for change in fast.values())]
    for extractor in extractors:
        extractor.set_reference(images.flip(0))
    plain, *others = side_by_side(*(lambda e=e: e(images) for e in extractors), repeats=7)
    return [
        at_least(1.5, f"{kind}, {name}, batch 8", f"{seconds:.2f} s", f"float32: {plain:.2f} s", plain / seconds)
        for kind, seconds in zip(fast, others, strict=True)
    ]


def _accuracy(fast: dict[str, Change]) -> list[Row]:
    with TemporaryDirectory() as folder:
        # Three times the images of the table in training/README.md: of few, rounding alone moves AUROC by half a point.
        dataset = load_real_iad(generate(folder, normals=36, defects_per_family=2), resolution="256")
        plain, *others = (
            _image_auroc(change(_embedded("norm")), dataset) for change in (lambda extractor: extractor, *fast.values())
        )
    what = f"image AUROC on {len(HELD_OUT)} held-out classes, difference"
    return [
        at_most(0.5, f"{kind}, {what}", f"{auroc:.2f}", f"float32: {plain:.2f}", abs(plain - auroc))
        for kind, auroc in zip(fast, others, strict=True)
    ]


def _image_auroc(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> float:
    """Of FeatureNorm, in percent: the mean over classes, views and draws of references."""
    views = sorted(set(zip(dataset["category"], dataset["view"], strict=True)))
    scores = []
    for number, view in enumerate(view for view in views if view[0] in HELD_OUT):
        rows = dataset.filter(lambda row, view=view: (row["category"], row["view"]) == view)
        with TemporaryDirectory() as folder:
            cell = Cell.of(extractor, rows, shots=8, seed=number, file=Path(folder) / "tokens.bin")
            assert cell, f"{view} cannot be evaluated"
            scores += [cell.scores(extractor, FeatureNorm, draw)["image_auroc"] for draw in cell.draws]
    return 100 * mean(scores)


if __name__ == "__main__":
    main(measure, __doc__)
