"""``adpretrain demo``: every category of a folder in MVTecAD's layout, scored and drawn."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from adpretrain_hf.cli.arguments import add_preparation, preparation
from adpretrain_hf.errors import ImageError, InputError, MissingPathError

if TYPE_CHECKING:
    from adpretrain_hf.extractor import ADPretrainFeatureExtractor
    from adpretrain_hf.overlays import SheetEntry

HELP = "score photographs and draw the results"
EXAMPLES = """\
  adpretrain demo
  adpretrain demo --bundle my-bundle --photos mvtec_ad --output mvtec_demo
"""
Row = tuple[str, str, str, float]  # category, image, label, score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes."""
    parser.add_argument("--bundle", default="hub_cards/adpretrain-dinov2-small", help="folder, or id on the Hub")
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("tests/photos"),
        help="categories as in MVTecAD: <category>/train/good, <category>/test/<type>",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results")
    add_preparation(parser, "as the bundle says")


def run(args: argparse.Namespace) -> int:
    """Writes ``scores.csv``, ``contact_sheet.png`` and ``overlays/`` for all categories."""
    from adpretrain_hf.extractor import ADPretrainFeatureExtractor
    from adpretrain_hf.files import atomic_path, write_csv
    from adpretrain_hf.overlays import contact_sheet

    if not args.photos.is_dir():
        raise MissingPathError(f"no photographs at {args.photos}: run this in a checkout, or give --photos")
    categories = sorted(path.parent.parent for path in args.photos.glob("*/train/good"))
    if not categories:
        raise InputError(f"no <category>/train/good below {args.photos}: expected MVTecAD's layout")
    extractor = ADPretrainFeatureExtractor.from_pretrained(args.bundle, **preparation(args))
    table, sheet = args.output / "scores.csv", args.output / "contact_sheet.png"
    entries: dict[Row, SheetEntry] = {}
    errors = dict[str, ImageError]()
    for category in categories:
        own = _score_category(extractor, category, args.output, errors)
        print(_summary(category.name, own))
        entries |= own
    write_csv(table, ("category", "image", "label", "score"), list(entries))
    with atomic_path(sheet) as temporary:
        contact_sheet(list(entries.values())).save(temporary)
    print(f"{len(entries)} images: see {sheet} and {table}")
    if errors:
        print(f"{len(errors)} images could not be used:", *errors.values(), sep="\n  ", file=sys.stderr)
    return 1 if errors else 0


def _score_category(
    extractor: "ADPretrainFeatureExtractor", category: Path, output: Path, errors: "dict[str, ImageError]"
) -> "dict[Row, SheetEntry]":
    from adpretrain_hf.files import atomic_path
    from adpretrain_hf.images import list_images, read_image
    from adpretrain_hf.overlays import SheetEntry, calibrated_colours, colour_range, overlay

    normal = category / "train" / "good"
    bank = extractor.make_reference(normal, category=category.name)
    extractor.set_reference(extractor.calibrate(bank, normal) if bank.leaves_out else bank)
    paths = list_images(category / "test")
    print(f"{category.name}: {len(paths)} images", file=sys.stderr)
    results = list(extractor.score_stream(paths, on_error=errors.__setitem__))
    if not results:
        return {}
    maps = [result.full_size_map().numpy() for result in results]
    calibration = results[0].judgement.calibration
    colours = calibrated_colours(calibration) if calibration else colour_range(maps)
    entries = {}
    for result, anomaly in zip(results, maps, strict=True):
        path = Path(result.image.name)
        name = path.relative_to(category / "test")
        image, label = read_image(path, str(path)), name.parts[0]
        with atomic_path(output / "overlays" / category.name / f"{name}.png") as temporary:
            overlay(image, anomaly, colours).save(temporary)
        row = (category.name, name.as_posix(), label, result.score)
        entries[row] = SheetEntry(image, anomaly, f"{category.name}: {label}", f"score {result.score:.3f}", colours)
    return entries


def _summary(category: str, rows: Iterable[Row]) -> str:
    normal = [score for _, _, label, score in rows if label == "good"]
    defective = [score for _, _, label, score in rows if label != "good"]
    if not normal or not defective:
        return f"{category}: {len(normal or defective)} images"
    above = sum(score > max(normal) for score in defective)
    return (
        f"{category}: normal images score up to {max(normal):.3f}; {above} of {len(defective)} defective ones score "
        f"higher, up to {max(defective):.3f}"
    )
