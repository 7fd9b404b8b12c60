"""The 8-bit extractor against float32: speed, and image AUROC on classes that the embedded bundle was not trained on.

python -m tests.benchmarks.bench_int8

What 8 bits gain depends on the CPU: most on one with VNNI or AMX instructions, least with AVX2 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.quantization import quantize
from tests.benchmarks.random_models import random_extractor
from tests.benchmarks.rows import Row, at_least, at_most, main
from tests.benchmarks.timing import side_by_side
from training.few_shot import evaluate_features
from training.real_iad import load_real_iad
from training.synthetic.generate import generate

BUNDLE = "hub_cards/adpretrain-dinov2-small"
HELD_OUT = ("bearing", "leather", "plug", "tiles")  # see training/README.md


def measure(device: str) -> list[Row]:
    """Extraction of a batch of 8 at 224 px in the embedded bundle and in DINOv2-B, and FeatureNorm's AUROC."""
    del device  # on a GPU there is no such mode
    return [
        _speed("the embedded bundle", lambda: ADPretrainFeatureExtractor.from_pretrained(BUNDLE)),
        _speed("DINOv2-B", lambda: random_extractor("base")),
        _accuracy(),
    ]


@torch.no_grad()
def _speed(name: str, make: Callable[[], ADPretrainFeatureExtractor]) -> Row:
    extractors = make(), quantize(make())
    images = torch.randn(8, 3, 224, 224)
    for extractor in extractors:
        extractor.set_reference(images.flip(0))
    plain, quantised = side_by_side(*(lambda e=e: e(images) for e in extractors), repeats=7)
    what = f"8-bit extraction, {name}, batch 8"
    return at_least(1.5, what, f"{quantised:.2f} s", f"float32: {plain:.2f} s", plain / quantised)


def _accuracy() -> Row:
    with TemporaryDirectory() as folder:
        dataset = load_real_iad(generate(folder), resolution="256")
        plain, quantised = (
            100
            * mean(
                row["image_auroc"]
                for row in evaluate_features(
                    change(ADPretrainFeatureExtractor.from_pretrained(BUNDLE, variant="norm")),
                    dataset,
                    HELD_OUT,
                    features=["pretrained"],
                    detectors=["FeatureNorm"],
                )
            )
            for change in (lambda extractor: extractor, quantize)
        )
    what = f"its image AUROC on {len(HELD_OUT)} held-out classes, difference"
    return at_most(0.5, what, f"{quantised:.2f}", f"float32: {plain:.2f}", abs(plain - quantised))


if __name__ == "__main__":
    main(measure, __doc__)
