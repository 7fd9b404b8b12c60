"""``adpretrain convert``: a bundle from the authors' released checkpoints."""

import argparse
from pathlib import Path

from adpretrain_hf.cli.arguments import Values, add_preparation, positive, preparation
from adpretrain_hf.cli.new import check_free, describe

HELP = "make a bundle from the authors' released checkpoints"
EXAMPLES = """\
  adpretrain convert --backbone dinov2-large --from-hub xcyao00/ADPretrain --output adpretrain-dinov2-large
  adpretrain convert --backbone dinov2-base --angle checkpoints_pro_angle.pth --output adpretrain-dinov2-base
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    parser.add_argument("--backbone", required=True, help="preset, or a backbone as for `adpretrain new`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--angle", type=Path, help="checkpoint of the angle variant (.pth)")
    parser.add_argument("--norm", type=Path, help="checkpoint of the norm variant (.pth)")
    parser.add_argument("--from-hub", metavar="REPOSITORY", help="fetch both from the Hub: xcyao00/ADPretrain")
    levels = "blocks counted from 1, where the backbone is no preset"
    parser.add_argument("--levels", action=Values, type=positive, help=levels)
    add_preparation(parser, "the published 224, and crop,")
    parser.add_argument("--upstream", help="id on the Hub to record as the origin, where the backbone is a folder")


def run(args: argparse.Namespace) -> int:
    """Makes a bundle from the authors' released checkpoints."""
    from adpretrain_hf.bundle import convert, fetch_released
    from adpretrain_hf.errors import InputError

    files = {"angle": args.angle, "norm": args.norm}
    checkpoints = {variant: path for variant, path in files.items() if path is not None}
    if bool(checkpoints) == bool(args.from_hub):
        raise InputError("give either --from-hub or the files, --angle and --norm")
    check_free(args.output)
    if args.from_hub:
        checkpoints = fetch_released(args.backbone, args.from_hub)
    overrides = {"layers": args.levels, "backbone": args.upstream}
    overrides = {name: value for name, value in overrides.items() if value is not None} | preparation(args)
    config = convert(args.backbone, checkpoints, args.output, **overrides)
    print(f"{args.output}: {describe(config)}, variants {', '.join(checkpoints)}")
    return 0
