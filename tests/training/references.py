"""Encoders and caches of tiny backbones and random images, in this process and, run as a program, in others.

``python -m tests.training.references BACKBONE IMAGES FOLDER POSITION ...`` fills the cache in FOLDER with the images at
some positions and prints how many of them it encoded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from training.content_keys import content_keys
from training.reference_cache import ReferenceCache
from training.reference_encoding import ReferenceEncoder

ROOT = Path(__file__).parents[2]
SLOT_BYTES = 4 * 16 * 32 * 2  # L, K and C of the tiny backbone at 32 px, float16


def make_encoder(backbone: Path, images: Path, **options: Any) -> ReferenceEncoder:
    """An encoder of the images in a folder, in the order of their names."""
    extractor = ADPretrainFeatureExtractor.from_backbone(
        str(backbone), image_size=32, num_reference_tokens=24, num_heads=4
    )
    paths = sorted(images.iterdir())
    return ReferenceEncoder(extractor, lambda position: extractor.preprocess.prepare(paths[position]).tensor, **options)


def make_cache(backbone: Path, images: Path, encoder: dict[str, Any] | None = None, **options: Any) -> ReferenceCache:
    """A cache of the images in a folder."""
    return ReferenceCache(make_encoder(backbone, images, **(encoder or {})), keys_of(images), **options)


def keys_of(images: Path) -> list[str]:
    """The keys of the images in a folder."""
    return content_keys({"bytes": None, "path": str(path)} for path in sorted(images.iterdir()))


def start_filling(backbone: Path, images: Path, folder: Path, positions: Sequence[int]) -> subprocess.Popen[str]:
    """Another process that fills the same cache."""
    command = [sys.executable, "-m", "tests.training.references", *map(str, (backbone, images, folder, *positions))]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all levels are bit for bit the same."""
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cache = make_cache(Path(sys.argv[1]), Path(sys.argv[2]), folder=sys.argv[3])
    for argument in sys.argv[4:]:  # one by one, so that a signal comes in the middle of writing
        cache.get([int(argument)])
    print(cache.encoded)
