"""Arguments that several verbs share, and what they may be."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
INT8 = "int8"
AUGMENTATIONS = ("none", "flips", "jitter", "both", "auto")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The bundle and how it is loaded, and how images are read."""
    parser.add_argument("bundle", help="a bundle: a folder, or an id on the Hub")
    parser.add_argument("--variant", help="which projectors, e.g. angle or norm; the bundle's default if not given")
    parser.add_argument("--revision", help="branch, tag or commit of the bundle on the Hub")
    add_preparation(parser, "as the bundle says")
    parser.add_argument(
        "--decode",
        choices=("exact", "fast"),
        help="fast: JPEGs are reduced while they are decoded, and features change a little; as the bundle says",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, INT8),
        default="float32",
        help="precision in memory; on a CPU bfloat16 is fast with AVX-512 or AMX instructions for it, int8 elsewhere",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="images at a time")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images of more than twice as many pixels, as PIL.Image.MAX_IMAGE_PIXELS does; 89478485 by default",
    )


def add_preparation(parser: argparse.ArgumentParser, default: str) -> None:
    """How images are prepared, and what it is by default, in words."""
    size = f"shorter side in pixels that images are prepared to, a multiple of the patch size; {default} by default"
    parser.add_argument("--image-size", type=positive, help=size)
    mode = f"resize: nothing is cut off; crop: the centre square alone is looked at; {default} by default"
    parser.add_argument("--resize-mode", choices=("resize", "crop"), help=mode)


def preparation(args: argparse.Namespace) -> dict[str, Any]:
    """What of that was given, as fields of the configuration."""
    return {name: value for name in ("image_size", "resize_mode") if (value := getattr(args, name)) is not None}


def add_run(parser: argparse.ArgumentParser) -> None:
    """The bundle, the images of a run, their references, and where the results go."""
    add_bundle(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", help="a folder, image files, or a data set that `datasets` saved to disk"
    )
    references = parser.add_mutually_exclusive_group(required=True)
    references.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        help="normal images: a folder, files, or a bank made by `adpretrain reference`",
    )
    references.add_argument(
        "--references",
        type=Path,
        metavar="FOLDER",
        help="banks of several products, <category>.safetensors; an image's category is the first of its folders, from "
        "the images' folder downward, that is the name of one",
    )
    parser.add_argument(
        "--categories",
        type=Path,
        metavar="FILE",
        help="with --references: a CSV file of the columns image, relative to the images' folder, and category",
    )
    add_references(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; a stopped run goes on in it")
    parser.add_argument("--image-column", help="of a data set; its only column of images by default")
    ray = parser.add_argument_group(
        "on Ray",
        "An actor on every GPU of a machine or of a cluster writes Parquet files, and neither maps nor overlays.",
    )
    ray.add_argument("--ray", action="store_true", help="run on Ray, on this machine")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="run on the Ray cluster that is there, e.g. auto")
    ray.add_argument(
        "--ray-cpus",
        type=positive,
        metavar="N",
        help="cores of an actor where there are no GPUs; all of this machine, or of a node, by default",
    )


def add_judgement(parser: argparse.ArgumentParser) -> None:
    """How the images of a product are judged; where the reference is a bank, it says so itself."""
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="other normal images, a folder or files, by whose scores decisions are made; by default those of the "
        "reference, of which each that is in the bank is compared with the others",
    )
    parser.add_argument(
        "--false-alarms",
        type=rate,
        metavar="RATE",
        help="the share of normal images that may be called anomalous, e.g. 0.01; by default the smallest that the "
        "calibration images allow, but at least 0.01",
    )
    parser.add_argument(
        "--image-score", choices=("max", "top"), help="the maximum of a map (the default), or the mean of its top"
    )
    parser.add_argument("--top", type=fraction, help="the share of a map's pixels that is its top; 0.005 by default")
    areas = "a mask of the images' size, 0 outside, or the corners of a polygon, x,y x,y x,y"
    parser.add_argument("--region", type=area, nargs="+", help=f"region of interest, which alone counts: {areas}")
    parser.add_argument("--ignore", type=area, nargs="+", help=f"what does not count: {areas}")


