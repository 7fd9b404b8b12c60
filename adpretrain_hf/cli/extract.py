"""``adpretrain extract``: the features of many images, for a detector."""

import argparse
from typing import TYPE_CHECKING

from adpretrain_hf.cli.arguments import add_run

if TYPE_CHECKING:
    from torch import Tensor

    from adpretrain_hf.images import PreparedImage

HELP = "write the features of every image to a file of its own"
EXAMPLES = """\
  adpretrain extract hub_cards/adpretrain-dinov2-small images/ --reference normal_images/ --output features/
  adpretrain extract org/adpretrain-dinov2-large images/ --reference screw.safetensors --output features/ --format npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_run(parser)
    parser.add_argument(
        "--format", choices=("safetensors", "npz"), default="safetensors", help="of the files without Ray"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the levels of every image."""
    from adpretrain_hf.cli.folder_run import FolderRun, finish, prepare, run_on_ray
    from adpretrain_hf.cli.results import FEATURE_FORMATS

    if args.ray or args.ray_address:
        return run_on_ray(args, features=True)
    images, extractor, settings = prepare(args)
    run = FolderRun(images, args.output, settings | {"format": args.format}, {".": f".{args.format}"})
    run.write(
        lambda images, **options: (_named(*result) for result in extractor.stream(images, **options)),
        FEATURE_FORMATS[args.format],
        args.batch_size,
    )
    return finish(args.output, len(images.names), run.errors)


def _named(image: "PreparedImage", levels: "dict[str, Tensor]") -> "tuple[str, dict[str, Tensor]]":
    """The features by the image's name; with tiles also ``boxes`` (T, 4): top, left, height and width of windows."""
    import torch

    return image.name, levels | ({"boxes": torch.tensor(image.windows.boxes)} if image.windows else {})
