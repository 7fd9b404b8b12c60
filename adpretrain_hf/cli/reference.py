"""``adpretrain reference``: normal images of one product as a reference bank."""

import argparse
from pathlib import Path

from adpretrain_hf.cli.arguments import DTYPES, add_bundle, add_tiles, fraction, tile_options

HELP = "encode normal images of one product as a reference bank"
EXAMPLES = """\
  adpretrain reference my-bundle normal_images/ --category screw --output screw.safetensors
  adpretrain reference my-bundle many_normal_images/ --keep 0.1 --output screw.safetensors
  adpretrain reference my-bundle large_normal_images/ --tiles 2x3 --output sheet.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_bundle(parser)
    parser.add_argument("images", type=Path, nargs="+", help="a folder, or image files")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--category", default="", help="name of the product, kept in the bank")
    parser.add_argument(
        "--keep", type=fraction, default=1.0, help="fraction of the patches to keep, e.g. 0.1: a core-set"
    )
    parser.add_argument("--bank-dtype", choices=DTYPES, default="float32", help="precision of the stored patches")
    add_tiles(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes normal images as a reference bank."""
    import torch

    from adpretrain_hf.cli.folder_run import check_images, load, single
    from adpretrain_hf.errors import InputError

    if args.output.suffix != ".safetensors":
        raise InputError(f"--output is {args.output}, expected a name that ends in .safetensors: a bank is known by it")
    tiles = tile_options(args)
    extractor = load(args)
    check_images(args.images)
    options = {"category": args.category, "batch_size": args.batch_size, "progress": True} | tiles
    bank = extractor.make_reference(single(args.images), **options).compact(args.keep)
    bank.to(dtype=getattr(torch, args.bank_dtype)).save(args.output)
    print(f"{args.output}: {len(bank)} patches of {bank.num_images} images")
    return 0
