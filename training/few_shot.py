"""Comparing features with a few references: how well detectors do on each, on categories that nothing was trained on.

A cell is one category and view. For each seed some of its normal images are drawn as references; detectors are fitted
on their features, each taken against the others, and tested on all other images of the cell against all references.
Every image is encoded once, and all kinds of features are made of its tokens.

    python -m training.few_shot hub_cards/adpretrain-dinov2-small --data realiad --categories toy zipper \\
        --variants angle norm --output results.json

prints a Markdown table. With two variants, PatchCore and PaDiM take the first, FeatureNorm the second. Where other
programs compute on the same cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin can make it several times slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from adpretrain_hf.cli import Values
from adpretrain_hf.errors import InputError, run_program
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import write_text
from training.detectors import Detector, FeatureNorm, Padim, PatchCore
from training.few_shot_cells import EncodedCell, encode_cells, find_cells
from training.few_shot_features import FEATURES, MakeFeatures, feature_maker
from training.few_shot_summary import markdown_table, summarise
from training.metrics import image_auroc, pixel_metrics
from training.real_iad import load_real_iad

__all__ = ["DETECTORS", "FEATURES", "encode_cells", "evaluate_features", "find_cells", "score_cells", "summarise"]

Row = dict[str, Any]  # category, view, seed, features, detector, image_auroc, pixel_auroc, aupro

DETECTORS: dict[str, Callable[[], Detector]] = {"PatchCore": PatchCore, "PaDiM": Padim, "FeatureNorm": FeatureNorm}
_MEANINGLESS = ("unit raw", "FeatureNorm")  # all lengths are 1
_IMAGES = 64  # whose features are in memory at a time


def evaluate_features(
    extractor: ADPretrainFeatureExtractor,
    dataset: Dataset,
    categories: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    features: Sequence[str] = FEATURES,
    detectors: Sequence[str] = tuple(DETECTORS),
    shots: int = 8,
    progress: bool = True,
) -> list[Row]:
    """Scores kinds of features under detectors, one cell in memory at a time.

    Where the same cells are scored again and again, keep ``list(encode_cells(...))`` and call ``score_cells``.

    Args:
        extractor: its backbone encodes, its projectors make ``"pretrained"`` features.
        dataset: with the columns of ``load_real_iad``.
        categories: to test on.
        seeds: one draw of references each.
        features: some of ``FEATURES``.
        detectors: some of ``DETECTORS``.
        shots: references of a draw.
        progress: show a bar.

    Returns:
        One row for each cell, seed, kind of features and detector, metrics in [0, 1]. Unit raw tokens are not scored by
        FeatureNorm: all their lengths are 1.

    Raises:
        InputError: an unknown category, kind of features or detector, no seeds, fewer than 2 shots, or features that
            are not finite.
        ImageError: an image cannot be read.
    """
    cells = find_cells(dataset, categories, shots)
    encoded = encode_cells(extractor, dataset, cells, seeds=seeds, shots=shots)
    bar = tqdm(encoded, total=len(cells), unit="cell", desc="few-shot", disable=not progress)
    return score_cells(extractor, bar, features=features, detectors=detectors)


def score_cells(
    extractor: ADPretrainFeatureExtractor,
    cells: Iterable[EncodedCell],
    *,
    features: Sequence[str] = FEATURES,
    detectors: Sequence[str] = tuple(DETECTORS),
) -> list[Row]:
    """Scores cells that are encoded; see ``evaluate_features``."""
    makers = {kind: feature_maker(kind, extractor) for kind in features}
    unknown = [name for name in detectors if name not in DETECTORS]
    if unknown:
        raise InputError(f"unknown detectors {unknown}: expected some of {', '.join(DETECTORS)}")
    return [
        {"category": cell.cell.category, "view": cell.cell.view, "seed": seed, "features": kind} | row
        for cell in cells
        for seed in cell.draws
        for kind, make in makers.items()
        for row in _score(cell, seed, make, [name for name in detectors if (kind, name) != _MEANINGLESS])
    ]


@torch.no_grad()
def _score(cell: EncodedCell, seed: int, make: MakeFeatures, detectors: Sequence[str]) -> list[Row]:
    fitted = {name: DETECTORS[name]() for name in detectors}
    normal = _finite(make(cell, seed, cell.draws[seed]), cell)
    for detector in fitted.values():
        detector.fit(normal)
    test = cell.test_images(seed)
    maps: dict[str, list[Tensor]] = {name: [] for name in detectors}
    for images in test.split(_IMAGES):
        features = _finite(make(cell, seed, images), cell)
        for name, detector in fitted.items():
            maps[name].append(detector.score_maps(features, (cell.masks.shape[1], cell.masks.shape[2])).cpu())
    return [{"detector": name} | _metrics(cell, test, torch.cat(parts)) for name, parts in maps.items()]


def _finite(features: list[Tensor], cell: EncodedCell) -> list[Tensor]:
    if not all(level.sum(dtype=torch.float64).isfinite() for level in features):
        raise InputError(
            f"features of {cell.cell.category} {cell.cell.view} hold NaN or infinite values: have the weights diverged?"
        )
    return features


def _metrics(cell: EncodedCell, test: Tensor, maps: Tensor) -> dict[str, float]:
    pixels = pixel_metrics(maps, cell.masks[test])
    images = image_auroc(maps.amax(dim=(1, 2)), cell.is_anomalous(test))
    return {"image_auroc": images, "pixel_auroc": pixels.auroc, "aupro": pixels.aupro}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns the exit code, see ``run_program``."""
    parser = _parser()
    args = parser.parse_args(argv)
    if len(args.variants) > 2:
        parser.error(f"--variants: got {','.join(args.variants)!r}, expected one or two names, e.g. angle norm")

    def run() -> int:
        rows = _compare(args)
        summary = summarise(rows)
        results = {"arguments": vars(args), "summary": summary, "rows": rows}
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(markdown_table(summary))
        return 0

    return run_program("few_shot", run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", help="a folder, or an id on the Hub")
    parser.add_argument("--data", required=True, help="RealIAD: a folder, or an id on the Hub")
    parser.add_argument("--resolution", default="512", help="which of RealIAD's resolutions: 256, 512, 1024 or raw")
    parser.add_argument("--categories", action=Values, required=True, help="to test on")
    parser.add_argument("--variants", action=Values, default=[None], help="of the bundle: one or two (see above)")
    parser.add_argument("--seeds", action=Values, type=int, default=[0, 1, 2], help="a draw of references each")
    parser.add_argument("--shots", type=int, default=8, help="references of a draw")
    parser.add_argument("--device", help="cpu, cuda, ...; the first GPU if there is one")
    parser.add_argument("--output", required=True, help="the JSON file of the results")
    return parser


def _compare(args: argparse.Namespace) -> list[Row]:
    """Untrained features under all detectors, and each variant's under those that it is meant for."""
    first, last = args.variants[0], args.variants[-1]
    extractors = {
        name: ADPretrainFeatureExtractor.from_pretrained(args.bundle, variant=name, device=args.device)
        for name in dict.fromkeys(args.variants)
    }
    variant_of = {name: last if name == "FeatureNorm" else first for name in DETECTORS}
    dataset = load_real_iad(args.data, resolution=args.resolution, categories=args.categories)
    cells = find_cells(dataset, args.categories, args.shots)
    encoded = encode_cells(extractors[first], dataset, cells, seeds=args.seeds, shots=args.shots)
    rows = []
    for cell in tqdm(encoded, total=len(cells), unit="cell", desc="few-shot"):
        rows += score_cells(extractors[first], [cell], features=[kind for kind in FEATURES if kind != "pretrained"])
        rows += _pretrained(extractors, cell, variant_of)
    return rows


def _pretrained(
    extractors: Mapping[str | None, ADPretrainFeatureExtractor], cell: EncodedCell, variant_of: Mapping[str, str | None]
) -> list[Row]:
    return [
        row | {"features": f"pretrained {extractor.variant}"}
        for name, extractor in extractors.items()
        for row in score_cells(
            extractor, [cell], features=["pretrained"], detectors=[d for d in DETECTORS if variant_of[d] == name]
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
