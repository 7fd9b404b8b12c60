"""Arguments that several verbs share, and what they may be."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
INT8 = "int8"


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The bundle and how it is loaded, and how images are read."""
    parser.add_argument("bundle", help="a bundle: a folder, or an id on the Hub")
    parser.add_argument("--variant", help="which projectors, e.g. angle or norm; the bundle's default if not given")
    parser.add_argument("--revision", help="branch, tag or commit of the bundle on the Hub")
    add_preparation(parser, "as the bundle says")
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
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        required=True,
        help="normal images: a folder, files, or a bank made by `adpretrain reference`",
    )
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


def positive(text: str) -> int:
    """An integer >= 1."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return value


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
