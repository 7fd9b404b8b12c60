"""What copies of the references do to FeatureNorm, class by class of a data set.

python -m tests.benchmarks.bench_augmented realiad=photo_realiad --categories rim soil --seeds 0 1

Of each class the first view is taken (all images of the data set ``folder``): 8 references, drawn as the protocol
few-shot of ``training.evaluate`` draws them, and all other images to test on. Of pixels,
those of every second row and column count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.images import AUGMENTATIONS
from training.data.folders import Category
from training.data.table import Row, seen_mask
from training.evaluation.data import read_category, views
from training.evaluation.draws import Drawn, draw_few_shot
from training.evaluation.metrics import auroc, pixel_metrics
from training.evaluation.plan import Cell

BUNDLE = "hub_cards/adpretrain-dinov2-small"


def main() -> None:
    """Prints image AUROC, pixel AUROC and AUPRO in percent, means over the seeds, and what was chosen automatically."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data_set=folder, e.g. realiad=photo_realiad or folder=tests/photos")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--augmentations", nargs="+", default=[*AUGMENTATIONS, "auto"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--image-size", type=int, help="side in pixels; the bundle's by default")
    arguments = parser.parse_args()
    data_set, root = arguments.data.split("=")
    extractor = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, variant="norm", image_size=arguments.image_size)
    for name in arguments.categories:
        category = read_category(data_set, Path(root), name)
        for augmentation in arguments.augmentations:
            found = [measure(extractor, draw(category, seed), augmentation) for seed in arguments.seeds]
            means = np.mean([metrics for metrics, _ in found], axis=0)
            print(name, augmentation, *(f"{mean:.1f}" for mean in means), *(taken for _, taken in found), flush=True)


def draw(category: Category, seed: int) -> Drawn:
    """The references and the test images of a class."""
    if category.data_set == "folder":
        return Drawn(category.train[:8], (), category.test)
    view = views(category)[0]
    return draw_few_shot(category, Cell("", category.name, "featurenorm", "raw", "", 8, 0.0, 1.0, seed, view))


def measure(extractor: ADPretrainFeatureExtractor, drawn: Drawn, augmentation: str) -> tuple[list[float], str]:
    """Image AUROC, pixel AUROC and AUPRO in percent, and which copies are in the bank."""
    bank = extractor.make_reference(paths(drawn.references), augment_references=augmentation)
    scored = list(extractor.set_reference(bank).score_stream(paths(drawn.test), progress=False))
    masks = [
        seen_mask({"bytes": None, "path": str(sample.mask)}, one.image, extractor.preprocess)
        if sample.mask
        else torch.zeros(one.image.network_size, dtype=torch.bool)
        for sample, one in zip(drawn.test, scored, strict=True)
    ]
    maps = torch.stack([one.anomaly for one in scored])
    labels = np.array([sample.is_anomalous for sample in drawn.test])
    seen, truth = (values[:, ::2, ::2].contiguous().numpy() for values in (maps, torch.stack(masks)))
    of_pixels = pixel_metrics(seen, truth)
    of_images = auroc(np.array([one.score for one in scored]), labels)
    return [100 * value for value in (of_images, *of_pixels)], bank.augmentation or "none"


def paths(samples: Sequence[Row]) -> list[Path]:
    """Where they lie."""
    return [Path(sample.image) for sample in samples]


if __name__ == "__main__":
    main()
