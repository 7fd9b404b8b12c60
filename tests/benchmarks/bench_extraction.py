"""Whole extraction against the bare backbone, and against the published computation, for DINOv2-L and DINOv2-S.

    python -m tests.benchmarks.bench_extraction
    python -m tests.benchmarks.bench_extraction --device cuda

Beside the same by torch.compile, and on a GPU, in bfloat16, as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.benchmarks.published import PublishedProjectors, encode_references, published_residual
from tests.benchmarks.random_models import random_extractor, random_vit
from tests.benchmarks.rows import Row, at_most, main
from tests.benchmarks.timing import side_by_side
from training.run.graph import graphed

GOALS = {"large": 1.25, "small": 1.8}
GPU_GOALS = {"large": 1.2, "base": 1.3, "small": 1.6}
REPEATS = {"large": 3, "small": 9}


def measure(device: str) -> list[Row]:
    """A batch of 8 at 224 px against 8 reference images, in float32; on a GPU one of 64, in bfloat16."""
    if device == "cpu":
        return [row for size, goal in GOALS.items() for row in _measure_size(size, goal, device)]
    return [row for size, goal in GPU_GOALS.items() for row in _measure_gpu(size, goal, device)]


@torch.no_grad()
def _measure_gpu(size: str, goal: float, device: str) -> list[Row]:
    bare, extractor = random_vit(size, device, torch.bfloat16), random_extractor(size, device).to(torch.bfloat16)
    images, references = torch.randn(2, 64, 3, 224, 224, device=device, dtype=torch.bfloat16)
    extractor.set_reference(references[:8])
    graph, compiled = graphed(lambda images: list(extractor(images).values())), torch.compile(extractor)
    tokens = extractor.encode(images)
    residuals = extractor.residuals(tokens)
    alone, ours, recorded, fused, *parts = side_by_side(
        lambda: bare(pixel_values=images),
        lambda: extractor(images),
        lambda: graph(images),
        lambda: compiled(images),
        lambda: extractor.encode(images),
        lambda: extractor.residuals(tokens),
        lambda: extractor.projectors(residuals),
        repeats=20,
    )
    what = f"extraction, DINOv2-{size[0].upper()}, 224 px, batch 64, 8 references, bfloat16"
    other = f"bare backbone: {1e3 * alone:.1f} ms"
    shares = " / ".join(f"{1e3 * part:.1f}" for part in parts)
    return [
        at_most(goal, what, f"{1e3 * ours:.1f} ms ({64 / ours:.0f} images/s)", other, ours / alone),
        Row("its encoding, matching and projecting, each on its own", f"{shares} ms", other, sum(parts) / alone),
        Row("as a CUDA graph", f"{1e3 * recorded:.1f} ms", other, recorded / alone),
        Row("by torch.compile", f"{1e3 * fused:.1f} ms", other, fused / alone),
    ]


@torch.no_grad()
def _measure_size(size: str, goal: float, device: str) -> list[Row]:
    bare, extractor = random_vit(size, device), random_extractor(size, device)
    images, references = torch.randn(2, 8, 3, 224, 224, device=device)
    extractor.set_reference(references)
    published, compiled = PublishedExtraction(extractor), torch.compile(extractor)
    seconds = side_by_side(
        lambda: bare(pixel_values=images),
        lambda: extractor(images),
        lambda: published(images, references),
        lambda: compiled(images),
        repeats=REPEATS[size],
    )
    alone, ours, theirs, fused = seconds
    what = f"extraction, DINOv2-{size[0].upper()}, 224 px, batch 8, 8 references"
    return [
        at_most(goal, what, f"{ours:.2f} s", f"bare backbone: {alone:.2f} s", ours / alone),
        Row("the published form of it", f"{ours:.2f} s", f"published: {theirs:.2f} s", theirs / ours),
        Row("the same by torch.compile", f"{fused:.2f} s", f"bare backbone: {alone:.2f} s", fused / alone),
    ]


class PublishedExtraction:
    """Encodes the references anew, compares through the whole matrix, projects the reference tokens for every image."""

    def __init__(self, extractor: ADPretrainFeatureExtractor) -> None:
        self.extractor, self.projectors = extractor, PublishedProjectors(extractor.projectors)

    def __call__(self, images: Tensor, references: Tensor) -> list[Tensor]:
        patches = encode_references(self.extractor.encode, references)
        maps = self.extractor.encode(images)
        return self.projectors([published_residual(*pair) for pair in zip(maps, patches, strict=True)])


if __name__ == "__main__":
    main(measure, __doc__)