def refuse_given(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises InputError that names those of some options that were given."""
    from adpretrain_hf.errors import InputError

    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]:
        raise InputError(f"{', '.join(given)}: {why}")


def add_references(parser: argparse.ArgumentParser) -> None:
    """How a bank is made of reference images, and how they and all others are cut into windows."""
    parser.add_argument(
        "--augment-references",
        choices=AUGMENTATIONS,
        default="none",
        help="copies of the reference images that are references, too: turned over (flips), moved a little (jitter), "
        "both, or what makes the images look most normal beside each other (auto); none by default",
    )
    parser.add_argument(
        "--select", type=positive, metavar="N", help="take the N reference images that stand for all of them"
    )
    tiles = parser.add_argument_group(
        "tiles", "For small defects in large images: windows at full resolution. A reference bank brings its own."
    )
    cut = tiles.add_mutually_exclusive_group()
    cut.add_argument("--tiles", type=grid, metavar="ROWSxCOLUMNS", help="so many windows of every image, e.g. 2x3")
    cut.add_argument("--tile-size", type=positive, metavar="N", help="square windows of so many pixels")
    tiles.add_argument(
        "--tile-overlap",
        type=float,
        metavar="SHARE",
        help="of a window that is also in the next one, 0 to 0.5; 0.125 by default",
    )
    tiles.add_argument(
        "--tile-reference",
        choices=("window", "all"),
        help="what a window is compared with: the references' windows at its place (the default), or all of them",
    )


def tile_options(args: argparse.Namespace) -> dict[str, Any]:
    """The tiles that were asked for, as ``extractor.set_reference`` takes them.

    Raises:
        InputError: an overlap or a reference of tiles, but no tiles; or see ``Tiles``.
    """
    from adpretrain_hf.errors import InputError
    from adpretrain_hf.images import Tiles

    if "tiles" not in args:
        return {}
    rows, columns = args.tiles or (None, None)
    if rows is None and args.tile_size is None:
        if args.tile_overlap is not None or args.tile_reference is not None:
            raise InputError("--tile-overlap and --tile-reference say how tiles are: expected --tiles or --tile-size")
        return {}
    overlap = {} if args.tile_overlap is None else {"overlap": args.tile_overlap}
    tiles = Tiles(rows, columns, args.tile_size, **overlap)
    return {"tiles": tiles, "tile_reference": args.tile_reference}


def grid(text: str) -> tuple[int, int]:
    """Rows and columns."""
    rows, _, columns = text.partition("x")
    try:
        return positive(rows), positive(columns)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected rows and columns, e.g. 2x3") from error


def positive(text: str) -> int:
    """An integer >= 1."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def rate(text: str) -> float:
    """A number above 0 and below 1."""
    return _number(text, lambda value: 0 < value < 1, "a number above 0 and below 1")


def seconds(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number of seconds above 0")


def _number(text: str, holds: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")  # which nothing holds of
    if not holds(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def area(text: str) -> Path | tuple[float, float]:
    """The path of a mask, or a corner ``x,y``."""
    x, comma, y = text.partition(",")
    try:
        return (float(x), float(y)) if comma else Path(text)
    except ValueError:
        return Path(text)


def seed(text: str) -> int:
    """An integer that PyTorch takes as a seed."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 2**63 - 1")
    return int(text)


class Values(argparse.Action):
    """Several values of a kind, with spaces or commas between them: ``3 6 9`` and ``3,6,9`` are the same."""

    def __init__(self, *args: Any, type: Callable[[str], Any] = str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"nargs": "+"})
        self._kind = type

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """See argparse."""
        try:
            parts = [self._kind(part.strip()) for word in values for part in word.split(",") if part.strip()]
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if not parts:
            raise argparse.ArgumentError(self, "expected at least one value")
        setattr(namespace, self.dest, parts)
