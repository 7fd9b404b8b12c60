"""The demo: every category of a folder in MVTecAD's layout, scored and drawn."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from adpretrain_hf.errors import InputError, MissingPathError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, write_csv
from adpretrain_hf.images import list_images, read_image
from adpretrain_hf.overlays import SheetEntry, colour_range, contact_sheet, overlay

Row = tuple[str, str, str, float]  # category, image, label, score


def demo(args: Namespace) -> int:
    """Writes ``scores.csv``, ``contact_sheet.png`` and ``overlays/`` for all categories."""
    if not args.photos.is_dir():
        raise MissingPathError(f"no photographs at {args.photos}: run this in a checkout, or give --photos")
    categories = sorted(path.parent.parent for path in args.photos.glob("*/train/good"))
    if not categories:
        raise InputError(f"no <category>/train/good below {args.photos}: expected MVTecAD's layout")
    extractor = ADPretrainFeatureExtractor.from_pretrained(args.bundle)
    rows: list[Row] = []
    entries: list[SheetEntry] = []
    for category in categories:
        new_rows, new_entries = _score_category(extractor, category, args.output)
        rows, entries = rows + new_rows, entries + new_entries
        print(_summary(category.name, new_rows))
    write_csv(args.output / "scores.csv", ("category", "image", "label", "score"), rows)
    with atomic_path(args.output / "contact_sheet.png") as temporary:
        contact_sheet(entries).save(temporary)
    print(f"{len(rows)} images: see {args.output / 'contact_sheet.png'} and {args.output / 'scores.csv'}")
    return 0


def _score_category(
    extractor: ADPretrainFeatureExtractor, category: Path, output: Path
) -> tuple[list[Row], list[SheetEntry]]:
    extractor.set_reference(category / "train" / "good", category=category.name)
    paths = list_images(category / "test")
    print(f"{category.name}: {len(paths)} images", file=sys.stderr)
    results = list(extractor.score_stream(paths))
    maps = [result.full_size_map().numpy() for result in results]
    colours = colour_range(maps)
    rows, entries = [], []
    for path, result, anomaly in zip(paths, results, maps, strict=True):
        name = path.relative_to(category / "test")
        image, label = read_image(path, str(path)), name.parts[0]
        with atomic_path(output / "overlays" / category.name / f"{name}.png") as temporary:
            overlay(image, anomaly, colours).save(temporary)
        rows.append((category.name, name.as_posix(), label, result.score))
        entries.append(SheetEntry(image, anomaly, f"{category.name}: {label}", f"score {result.score:.3f}", colours))
    return rows, entries


def _summary(category: str, rows: list[Row]) -> str:
    normal = [score for _, _, label, score in rows if label == "good"]
    defective = [score for _, _, label, score in rows if label != "good"]
    if not normal or not defective:
        return f"{category}: {len(rows)} images"
    above = sum(score > max(normal) for score in defective)
    return (
        f"{category}: normal images score up to {max(normal):.3f}; {above} of {len(defective)} defective ones score "
        f"higher, up to {max(defective):.3f}"
    )
