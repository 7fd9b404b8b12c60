"""from_pretrained of a DINOv2-L bundle against reading the same bytes and building the modules without weights.

python -m tests.benchmarks.bench_loading

safetensors maps files into memory and reads a page when it is touched. The second comparison reads every byte, as the
check for damaged values has to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.bundle import describe_bundle
from adpretrain_hf.files import check_finite
from adpretrain_hf.projector import Projectors
from tests.benchmarks.peak_memory import peak_memory
from tests.benchmarks.random_models import random_extractor
from tests.benchmarks.rows import Row, at_most, main
from tests.benchmarks.timing import side_by_side


def measure(device: str) -> list[Row]:
    """Seconds with the files in the system's cache, and the peak of memory."""
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        random_extractor("large").save_pretrained(bundle)
        transformers_alone = _of_transformers(bundle)
        calls = (
            lambda: ADPretrainFeatureExtractor.from_pretrained(bundle, device=device),
            lambda: _files_and_modules(bundle),
            lambda: _checked_files_and_modules(bundle),
            transformers_alone,
        )
        ours, mapped, read, backbone = side_by_side(*calls, repeats=5)
        megabytes, weights = _peak_and_size(bundle)
    return [
        at_most(1.5, "from_pretrained, DINOv2-L", f"{ours:.2f} s", f"load_file + meta: {mapped:.2f} s", ours / mapped),
        Row("the same", f"{ours:.2f} s", f"load_file + meta, values checked: {read:.2f} s", ours / read),
        Row(
            "the same",
            f"{ours:.2f} s",
            f"transformers' loading of the backbone alone: {backbone:.2f} s",
            ours / backbone,
        ),
        at_most(1.1, "its peak memory", f"{megabytes:.0f} MB", f"weights: {weights:.0f} MB", megabytes / weights),
    ]


def _files_and_modules(bundle: Path) -> list[dict[str, Tensor]]:
    from transformers import AutoConfig, AutoModel

    tensors = [load_file(path) for path in (bundle / "model.safetensors", bundle / "backbone" / "model.safetensors")]
    with torch.device("meta"):
        AutoModel.from_config(AutoConfig.from_pretrained(bundle / "backbone"))
        Projectors(describe_bundle(bundle)[0])
    return tensors


def _checked_files_and_modules(bundle: Path) -> None:
    for tensors in _files_and_modules(bundle):
        check_finite(str(bundle), tensors)


def _of_transformers(bundle: Path) -> Callable[[], object]:
    from transformers import AutoModel

    return lambda: AutoModel.from_pretrained(bundle / "backbone")


def _peak_and_size(bundle: Path) -> tuple[float, float]:
    with peak_memory() as peak:
        extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, device="cpu")
    return peak.megabytes, sum(p.numel() * p.element_size() for p in extractor.parameters()) / 2**20


if __name__ == "__main__":
    main(measure, __doc__)
